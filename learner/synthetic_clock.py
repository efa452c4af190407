"""When a modelled learner is done: seconds of training owed on an absolute clock. Pure, also run by the simulator."""

from __future__ import annotations

from dataclasses import dataclass

from learner.synthetic_config import SyntheticLearnerConfig

PREFETCH_S = 0.1
"""Most wall seconds by which work may begin before its groups have arrived.

A learner fetches its next groups while it computes. Here the fetching is real and the computing is modelled at
``time_scale`` times its speed, so what takes real milliseconds would count as modelled seconds. Work never begins before its
data existed.
"""


@dataclass(frozen=True)
class LearnerCost:
    """Seconds of training in the units of the run (wall seconds, carried tokens), over all accelerators together."""

    seconds_per_token: float
    step_overhead_s: float
    switch_s: float
    """Once a step, when the accelerators take turns."""
    time_shared: bool
    """Training starts only when all groups of the step are there: the same accelerators make them."""

    @classmethod
    def from_config(cls, config: SyntheticLearnerConfig, time_shared: bool) -> LearnerCost:
        """The modelled cluster's seconds divided by ``time_scale``, its tokens by ``token_scale``."""
        return cls(
            seconds_per_token=config.seconds_per_token * config.token_scale / config.time_scale / config.accelerators,
            step_overhead_s=config.step_overhead_s / config.time_scale,
            switch_s=config.switch_s / config.time_scale if time_shared else 0.0,
            time_shared=time_shared,
        )


class TrainingClock:
    """Adds up the work of steps. ``busy`` holds the spans in which the accelerators trained, until they are taken.

    >>> clock = TrainingClock(LearnerCost(0.01, 1.0, 0.0, time_shared=False), now=0.0)
    >>> clock.add(100, ready_at=5.0, now=5.0); clock.add(100, ready_at=5.5, now=5.5)
    >>> clock.finish(now=6.0)
    8.0
    >>> clock.take_spans()
    [(5.0, 8.0)]
    """

    def __init__(self, cost: LearnerCost, now: float) -> None:
        self.cost = cost
        self.free_at = now
        """Until then all work that was added is done."""
        self.busy_s = 0.0
        """Seconds of training so far, owed ones included."""
        self._spans: list[tuple[float, float]] = []
        self._held_tokens = 0
        self._arrived_at = now

    def add(self, tokens: int, ready_at: float, now: float) -> None:
        """Groups have arrived: ``tokens`` of trajectories, the last of which were made at ``ready_at``."""
        began_at = max(min(ready_at, now), now - PREFETCH_S)
        self._arrived_at = max(self._arrived_at, began_at)
        if self.cost.time_shared:
            self._held_tokens += tokens
        else:
            self._work(began_at, tokens * self.cost.seconds_per_token)

    def finish(self, now: float) -> float:
        """All groups of the step are there; returns when the step is done."""
        seconds = self.cost.switch_s + self._held_tokens * self.cost.seconds_per_token + self.cost.step_overhead_s
        self._held_tokens = 0
        self._work(max(self._arrived_at, now - PREFETCH_S), seconds)
        return self.free_at

    def take_spans(self) -> list[tuple[float, float]]:
        """(began_at, ended_at) of training since the last call; the last may lie in the future."""
        spans, self._spans = self._spans, []
        return spans

    def _work(self, earliest: float, seconds: float) -> None:
        began_at = max(self.free_at, earliest)
        self.free_at = began_at + seconds
        self.busy_s += seconds
        if seconds <= 0:
            return
        if self._spans and self._spans[-1][1] == began_at:
            self._spans[-1] = (self._spans[-1][0], self.free_at)
        else:
            self._spans.append((began_at, self.free_at))
