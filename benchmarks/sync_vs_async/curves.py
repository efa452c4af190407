"""Reward against wall-clock of a run that trains for real, and when one run reaches what another one ended with. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

SMOOTH = 3
"""Evaluations that are averaged: one of 200 tasks has a standard error of three points."""


@dataclass(frozen=True)
class Curve:
    """Held-out success by seconds of training, start-up and (where training waits for them) evaluations left out."""

    seconds: list[float]
    steps: list[int]
    success: list[float]

    def smoothed(self) -> list[float]:
        """Each point the mean of itself and up to ``SMOOTH - 1`` before it."""
        return [_mean(self.success[max(0, i + 1 - SMOOTH) : i + 1]) for i in range(len(self.success))]

    @property
    def final(self) -> float:
        """The last smoothed value."""
        return self.smoothed()[-1]

    def reaches(self, level: float) -> float | None:
        """Seconds after which the smoothed curve is at ``level``, straight lines between its points; None: never."""
        values = self.smoothed()
        for index, value in enumerate(values):
            if value < level:
                continue
            if index == 0:
                return self.seconds[0]
            share = (level - values[index - 1]) / (value - values[index - 1])
            return self.seconds[index - 1] + share * (self.seconds[index] - self.seconds[index - 1])
        return None


def curve_of(lines: Sequence[Mapping[str, Any]], *, evaluation_pauses: bool) -> Curve:
    """The curve in the lines of a ``metrics.jsonl``.

    The clock starts with the learner's first step. With ``evaluation_pauses`` (``mode: sync``, where no episode starts
    during an evaluation) the time from a version's step to its evaluation's result is left out; otherwise training goes on
    meanwhile, more slowly, and that counts.

    Raises ValueError when there is no step or no evaluation.
    """
    steps = {int(line["step"]): line for line in lines if "time/step_s" in line}
    evaluations = sorted((line for line in lines if "eval/success" in line), key=lambda line: int(line["step"]))
    if not steps or not evaluations:
        raise ValueError(f"{len(steps)} steps and {len(evaluations)} evaluations: at least one of each makes a curve")
    first = steps[min(steps)]
    origin = float(first["time"]) - float(first["time/step_s"])
    seconds, numbers, success, paused = [], [], [], 0.0
    for line in evaluations:
        number = int(line["step"])
        at = origin if number < min(steps) else float(steps[number]["time"])
        seconds.append(max(0.0, at - origin - paused))
        numbers.append(number)
        success.append(float(line["eval/success"]))
        if evaluation_pauses:
            paused += max(0.0, float(line["time"]) - at)
    return Curve(seconds, numbers, success)


@dataclass(frozen=True)
class Race:
    """One seed: how much of the synchronous run's time the asynchronous one needs to be as good as that ended."""

    seed: int
    sync: Curve
    asynchronous: Curve

    @property
    def level(self) -> float:
        """What the synchronous run ended with."""
        return self.sync.final

    @property
    def ratio(self) -> float | None:
        """Asynchronous over synchronous seconds; None when the level was never reached."""
        reached = self.asynchronous.reaches(self.level)
        return None if reached is None else reached / self.sync.seconds[-1]

    def to_dict(self) -> dict[str, Any]:
        curves = {
            name: {"seconds": curve.seconds, "steps": curve.steps, "success": curve.success}
            for name, curve in (("sync", self.sync), ("async", self.asynchronous))
        }
        return {"seed": self.seed, "level": self.level, "ratio": self.ratio, "curves": curves}


def median_ratio(races: Sequence[Race]) -> float | None:
    """The median over the seeds, a seed that never got there counting as the worst; None when that is the median."""
    ratios = sorted(race.ratio if race.ratio is not None else float("inf") for race in races)
    middle = len(ratios) // 2
    value = ratios[middle] if len(ratios) % 2 else (ratios[middle - 1] + ratios[middle]) / 2
    return None if value == float("inf") else value


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
