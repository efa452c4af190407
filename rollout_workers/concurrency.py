"""How many episodes a worker keeps in flight: as many as the engines' KV carries, at most `rollout.concurrency`.

More episodes fill the engines better until their sessions no longer fit: then the KV of sessions that wait for tools makes
room for others' and is computed again with every turn. Engines tell what they lose with each submission; from that a
number of episodes is found as TCP finds its window: a little more as long as nothing is lost, a good deal less when too much is.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Collection
from dataclasses import dataclass
from types import TracebackType

from rollout_workers.engines.protocol import EngineLoad


@dataclass(frozen=True)
class ConcurrencyPolicy:
    """The constants of a `ConcurrencyController`; `millrace bench routing --adaptive` shows what they lead to."""

    tolerated: float = 0.02
    """Share of requests that may cost another session its KV without being too much."""
    full: float = 0.97
    """Share of the KV in use above which nothing is added, though nothing was lost yet."""
    back_off: float = 0.85
    """What too much is multiplied by."""
    least_round: int = 16
    """Requests after which an engine is judged, at least; otherwise one for each of its sessions."""

    def __post_init__(self) -> None:
        if not (0 <= self.tolerated < 1 and 0 < self.full <= 1 and 0 < self.back_off < 1 and self.least_round >= 1):
            raise ValueError(
                f"{self}: tolerated must lie in [0, 1), full in (0, 1], back_off in (0, 1), least_round be at least 1"
            )


class ConcurrencyController:
    """A pure state machine, one a worker: `heard` after each answer of an engine, `limit` says how many episodes may run.

    It judges once a round, that is when the engines have finished about one request for each of their sessions. If more than
    ``tolerated`` of them cost a session its KV, or more requests wait for a slot than run, the limit becomes ``back_off``
    times what it was; if nothing was lost, nothing waits and the limit is used up, all workers' together grow by one for each engine. Nothing is
    cut again until as many episodes have ended as the last cut takes: episodes in flight are never stopped.
    1 <= ``limit`` <= ``ceiling``, always.

    >>> controller = ConcurrencyController(ceiling=8)
    >>> controller.members(["a"]); controller.limit
    8
    >>> controller.heard("a", EngineLoad(sessions=8, requests=8), episodes=8)
    >>> controller.heard("a", EngineLoad(sessions=8, requests=8, lost=10, finished=20), episodes=8); controller.limit
    6
    """

    def __init__(self, ceiling: int, policy: ConcurrencyPolicy | None = None) -> None:
        if ceiling < 1:
            raise ValueError(f"ceiling={ceiling}: must be at least 1")
        self.ceiling = ceiling
        self.policy = policy or ConcurrencyPolicy()
        self._limit = float(ceiling)
        self._engines: dict[str, _Engine] = {}
        self.cuts = 0
        """How often too much was in flight."""

    @property
    def limit(self) -> int:
        """Episodes that may be in flight."""
        return max(1, min(self.ceiling, int(self._limit + 1e-9)))

    def members(self, engines: Collection[str]) -> None:
        """These engines are in service now, and no others. Where a limit was found, it grows and shrinks with their number."""
        before = len(self._engines)
        self._engines = {name: self._engines.get(name) or _Engine() for name in engines}
        if self.cuts and before and engines and len(engines) != before:
            self._limit = min(float(self.ceiling), max(1.0, self._limit * len(engines) / before))

    def heard(self, engine: str, load: EngineLoad, episodes: int) -> None:
        """What an engine in service says of itself, while this worker has ``episodes`` in flight. Unknown ones are ignored."""
        known = self._engines.get(engine)
        if known is None:
            return
        known.now = load
        if known.since is None or load.finished < known.since.finished or load.lost < known.since.lost:
            known.since = load
        engines = [each for each in self._engines.values() if each.now is not None]
        if sum(each.finished for each in engines) >= max(
            sum(each.load.sessions for each in engines), self.policy.least_round
        ):
            self._judge(engines, episodes)
            for each in engines:
                each.since = each.now

    def _judge(self, engines: list[_Engine], episodes: int) -> None:
        """A round is over."""
        lost = sum(each.lost for each in engines)
        finished = sum(each.finished for each in engines)
        waiting = sum(each.load.waiting for each in engines)
        if lost > self.policy.tolerated * finished or 2 * waiting > sum(each.load.requests for each in engines):
            if episodes <= self.limit:
                self._limit = max(1.0, self.policy.back_off * min(self._limit, episodes))
                self.cuts += 1
            return
        kv_used = sum(each.load.kv_used for each in engines) / len(engines)
        if not lost and not waiting and kv_used < self.policy.full and episodes >= self.limit:
            self._limit = min(float(self.ceiling), self._limit + len(engines) * _share(engines))


def _share(engines: list[_Engine]) -> float:
    """How much of what the engines hold is this worker's: all workers grow at once, by so much together."""
    own, sessions = sum(each.load.own_sessions for each in engines), sum(each.load.sessions for each in engines)
    return min(1.0, own / sessions) if own else 1.0


@dataclass
class _Engine:
    """What an engine has said."""

    now: EngineLoad | None = None
    since: EngineLoad | None = None
    """At the beginning of the round."""

    @property
    def load(self) -> EngineLoad:
        assert self.now is not None, "only engines that were heard are judged"
        return self.now

    @property
    def finished(self) -> int:
        """Requests in this round."""
        return self.load.finished - (self.since or self.load).finished

    @property
    def lost(self) -> int:
        """Sessions whose KV made room in this round."""
        return self.load.lost - (self.since or self.load).lost


class Gate:
    """Lets a number of tasks through that may change; the others wait in order::

    async with gate:
        ...
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.inside = 0
        self._waiting: deque[asyncio.Future[None]] = deque()

    def resize(self, limit: int) -> None:
        """Those who are inside stay; more may come in when fewer than ``limit`` are."""
        self.limit = limit
        self._let_in()

    async def __aenter__(self) -> None:
        if self.inside < self.limit and not self._waiting:
            self.inside += 1
            return
        ticket: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(ticket)
        try:
            await ticket
        except asyncio.CancelledError:
            if ticket.done() and not ticket.cancelled():  # let in and cancelled at the same moment
                self._leave()
            elif ticket in self._waiting:
                self._waiting.remove(ticket)
            raise

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leave()

    def _leave(self) -> None:
        self.inside -= 1
        self._let_in()

    def _let_in(self) -> None:
        while self._waiting and self.inside < self.limit:
            ticket = self._waiting.popleft()
            if not ticket.done():
                self.inside += 1
                ticket.set_result(None)


class AdaptiveGate(Gate):
    """A gate whose limit follows a `ConcurrencyController`."""

    def __init__(self, ceiling: int, policy: ConcurrencyPolicy | None = None) -> None:
        super().__init__(ceiling)
        self.controller = ConcurrencyController(ceiling, policy)

    def heard(self, engine: str, load: EngineLoad, engines: Collection[str]) -> None:
        """``engine``, one of the ``engines`` in service, says how busy it is."""
        self.controller.members(engines)
        self.controller.heard(engine, load, self.inside)
        self.resize(self.controller.limit)
