"""Splits the seconds in which an engine or the learner had no work by what the rest of the run was doing meanwhile.

An actor knows *that* it had nothing to do; why is known elsewhere. For each window of time (half a second or so) there are
exact slot-seconds of the workers' episodes by state, exact seconds of every lane by cause, and the exact seconds in which
no episode was live. What overlapped within a window is not known; the rules below take the overlaps that must have been,
and share the rest out in proportion.

=======================  ======================================================================================
idle of an engine        becomes
=======================  ======================================================================================
no episode live          pacing while the learner trains, save while it saves, weight stall while a version is
                         on its way, else idle (control plane)
free slots               straggler while the learner waits (all that may start has started), pacing while it works
episodes elsewhere       environment, reward, queue full (delivering), in proportion to their slot-seconds
episodes generate        other phase, if prefill and decode are split, in proportion to their slot-seconds
a worker is gone         failure, in proportion to its slots
=======================  ======================================================================================

The learner's wait for groups: failure and start-up for the share of engine seconds that are such; weight stall, or idle
(nothing was dispatched), while no episode is live; straggler for the share of slots that are free; of the rest what
generates stays *queue empty* (generation is what takes long), what waits elsewhere has that cause.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from experience.accounting import Cause
from experience.slots import FREE, Doing

PEAK_HALF_LIFE_S = 30.0
"""After that time without them, slots that were in use count half as slots that could be."""

NO_SLOTS = 1e-9
"""Slot-seconds that are none."""

ELSEWHERE = {
    Doing.ENVIRONMENT: Cause.ENVIRONMENT,
    Doing.REWARD: Cause.REWARD,
    Doing.DELIVERING: Cause.QUEUE_FULL,
}


@dataclass(frozen=True)
class Window:
    """What the run did in ``seconds`` seconds."""

    seconds: float
    slots: Mapping[str, float] = field(default_factory=dict)
    """Slot-seconds of all workers by `Doing`, and ``free``."""
    empty_s: float = 0.0
    """Seconds in which no worker had a live episode."""
    missing_slots: float = 0.0
    """Slot-seconds of workers that were not there."""
    learner: Mapping[Cause, float] = field(default_factory=dict)
    publishing_s: float = 0.0
    """Seconds in which a version was on its way to the engines."""
    engines_lost: Mapping[Cause, float] = field(default_factory=dict)
    """Share of the engines' seconds that were failure or start-up."""


class Attribution:
    """Keeps what spans windows: how many slots the run uses at its busiest. ``split``: engines prefill or decode."""

    def __init__(self, split: bool = False) -> None:
        self._split = split
        self._peak = 0.0
        self.starved_s = 0.0
        """Seconds in which the learner waited although nothing kept the next group from starting."""

    def begin(self, window: Window) -> None:
        """``window`` is the one that `engine_idle` and `learner_wait` are asked about next."""
        if window.seconds <= 0:
            return
        live = sum(window.slots.get(doing.value, 0.0) for doing in Doing) / window.seconds
        self._peak = max(live, self._peak * math.pow(0.5, window.seconds / PEAK_HALF_LIFE_S))

    def engine_idle(self, idle_s: float, window: Window) -> dict[Cause, float]:
        """Why an engine lane was idle for ``idle_s`` seconds of the window; the values add up to ``idle_s``."""
        left, causes = _Purse(min(idle_s, window.empty_s)), {}
        learner = window.learner
        causes[Cause.PACING] = left.take(learner.get(Cause.TRAIN, 0.0))
        causes[Cause.SAVE] = left.take(learner.get(Cause.SAVE, 0.0))
        causes[Cause.WEIGHT_STALL] = left.take(window.publishing_s)
        causes[Cause.IDLE] = left.take(math.inf)
        rest = idle_s - min(idle_s, window.empty_s)
        weights = self._elsewhere(window)
        free = self._free(window)
        waiting = _share(learner.get(Cause.QUEUE_EMPTY, 0.0), window.seconds)
        weights[Cause.STRAGGLER] = free * waiting
        weights[Cause.PACING] = free * (1.0 - waiting)
        weights[Cause.FAILURE] = window.missing_slots
        if self._split:
            weights[Cause.OTHER_PHASE] = window.slots.get(Doing.GENERATING.value, 0.0)
        return _without_nothing(_add(causes, _proportion(rest, weights, Cause.IDLE)))

    def learner_wait(self, wait_s: float, window: Window) -> dict[Cause, float]:
        """Why the learner waited for ``wait_s`` seconds of the window; the values add up to ``wait_s``."""
        causes = {cause: wait_s * share for cause, share in window.engines_lost.items()}
        left = wait_s - sum(causes.values())
        empty = max(0.0, min(left, window.empty_s + min(wait_s, window.seconds) - window.seconds))
        stalled = min(empty, window.publishing_s)
        self.starved_s += empty - stalled
        _add(causes, {Cause.WEIGHT_STALL: stalled, Cause.IDLE: empty - stalled})
        weights = self._elsewhere(window)
        weights[Cause.QUEUE_EMPTY] = window.slots.get(Doing.GENERATING.value, 0.0)
        live = sum(weights.values())
        if live > 0:
            weights[Cause.STRAGGLER] = self._free(window)
        weights[Cause.FAILURE] = window.missing_slots
        return _without_nothing(_add(causes, _proportion(left - empty, weights, Cause.IDLE)))

    def _free(self, window: Window) -> float:
        """Slot-seconds that the run could have used: free, and not more than it uses at its busiest."""
        live = sum(window.slots.get(doing.value, 0.0) for doing in Doing)
        return max(0.0, min(window.slots.get(FREE, 0.0), self._peak * window.seconds - live))

    def _elsewhere(self, window: Window) -> dict[Cause, float]:
        return {cause: window.slots.get(doing.value, 0.0) for doing, cause in ELSEWHERE.items()}


@dataclass
class _Purse:
    """Seconds that can be given out once."""

    left: float

    def take(self, wanted: float) -> float:
        taken = min(self.left, wanted)
        self.left -= taken
        return taken


def _share(part: float, whole: float) -> float:
    return min(1.0, part / whole) if whole > 0 else 0.0


def _proportion(seconds: float, weights: Mapping[Cause, float], otherwise: Cause) -> dict[Cause, float]:
    total = sum(weights.values())
    if total < NO_SLOTS:
        return {otherwise: seconds}
    return {cause: seconds * weight / total for cause, weight in weights.items()}


def _add(into: dict[Cause, float], other: Mapping[Cause, float]) -> dict[Cause, float]:
    for cause, seconds in other.items():
        into[cause] = into.get(cause, 0.0) + seconds
    return into


def _without_nothing(causes: dict[Cause, float]) -> dict[Cause, float]:
    return {cause: seconds for cause, seconds in causes.items() if seconds > 0}
