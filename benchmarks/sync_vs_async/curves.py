"""Reward against wall-clock of a run that trains for real, and when one run reaches what another one ended with. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

SMOOTH = 10
"""Steps whose rewards are averaged: one of 128 episodes has a standard error of three points."""


@dataclass(frozen=True)
class Curve:
    """Mean reward of the episodes of each step by seconds of training; start-up is left out."""

    seconds: list[float]
    steps: list[int]
    reward: list[float]

    def smoothed(self) -> list[float]:
        """Each point the mean of itself and up to ``SMOOTH - 1`` before it."""
        return [_mean(self.reward[max(0, i + 1 - SMOOTH) : i + 1]) for i in range(len(self.reward))]

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

    Raises ValueError when no step has a reward.
    """
    steps = sorted((line for line in lines if "time/step_s" in line), key=lambda line: int(line["step"]))
    if not any("reward/mean" in line for line in steps):
        raise ValueError(f"{len(steps)} steps, none of them with a reward: at least one makes a curve")
    ended = {int(line["step"]): float(line["time"]) for line in steps}
    origin = float(steps[0]["time"]) - float(steps[0]["time/step_s"])
    pauses = {
        int(line["step"]): max(0.0, float(line["time"]) - ended.get(int(line["step"]), origin))
        for line in lines
        if evaluation_pauses and "eval/success" in line
    }
    curve = Curve([], [], [])
    for line in (line for line in steps if "reward/mean" in line):
        number = int(line["step"])
        paused = sum(seconds for step, seconds in pauses.items() if step < number)
        curve.seconds.append(max(0.0, float(line["time"]) - origin - paused))
        curve.steps.append(number)
        curve.reward.append(float(line["reward/mean"]))
    return curve


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
            name: {"seconds": curve.seconds, "steps": curve.steps, "reward": curve.reward}
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
