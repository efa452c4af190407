"""Episodes of a suite over some engines, event by event: as many in flight as there may be, a new one when one ends.

The decisions are those of a run: one `Router` a worker, told of the others' load by the engines' answers, and with
``adaptive`` one `ConcurrencyController` a worker. Nothing else is simulated; seconds and tokens are the suite's own.
"""

from __future__ import annotations

import heapq
import itertools
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import msgspec

from benchmarks.routing.engines import Answer, Ask, Engines
from benchmarks.routing.loads import Imbalance, Loads
from env_pool.workloads.scripts import EpisodeScript, suite_script
from rollout_workers.concurrency import ConcurrencyController
from rollout_workers.router import Router, RoutingPolicy


@dataclass(frozen=True)
class Case:
    """What runs. ``episodes`` are in flight over all ``workers``."""

    suite: str
    engines: int
    episodes: int
    workers: int = 1
    group_size: int = 8
    policy: RoutingPolicy = field(default_factory=RoutingPolicy)
    told: bool = True
    """Whether engines tell workers of each other's load."""
    adaptive: bool = False
    seed: int = 0
    warm_up_s: float = 1800.0
    measured_s: float = 3600.0


@dataclass
class Measured:
    """What came of a case, without its warm-up."""

    turns: int = 0
    ended: int = 0
    """Episodes."""
    output_tokens: int = 0
    possible: int = 0
    """Prompt tokens that some engine had the KV of: the session's own, or at its beginning the group's prompt."""
    reused: int = 0
    """Of those, the ones whose KV was where the request went, had the engine room for everything."""
    cached: int = 0
    """Prompt tokens that engines did not compute; 0 for ideal ones."""
    moved: int = 0
    """Times a session left its engine."""
    in_flight: float = 0.0
    """Episodes, on average over the turns."""
    imbalance: dict[str, Imbalance] = field(default_factory=dict)

    @property
    def affinity(self) -> float:
        return self.reused / self.possible if self.possible else 1.0


@dataclass(slots=True)
class _Episode:
    worker: int
    session: str
    group: str
    script: EpisodeScript
    length: int
    turn: int = 0
    engine: int = -1
    computed: int = 0
    """Tokens whose KV is on ``engine``."""


class _Worker:
    """One rollout worker: its router, its queue of episodes, its limit."""

    def __init__(self, index: int, case: Case, ceiling: int) -> None:
        self.index = index
        self.router = Router(case.policy)
        for index in range(case.engines):
            self.router.add(str(index))
        self.controller = ConcurrencyController(ceiling) if case.adaptive else None
        if self.controller is not None:
            self.controller.members(self.router.members)
        self.ceiling = ceiling
        self.queue: deque[tuple[int, int]] = deque()
        self.running = 0
        self.sessions: Counter[int] = Counter()
        self.requests: Counter[int] = Counter()

    @property
    def limit(self) -> int:
        return self.ceiling if self.controller is None else self.controller.limit


