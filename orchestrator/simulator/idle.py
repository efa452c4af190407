"""Why accelerators stood still: every idle second is charged to one reason, by what the run looked like then."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from experience.accounting import Cause
from orchestrator.simulator.events import EventLoop
from orchestrator.simulator.learner import Phase


class Situation(NamedTuple):
    """The run at one moment."""

    learner: Phase
    time_shared: bool
    publishing: bool
    missing_engines: int
    running: int
    """Episodes that hold a slot."""
    in_environment: int
    refused: int
    """Episodes that the full queue does not take."""
    queued: int
    """Episodes that wait for a slot."""
    idle_share: float
    """Of the engines' accelerators."""


def rollout_cause(now: Situation) -> Cause:
    """Why an accelerator of the engines has no request at this moment."""
    if now.time_shared and now.learner is Phase.TRAINING:
        return Cause.TRAIN
    if now.missing_engines:
        return Cause.FAILURE
    if now.running == 0:
        return Cause.WEIGHT_STALL if now.publishing else Cause.PACING
    if now.refused * 2 > now.running:
        return Cause.QUEUE_FULL
    if now.queued or now.in_environment * 2 > now.running:
        return Cause.ENVIRONMENT
    return Cause.STRAGGLER if now.learner is Phase.WAITING else Cause.PACING


def learner_cause(now: Situation) -> Cause:
    """What the learner's accelerators do."""
    match now.learner:
        case Phase.TRAINING:
            return Cause.TRAIN
        case Phase.PUBLISHING:
            return Cause.WEIGHT_STALL
        case _:
            return Cause.STRAGGLER if now.idle_share > 0.5 and not now.queued else Cause.QUEUE_EMPTY


class IdleAccount:
    """Integrates idle accelerators over time. Call `settle` before anything changes that a `Situation` tells."""

    def __init__(self, accelerators: int, situation: Callable[[float], Situation], loop: EventLoop) -> None:
        self._accelerators = accelerators
        self._situation, self._loop = situation, loop
        self._busy = 0
        self._since = 0.0
        self._idle: dict[Cause, float] = {}
        self.learner: dict[Cause, float] = {}
        """Seconds (not accelerator-seconds) of the learner."""

    def busy(self, accelerators: int) -> None:
        """So many accelerators have requests from now on."""
        self.settle()
        self._busy = accelerators

    def settle(self) -> None:
        """Charge the time since the last call."""
        elapsed = self._loop.now - self._since
        if elapsed <= 0:
            return
        self._since = self._loop.now
        idle = self._accelerators - self._busy
        now = self._situation(idle / self._accelerators)
        rollout, learner = rollout_cause(now), learner_cause(now)
        self._idle[rollout] = self._idle.get(rollout, 0.0) + elapsed * idle
        self.learner[learner] = self.learner.get(learner, 0.0) + elapsed

    def by_cause(self, seconds: Mapping[Cause, float]) -> dict[Cause, float]:
        """The engines' own accelerator-seconds with the idle ones broken down by reason."""
        self.settle()
        total: dict[Cause, float] = {cause: value for cause, value in seconds.items() if cause is not Cause.IDLE}
        for cause, value in self._idle.items():
            total[cause] = total.get(cause, 0.0) + value
        return total
