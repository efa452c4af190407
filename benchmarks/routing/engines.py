"""The engines of the closed loop: ideal ones, that only take their time, and modelled accelerators with their KV."""

from __future__ import annotations

import heapq
from typing import NamedTuple, Protocol

from env_pool.workloads.scripts import REFERENCE_TOKENS_PER_S
from rollout_workers.engines.protocol import EngineLoad
from rollout_workers.engines.synthetic.accelerator import Accelerator
from rollout_workers.engines.synthetic.cost_model import CostModel


class Ask(NamedTuple):
    """One request: ``output`` tokens after a context of ``prompt`` tokens."""

    id: int
    session: str
    group: str
    prompt: int
    output: int


class Answer(NamedTuple):
    id: int
    cached: int | None
    """Prompt tokens that were there already; None where that is not modelled."""


class Engines(Protocol):
    """Engines by index. Time is an argument that never runs backwards."""

    def ask(self, engine: int, ask: Ask, now: float) -> None: ...

    def release(self, engine: int, session: str, now: float) -> None: ...

    def next_event(self) -> float | None: ...

    def advance(self, now: float) -> list[Answer]: ...

    def load(self, engine: int, sessions: int, requests: int) -> EngineLoad:
        """What the engine tells of itself, given what it has."""
        ...


class IdealEngines:
    """Every sequence runs at `REFERENCE_TOKENS_PER_S`, whatever else does; prompts take no time; KV has no end."""

    def __init__(self) -> None:
        self._ends: list[tuple[float, int]] = []

    def ask(self, engine: int, ask: Ask, now: float) -> None:
        heapq.heappush(self._ends, (now + ask.output / REFERENCE_TOKENS_PER_S, ask.id))

    def release(self, engine: int, session: str, now: float) -> None:
        """There is KV for all."""

    def next_event(self) -> float | None:
        return self._ends[0][0] if self._ends else None

    def advance(self, now: float) -> list[Answer]:
        answers = []
        while self._ends and self._ends[0][0] <= now:
            answers.append(Answer(heapq.heappop(self._ends)[1], None))
        return answers

    def load(self, engine: int, sessions: int, requests: int) -> EngineLoad:
        return EngineLoad(sessions=sessions, requests=requests)


class ModelledEngines:
    """The synthetic engine's accelerators, one an engine."""

    def __init__(self, cost: CostModel, count: int) -> None:
        self.cost = cost
        self.units = [Accelerator(cost, 0, 0.0) for _ in range(count)]

    def ask(self, engine: int, ask: Ask, now: float) -> None:
        self.units[engine].submit(str(ask.id), ask.session, ask.prompt, ask.output, now, group=ask.group)

    def release(self, engine: int, session: str, now: float) -> None:
        self.units[engine].release(session, now)

    def next_event(self) -> float | None:
        return min((at for unit in self.units if (at := unit.next_event()) is not None), default=None)

    def advance(self, now: float) -> list[Answer]:
        answers = []
        for unit in self.units:
            at = unit.next_event()
            if at is not None and at <= now:
                answers += [Answer(int(done.request_id), done.cached_tokens) for done in unit.advance(now)]
        return answers

    def load(self, engine: int, sessions: int, requests: int) -> EngineLoad:
        unit = self.units[engine]
        return EngineLoad(
            sessions=sessions,
            requests=requests,
            waiting=unit.waiting,
            kv_used=unit.kv.used / self.cost.kv_tokens,
            lost=unit.kv.evicted_sessions,
            finished=unit.finished_requests,
        )

    @property
    def generated_tokens(self) -> int:
        return sum(unit.generated_tokens for unit in self.units)

    @property
    def prefilled_tokens(self) -> int:
        return sum(unit.prefilled_tokens for unit in self.units)

    @property
    def evicted_sessions(self) -> int:
        return sum(unit.kv.evicted_sessions for unit in self.units)