class ClosedLoop:
    """Runs one case."""

    def __init__(self, case: Case, engines: Engines) -> None:
        self.case = case
        self.engines = engines
        share, more = divmod(case.episodes, case.workers)
        self._workers = [_Worker(index, case, share + (index < more)) for index in range(case.workers)]
        self._tasks = itertools.count()
        self._ids = itertools.count()
        self._asked: dict[int, _Episode] = {}
        self._timers: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._holders: dict[str, Counter[int]] = {}
        """On which engines sessions of a group have its prompt, and how many."""
        self.loads = Loads(case.engines, 0.0)
        self.measured = Measured()
        self.now = 0.0

    def run(self) -> Measured:
        """Live through warm-up and measurement."""
        for worker in range(len(self._workers)):
            self._fill(worker)
        self._run_to(self.case.warm_up_s)
        self.loads.restart()
        before = sum(worker.router.moved for worker in self._workers)
        self.measured = Measured()
        self._run_to(self.case.warm_up_s + self.case.measured_s)
        measured = self.measured
        measured.moved = sum(worker.router.moved for worker in self._workers) - before
        measured.in_flight /= max(1, measured.turns)
        measured.imbalance = self.loads.imbalance()
        return measured

    def _run_to(self, end: float) -> None:
        while True:
            timer, event = self._timers[0][0] if self._timers else end, self.engines.next_event()
            at = min(timer, end if event is None else event)
            if at >= end:
                self.loads.pass_to(end)
                self.now = end
                return
            self.loads.pass_to(at)
            self.now = max(self.now, at)
            if event is not None and event <= at:
                for answer in self.engines.advance(self.now):
                    self._answered(answer)
            while self._timers and self._timers[0][0] <= at:
                heapq.heappop(self._timers)[2]()

    # Episodes

    def _fill(self, index: int) -> None:
        """Start as many episodes as the worker may run."""
        worker = self._workers[index]
        while worker.running < worker.limit:
            if not worker.queue:
                task = next(self._tasks)
                worker.queue.extend((task, member) for member in range(self.case.group_size))
            task, member = worker.queue.popleft()
            script = suite_script(self.case.suite, self.case.seed, task, member)
            episode = _Episode(index, f"g{task}-{member}", f"g{task}", script, script.prompt_tokens)
            worker.running += 1
            self._after(script.reset_s, partial(self._ask, episode))

    def _after(self, seconds: float, then: Callable[[], None]) -> None:
        heapq.heappush(self._timers, (self.now + seconds, next(self._order), then))

    def _ask(self, episode: _Episode) -> None:
        worker = self._workers[episode.worker]
        chosen = worker.router.choose(episode.session, episode.length, episode.group)
        assert chosen is not None, "there are engines"
        engine = int(chosen)
        moved = engine != episode.engine
        self._count_reuse(episode, engine)
        if moved:
            self._leave(episode)
            episode.engine, episode.computed = engine, 0
            worker.sessions[engine] += 1
            self._holders.setdefault(episode.group, Counter())[engine] += 1
            self.loads.change(engine, self.now, sessions=1)
        self.loads.change(engine, self.now, requests=1, tokens=episode.length - episode.computed)
        worker.requests[engine] += 1
        episode.computed = episode.length
        output = episode.script.turns[episode.turn].output_tokens
        ask = Ask(next(self._ids), episode.session, episode.group, episode.length, output)
        self._asked[ask.id] = episode
        self.engines.ask(engine, ask, self.now)

    def _count_reuse(self, episode: _Episode, engine: int) -> None:
        """What of the request's context was computed before anywhere, and what of that on ``engine``."""
        holders, prompt = self._holders.get(episode.group, ()), episode.script.prompt_tokens
        self.measured.possible += max(episode.computed, prompt if holders else 0)
        own = episode.computed if engine == episode.engine else 0
        self.measured.reused += max(own, prompt if engine in holders else 0)

    def _answered(self, answer: Answer) -> None:
        episode = self._asked.pop(answer.id)
        worker, engine = self._workers[episode.worker], episode.engine
        worker.router.finished(str(engine))
        worker.requests[engine] -= 1
        turn = episode.script.turns[episode.turn]
        self.loads.change(engine, self.now, requests=-1, tokens=turn.output_tokens)
        episode.length += turn.output_tokens
        episode.computed += turn.output_tokens
        self.measured.turns += 1
        self.measured.cached += answer.cached or 0
        self.measured.output_tokens += turn.output_tokens
        self.measured.in_flight += sum(each.running for each in self._workers)
        self._tell(worker, engine)
        self._after(turn.tool_s, lambda: self._go_on(episode))

    def _tell(self, worker: _Worker, engine: int) -> None:
        """The engine's answer carries how busy it is."""
        own = worker.sessions[engine], worker.requests[engine]
        sessions, requests = (int(value) for value in self.loads.now[:2, engine])
        if self.case.told:
            worker.router.report(str(engine), sessions - own[0], requests - own[1])
        if worker.controller is not None:
            load = msgspec.structs.replace(
                self.engines.load(engine, sessions, requests), own_sessions=own[0], own_requests=own[1]
            )
            worker.controller.heard(str(engine), load, worker.running)
            self._fill(worker.index)

    def _go_on(self, episode: _Episode) -> None:
        observed = episode.script.turns[episode.turn].observation_tokens
        episode.turn += 1
        if episode.turn < len(episode.script.turns):
            episode.length += observed
            self._ask(episode)
            return
        worker = self._workers[episode.worker]
        worker.router.release(episode.session)
        self._leave(episode)
        worker.running -= 1
        self.measured.ended += 1
        self._fill(episode.worker)

    def _leave(self, episode: _Episode) -> None:
        """The session's KV is needed no more where it is."""
        if episode.engine < 0:
            return
        engine, worker = episode.engine, self._workers[episode.worker]
        self.engines.release(engine, episode.session, self.now)
        self.loads.change(engine, self.now, sessions=-1, tokens=-episode.computed)
        worker.sessions[engine] -= 1
        holders = self._holders[episode.group]
        holders[engine] -= 1
        if not holders[engine]:
            del holders[engine]
        if not holders:
            del self._holders[episode.group]
