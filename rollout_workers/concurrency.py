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
    """The constants of a `ConcurrencyController`. The defaults are what `millrace bench routing --adaptive` found best."""

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


@dataclass
class _Engine:
    limit: float
    """Episodes that this worker may have there."""
    since: EngineLoad | None = None
    """What the engine had done at the beginning of the round."""
    sessions: int = 0
    """This worker's there, when the engine was last heard."""


class ConcurrencyController:
    """A pure state machine, one a worker: `heard` after each answer of an engine, `limit` says how many episodes may run.

    An engine is judged once a round, that is when it has finished about one request for each of its sessions. If more than
    ``tolerated`` of them cost a session its KV, or more requests wait for a slot than run, its share becomes ``back_off``
    times what is there; if nothing was lost and the limit is used up it grows by one. Nothing is cut again until as many
    episodes have ended as the last cut takes: episodes in flight are never stopped. 1 <= ``limit`` <= ``ceiling``, always.

    >>> controller = ConcurrencyController(ceiling=8)
    >>> controller.joined("a"); controller.limit
    8
    >>> controller.heard("a", EngineLoad(sessions=8, requests=8, own_sessions=8), episodes=8)
    >>> load = EngineLoad(sessions=8, requests=8, own_sessions=8, lost=10, finished=20)
    >>> controller.heard("a", load, episodes=8); controller.limit
    6
    """

    def __init__(self, ceiling: int, policy: ConcurrencyPolicy | None = None) -> None:
        if ceiling < 1:
            raise ValueError(f"ceiling={ceiling}: must be at least 1")
        self.ceiling = ceiling
        self.policy = policy or ConcurrencyPolicy()
        self._engines: dict[str, _Engine] = {}
        self.cuts = 0
        """How often too much was in flight."""

    @property
    def limit(self) -> int:
        """Episodes that may be in flight. Without an engine nothing is known, and nothing limited."""
        if not self._engines:
            return self.ceiling
        return max(1, min(self.ceiling, int(sum(engine.limit for engine in self._engines.values()) + 1e-9)))

    def members(self, engines: Collection[str]) -> None:
        """These engines are in service now, and no others."""
        for engine in [known for known in self._engines if known not in engines]:
            self.left(engine)
        for engine in engines:
            self.joined(engine)

    def joined(self, engine: str) -> None:
        """An engine that was not there carries as much as the others are known to; the first ones all there is."""
        if engine in self._engines:
            return
        count = len(self._engines)
        cut = [known.limit for known in self._engines.values()]
        if self.cuts:
            self._engines[engine] = _Engine(sum(cut) / count if count else float(self.ceiling))
            return
        for known in self._engines.values():
            known.limit = self.ceiling / (count + 1)
        self._engines[engine] = _Engine(self.ceiling / (count + 1))

    def left(self, engine: str) -> None:
        """An engine is gone. As long as none ever had too much, the others share all there is."""
        self._engines.pop(engine, None)
        if not self.cuts:
            for known in self._engines.values():
                known.limit = self.ceiling / len(self._engines)

    def heard(self, engine: str, load: EngineLoad, episodes: int) -> None:
        """What an engine in service says of itself, while this worker has ``episodes`` in flight. Unknown ones are ignored."""
        known = self._engines.get(engine)
        if known is None:
            return
        known.sessions = load.own_sessions
        began = known.since
        if began is None or load.finished < began.finished or load.lost < began.lost:
            known.since = load
            return
        finished = load.finished - began.finished
        if finished < max(load.sessions, self.policy.least_round):
            return
        known.since = load
        self._judge(known, load, (load.lost - began.lost) / finished, episodes)

    def _judge(self, engine: _Engine, load: EngineLoad, lost: float, episodes: int) -> None:
        """One round is over in which ``lost`` sessions a request made room for others."""
        if lost > self.policy.tolerated or 2 * load.waiting > load.requests:
            sessions = sum(known.sessions for known in self._engines.values())
            if episodes <= self.limit and sessions:
                here = episodes * engine.sessions / sessions
                engine.limit = max(self._least, self.policy.back_off * min(engine.limit, here))
                self.cuts += 1
        elif lost == 0 and load.kv_used < self.policy.full and not load.waiting and episodes >= self.limit:
            engine.limit = min(float(self.ceiling), engine.limit + 1.0)

    @property
    def _least(self) -> float:
        """An engine's share of one episode."""
        return 1.0 / len(self._engines)


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
