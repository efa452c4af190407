"""The simulated engines: routers, and the accelerators of the synthetic engine, on the simulated clock."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from experience.accounting import Cause
from orchestrator.simulator.cluster import Cluster
from orchestrator.simulator.entries import Segments, merge
from orchestrator.simulator.events import EventLoop
from rollout_workers.engines.synthetic.accelerator import Accelerator, Completion
from rollout_workers.engines.synthetic.recorder import Recorder
from rollout_workers.router import Router

Done = Callable[[Segments], None]
"""Called with what a request sampled."""


@dataclass(slots=True)
class PendingRequest:
    """A request in flight, and where."""

    id: str
    session: str
    prompt: int
    output: int
    done: Done
    group: str = ""
    replica: str = ""
    unit: int = 0
    segments: Segments = field(default_factory=list)
    """Of engines that were lost meanwhile."""


class Replica:
    """One engine actor: accelerators behind a router of their own."""

    def __init__(self, cluster: Cluster, version: int, now: float, recorder: Recorder | None) -> None:
        self.units = [Accelerator(cluster.cost, version, now, recorder=recorder) for _ in range(cluster.accelerators)]
        self.router = Router()
        for index in range(cluster.accelerators):
            self.router.add(str(index))
        self.armed: list[float | None] = [None] * cluster.accelerators
        self.busy = [False] * cluster.accelerators


class Engines:
    """All engine replicas, as a rollout worker sees them. ``on_busy`` hears how many accelerators have work, at each change."""

    def __init__(
        self, cluster: Cluster, loop: EventLoop, on_busy: Callable[[int], None], recorder: Recorder | None = None
    ) -> None:
        self._cluster, self._loop, self._on_busy = cluster, loop, on_busy
        self.recorder = recorder
        """Hears of times to tokens, and of KV."""
        self._router = Router()
        self._replicas: dict[str, Replica] = {}
        self._requests: dict[str, PendingRequest] = {}
        self._homeless: list[PendingRequest] = []
        self._busy = 0
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self.continued = 0
        """Requests that went on elsewhere after their engine was lost."""
        self._gone: dict[Cause, float] = {}

    @property
    def in_flight(self) -> int:
        """Requests that are being served or wait for an engine."""
        return len(self._requests)

    @property
    def names(self) -> list[str]:
        return list(self._replicas)

    def join(self, name: str, version: int) -> None:
        """An engine that holds ``version`` takes requests from now on."""
        self._replicas[name] = Replica(self._cluster, version, self._loop.now, self.recorder)
        self._router.add(name)
        waiting, self._homeless = self._homeless, []
        for request in waiting:
            self._route(request)

    def kill(self, name: str) -> None:
        """An engine is gone: its requests go on elsewhere with the tokens they have, its KV is lost."""
        replica = self._replicas.pop(name)
        self._router.remove(name)
        orphans = [request for request in self._requests.values() if request.replica == name]
        for request in orphans:
            unit = replica.units[request.unit]
            for completion in unit.advance(self._loop.now):
                self._finish(completion)
        for cause, seconds in self._seconds_of(replica).items():
            self._gone[cause] = self._gone.get(cause, 0.0) + seconds
        self._set_busy(self._busy - sum(replica.busy))
        for request in orphans:
            if request.id in self._requests:
                self.continued += 1
                merge(request.segments, replica.units[request.unit].partial(request.id))
                self._route(request)

    def generate(self, request_id: str, session: str, prompt: int, output: int, done: Done, group: str = "") -> None:
        """Start a request; ``done`` hears of its end. The prompts of a ``group`` begin alike."""
        request = PendingRequest(request_id, session, prompt, output, done, group)
        self._requests[request_id] = request
        self._route(request)

    def abort(self, request_id: str) -> None:
        """Nobody waits for this request any more."""
        request = self._requests.pop(request_id, None)
        if request is None:
            return
        if request.replica == "":
            self._homeless.remove(request)
            return
        replica = self._replicas[request.replica]
        replica.units[request.unit].abort(request_id, self._loop.now)
        replica.router.finished(str(request.unit))
        self._router.finished(request.replica)
        self._arm(request.replica, request.unit)

    def release(self, session: str) -> None:
        """The session is over."""
        name = self._router.release(session)
        if name is not None:
            self._let_go(name, session)

    def _let_go(self, name: str, session: str) -> None:
        """The session does not come back to this engine."""
        replica = self._replicas.get(name)
        home = replica.router.release(session) if replica is not None else None
        if replica is not None and home is not None:
            replica.units[int(home)].release(session, self._loop.now)
            self._arm(name, int(home))

    def commit(self, name: str, version: int, keep_kv: bool) -> None:
        """The engine switches to ``version``."""
        for index, unit in enumerate(self._replicas[name].units):
            unit.commit(version, self._loop.now, keep_kv)
            self._arm(name, index)

    def recorders(self) -> tuple[Recorder, ...]:
        """What was recorded so far, a copy."""
        for replica in self._replicas.values():
            for unit in replica.units:
                unit.seconds(self._loop.now)
        return () if self.recorder is None else (self.recorder.copy(),)

    def seconds(self) -> dict[Cause, float]:
        """Accelerator-seconds of all engines, those that are gone included, by what they did."""
        total = dict(self._gone)
        for replica in self._replicas.values():
            for cause, seconds in self._seconds_of(replica).items():
                total[cause] = total.get(cause, 0.0) + seconds
        return total

    def _seconds_of(self, replica: Replica) -> dict[Cause, float]:
        total: dict[Cause, float] = {}
        for unit in replica.units:
            for cause, seconds in unit.seconds(self._loop.now).items():
                total[cause] = total.get(cause, 0.0) + seconds
        return total

    def _route(self, request: PendingRequest) -> None:
        made = sum(tokens for _, tokens in request.segments)
        tokens = request.prompt + made
        home = self._router.home(request.session)
        name = self._router.choose(request.session, tokens, request.group)
        if home is not None and home != name:
            self._let_go(home, request.session)
        if name is None:
            request.replica = ""
            self._homeless.append(request)
            return
        replica = self._replicas[name]
        before = replica.router.home(request.session)
        unit = int(replica.router.choose(request.session, tokens, request.group) or 0)
        if before is not None and int(before) != unit:
            replica.units[int(before)].release(request.session, self._loop.now)
            self._arm(name, int(before))
        request.replica, request.unit = name, unit
        self.prompt_tokens += tokens
        accelerator = replica.units[unit]
        output = max(1, request.output - made)
        accelerator.submit(request.id, request.session, tokens, output, self._loop.now, group=request.group)
        self._arm(name, unit)

    def _arm(self, name: str, index: int) -> None:
        """After anything that may have changed when an accelerator has something to tell."""
        replica = self._replicas[name]
        unit = replica.units[index]
        if unit.has_requests != replica.busy[index]:
            replica.busy[index] = unit.has_requests
            self._set_busy(self._busy + (1 if unit.has_requests else -1))
        at = unit.next_event()
        if at != replica.armed[index]:
            replica.armed[index] = at
            if at is not None:
                self._loop.at(at, lambda: self._due(replica, name, index, at))

    def _due(self, replica: Replica, name: str, index: int, at: float) -> None:
        if self._replicas.get(name) is not replica or replica.armed[index] != at:
            return
        replica.armed[index] = None
        finished = replica.units[index].advance(self._loop.now)
        self._arm(name, index)
        for completion in finished:
            self._finish(completion)

    def _finish(self, completion: Completion) -> None:
        request = self._requests.pop(completion.request_id, None)
        if request is None:
            return
        self.cached_tokens += completion.cached_tokens
        if request.replica in self._replicas:
            self._replicas[request.replica].router.finished(str(request.unit))
        self._router.finished(request.replica)
        merge(request.segments, completion.segments)
        request.done(request.segments)

    def _set_busy(self, busy: int) -> None:
        self._busy = busy
        self._on_busy(busy)
