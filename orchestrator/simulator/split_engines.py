"""Simulated engines of which some prefill and others decode: `PairChooser` and `RoleController` on the simulated clock.

A request goes the way of a real one: the prefill engine computes what it lacks of the prompt and sends what the decode engine
lacks, piece by piece while it computes; the decode engine then makes the tokens. An engine that has changed its role ends
the requests that it has, beside its new work.

Not modelled: a decode engine without room lets the request wait and does not refuse the KV; pieces do not slow computing down.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from experience.accounting import Cause
from orchestrator.simulator.cluster import Cluster
from orchestrator.simulator.engines import Done, Engines, PendingRequest, Replica
from orchestrator.simulator.entries import merge
from orchestrator.simulator.events import EventLoop
from rollout_workers.disaggregation.pair_chooser import PairChooser
from rollout_workers.disaggregation.roles import Flip, RoleController, RoleLoad
from rollout_workers.engines.protocol import EngineRole
from rollout_workers.engines.synthetic.accelerator import Accelerator, Completion
from rollout_workers.engines.synthetic.recorder import Recorder

TICKS = 10
"""Looks at the loads in a window of the role policy."""


@dataclass(slots=True, kw_only=True)
class _Request(PendingRequest):
    asked_at: float
    """Since when it waits for a token."""
    begun: bool = False
    """It has a token."""
    trip: int = 0
    """How often it was sent on its way."""
    prefilling: bool = False
    """A prefill engine has it."""
    decode: str = ""
    """The engine that decodes it."""
    moving: bool = False
    """Its KV is on its way from the prefill to the decode engine."""
    stale: bool = False
    """That KV is of weights that are gone."""
    cached: int = 0

    @property
    def made(self) -> int:
        """Tokens it has."""
        return sum(tokens for _, tokens in self.segments)


@dataclass(frozen=True)
class _Suspended:
    """A session between two turns."""

    engine: str
    tokens: int


@dataclass
class SplitCounts:
    """What happened between the engines. Tokens are carried ones."""

    handed_over: int = 0
    """Requests whose KV moved."""
    moved_tokens: int = 0
    exposed_s: float = 0.0
    """Seconds that requests waited for KV after their prompt was computed."""
    redone: int = 0
    """Hand-offs that new weights made useless."""
    flips: list[tuple[float, Flip]] = field(default_factory=list)
    refusals: list[tuple[float, str]] = field(default_factory=list)
    """Flips that the KV of suspended sessions spoke against: the first of each reason."""


class SplitEngines(Engines):
    """The face of `Engines` over engines with roles."""

    def __init__(
        self, cluster: Cluster, loop: EventLoop, on_busy: Callable[[int], None], recorder: Recorder | None = None
    ) -> None:
        super().__init__(cluster, loop, on_busy, recorder or Recorder())
        assert self.recorder is not None
        self.prefill_recorder = self.recorder.with_own_use()
        """Of the engines that prefill; times to tokens are those of `recorder`."""
        self.counts = SplitCounts()
        self._chooser = PairChooser(cluster.local_tokens)
        self._links: dict[tuple[str, int], float] = {}
        self._suspended: dict[str, _Suspended] = {}
        self._roles = RoleController(cluster.role_policy) if cluster.role_policy is not None else None
        self._ticking = False
        self._complete = False
        """All engines of the beginning are there: before, a request would meet roles that nobody has taken yet."""
        self._told = (0.0, 0.0, 0.0, 0.0)
        self._handed: dict[str, float] = {}
        """Tokens that decode engines lacked and got, by the engine that sent them."""

    def join(self, name: str, version: int) -> None:
        index = int(name.removeprefix("engine-").partition(".")[0])
        self._chooser.add(name, self._cluster.roles[index])
        self._complete = self._complete or len(self._replicas) + 1 >= len(self._cluster.roles)
        super().join(name, version)
        self._set_recorder(name)

    def kill(self, name: str) -> None:
        self._chooser.remove(name)
        self._suspended = {session: one for session, one in self._suspended.items() if one.engine != name}
        super().kill(name)
        for request in list(self._requests.values()):
            assert isinstance(request, _Request)
            if request.moving and request.decode == name:
                self.continued += 1
                self._route(request)

    def generate(self, request_id: str, session: str, prompt: int, output: int, done: Done, group: str = "") -> None:
        request = _Request(request_id, session, prompt, output, done, group, asked_at=self._loop.now)
        self._requests[request_id] = request
        self._suspended.pop(session, None)
        self._route(request)
        if self._roles is not None and not self._ticking:
            self._ticking = True
            self._loop.after(self._roles.policy.window_s / TICKS, self._tick)

    def abort(self, request_id: str) -> None:
        request = self._requests.get(request_id)
        if request is None:
            return
        assert isinstance(request, _Request)
        self._chooser.ended(request.session)
        if request.moving:
            del self._requests[request_id]
        else:
            super().abort(request_id)

    def release(self, session: str) -> None:
        self._suspended.pop(session, None)
        for name in self._chooser.release_all(session):
            self._drop(name, session)

    def _drop(self, name: str, session: str) -> None:
        """An engine needs the KV of a session no more."""
        replica = self._replicas[name]
        home = replica.router.release(session)
        if home is not None:
            replica.units[int(home)].release(session, self._loop.now)
            self._arm(name, int(home))

    def commit(self, name: str, version: int, keep_kv: bool) -> None:
        super().commit(name, version, keep_kv)
        if keep_kv:
            return
        self._chooser.dropped_kv(name)
        for request in self._requests.values():
            assert isinstance(request, _Request)
            if request.moving and name == request.decode:
                request.stale = True

    def recorders(self) -> tuple[Recorder, ...]:
        """Of the engines that decode, and of those that prefill, as they stand now."""
        return *super().recorders(), self.prefill_recorder.copy()

    # The way of a request

    def _route(self, request: PendingRequest) -> None:
        assert isinstance(request, _Request)
        context, session = request.prompt + request.made, request.session
        if request.made:
            request.begun, request.asked_at = True, self._loop.now
        request.moving = request.stale = request.prefilling = False
        request.trip += 1
        if not self._complete:
            request.replica = ""
            self._homeless.append(request)
            return
        home = self._chooser.home(session)
        first, decode = self._chooser.choose(session, context, request.group), self._chooser.decode_of(session)
        if first is None or decode is None:
            request.replica = ""
            self._homeless.append(request)
            return
        if home is not None and home != decode and home in self._replicas:
            self._drop(home, session)
            self._chooser.forget_held(session, home)
        self.prompt_tokens += context
        request.decode, request.prefilling = decode, first != decode
        if not request.prefilling:
            self._decode(request, delivered=0)
            return
        unit = self._seat(request, first)
        unit.prefill(request.id, session, context, self._loop.now, request.asked_at, request.begun, request.group)
        self._arm(request.replica, request.unit)

    def _decode(self, request: _Request, delivered: int) -> None:
        made = request.made
        self._seat(request, request.decode).submit(
            request.id,
            request.session,
            request.prompt + made,
            max(1, request.output - made),
            self._loop.now,
            delivered=delivered,
            asked_at=request.asked_at,
            begun=request.begun,
            group=request.group,
        )
        self._arm(request.replica, request.unit)

    def _seat(self, request: _Request, name: str) -> Accelerator:
        """The accelerator of an engine that takes the request."""
        replica = self._replicas[name]
        request.replica, request.unit = name, int(replica.router.choose(request.session) or 0)
        return replica.units[request.unit]

    def _finish(self, completion: Completion) -> None:
        request = self._requests.get(completion.request_id)
        if request is None:
            return
        assert isinstance(request, _Request)
        if request.prefilling:
            self._hand_over(request, completion)
            return
        del self._requests[request.id]
        if request.replica in self._replicas:
            self._replicas[request.replica].router.finished(str(request.unit))
        self.cached_tokens += request.cached + completion.cached_tokens
        merge(request.segments, completion.segments)
        context = request.prompt + request.made
        self._chooser.ended(request.session, context)
        self._suspended[request.session] = _Suspended(request.decode, context)
        request.done(request.segments)

    def _hand_over(self, request: _Request, completion: Completion) -> None:
        """The prompt is computed: the rest of its KV goes to the decode engine, and the request after it."""
        now, name, link = self._loop.now, request.replica, (request.replica, request.unit)
        if name not in self._replicas:
            return  # lost this very moment, and with it the KV: whoever lost it sends the request on
        context, cost = request.prompt + request.made, self._cluster.cost
        self._replicas[name].router.finished(str(request.unit))
        self._chooser.handed_over(request.session, complete=True)
        request.prefilling = False
        request.cached += completion.cached_tokens
        request.begun, request.asked_at = True, now
        if request.decode not in self._replicas:
            self._route(request)
            return
        there = sum(unit.kv.held(request.session) for unit in self._replicas[request.decode].units)
        missing = max(0, context - there)
        computed_s = (context - completion.cached_tokens) / cost.prefill_rate
        last = min(missing, cost.prefill_chunk) if cost.prefill_chunk else missing
        began_at = max(now - computed_s, self._links.get(link, 0.0))
        arrives_at = max(now + last * cost.kv_token_s, began_at + missing * cost.kv_token_s)
        self._links[link] = arrives_at
        self.counts.handed_over += 1
        self.counts.moved_tokens += missing
        self._handed[name] = self._handed.get(name, 0.0) + missing
        self.counts.exposed_s += arrives_at - now
        request.moving, request.replica = True, ""
        trip = request.trip
        self._loop.at(arrives_at, lambda: self._arrived(request, trip))

    def _arrived(self, request: _Request, trip: int) -> None:
        if self._requests.get(request.id) is not request or request.trip != trip:
            return
        if request.stale:
            self.counts.redone += 1
            self._route(request)
            return
        request.moving = False
        self._decode(request, delivered=request.prompt + request.made)

    # Roles

    def role(self, name: str) -> EngineRole:
        """What an engine does now."""
        return self._chooser.role(name) or EngineRole.MIXED

    def _set_recorder(self, name: str) -> None:
        prefills = self.role(name) is EngineRole.PREFILL
        for unit in self._replicas[name].units:
            unit.recorder = self.prefill_recorder if prefills else self.recorder

    def _tick(self) -> None:
        """Look at the loads; as long as there are requests, look again."""
        assert self._roles is not None
        decision = self._roles.observe(self._loads(), self._loop.now)
        for flip in decision.flips:
            self._chooser.set_role(flip.name, flip.to)
            self._set_recorder(flip.name)
            self.counts.flips.append((self._loop.now, flip))
        if decision.refused and not self.counts.refusals:
            self.counts.refusals.append((self._loop.now, decision.refused))
        self._ticking = bool(self._requests)
        if self._ticking:
            self._loop.after(self._roles.policy.window_s / TICKS, self._tick)

    def _loads(self) -> list[RoleLoad]:
        assert self.recorder is not None
        first, inter = self.recorder.first_token, self.recorder.inter_token
        before = self._told
        self._told = (first.count, first.total_s, inter.count, inter.total_s)
        firsts, first_s, inters, inter_s = (now - then for now, then in zip(self._told, before, strict=True))
        return [
            self._load(name, replica, first_s / firsts if firsts else None, inter_s / inters if inters else None)
            for name, replica in self._replicas.items()
        ]

    def _load(self, name: str, replica: Replica, first_s: float | None, inter_s: float | None) -> RoleLoad:
        units, cost = replica.units, self._cluster.cost
        suspended = [(session, one) for session, one in self._suspended.items() if one.engine == name]
        here = sum(min(one.tokens, sum(unit.kv.held(session) for unit in units)) for session, one in suspended)
        return RoleLoad(
            name=name,
            role=self.role(name),
            queued=sum(unit.running + unit.waiting - unit.decoding for unit in units),
            backlog_tokens=sum(unit.backlog_tokens for unit in units),
            prefilled_tokens=sum(unit.prefilled_tokens for unit in units),
            prefill_s=sum(unit.seconds(self._loop.now).get(Cause.PREFILL, 0.0) for unit in units),
            handed_tokens=self._handed.get(name, 0.0),
            local_cost=cost.local_prefill_cost,
            decoding=sum(unit.decoding for unit in units),
            slots=cost.slots * len(units),
            half_concurrency=cost.half_concurrency * len(units),
            generated_tokens=sum(unit.generated_tokens for unit in units),
            finished=sum(unit.finished_requests for unit in units),
            suspended=len(suspended),
            kv_capacity=cost.kv_tokens * len(units),
            kv_running=sum(unit.kv.reserved_tokens for unit in units),
            kv_suspended=sum(unit.kv.idle_tokens for unit in units),
            kv_lost=sum(one.tokens for _, one in suspended) - here,
            first_token_s=first_s,
            inter_token_s=inter_s,
        )
