"""How promptly the processes of a run act: histograms of delays, counters, and the file each actor keeps them in.

Whoever acts observes (``process_vitals().observe("submit", seconds)``); the actor's shell writes what has come together every
few seconds to ``RUN/vitals/ACTOR.jsonl``. `read_vitals` adds up any window of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

import msgspec

LOOP_LAG = "loop_lag"
"""How late the event loop was."""
SUBMIT = "submit"
"""From an episode's wish to generate until the call to its engine leaves."""
DISPATCH = "dispatch"
"""From the opening of a group until an episode of it wants its first generation (its environment started in between)."""
TURNS = "turns"
"""Counter: generations that came back."""

LEAST_S = 1e-5
RATIO = 1.1
"""Buckets grow by this factor: a quantile is right within 10 %."""


class Histogram:
    """Counts of delays in buckets of equal ratio.

    >>> histogram = Histogram()
    >>> for delay in (0.001, 0.002, 0.1): histogram.add(delay)
    >>> histogram.count, 0.1 <= histogram.quantile(1.0) < 0.11
    (3, True)
    """

    def __init__(self, counts: dict[int, int] | None = None) -> None:
        self.counts = counts if counts is not None else {}

    @property
    def count(self) -> int:
        """Delays seen."""
        return sum(self.counts.values())

    def add(self, seconds: float) -> None:
        """One more delay; what is shorter than 10 microseconds (or negative) counts as that."""
        bucket = math.ceil(math.log(seconds / LEAST_S) / math.log(RATIO)) if seconds > LEAST_S else 0
        self.counts[bucket] = self.counts.get(bucket, 0) + 1

    def merge(self, other: Histogram) -> None:
        """Add the delays of ``other``."""
        for bucket, count in other.counts.items():
            self.counts[bucket] = self.counts.get(bucket, 0) + count

    def quantile(self, share: float) -> float:
        """Seconds that at least ``share`` of the delays do not exceed (the upper end of their bucket); nan without any."""
        wanted, seen = share * self.count, 0
        for bucket in sorted(self.counts):
            seen += self.counts[bucket]
            if seen >= wanted:
                return float(LEAST_S * RATIO**bucket)
        return math.nan


class VitalsLine(msgspec.Struct, frozen=True, kw_only=True):
    """What an actor saw between two times (Unix seconds)."""

    since: float
    until: float
    delays: dict[str, dict[int, int]]
    counters: dict[str, int]


class Vitals:
    """What has come together since the last `take`."""

    def __init__(self, now: float) -> None:
        self._since = now
        self._delays: dict[str, Histogram] = {}
        self._counters: dict[str, int] = {}

    def observe(self, name: str, seconds: float) -> None:
        """One delay of the kind ``name``."""
        histogram = self._delays.get(name)
        if histogram is None:
            histogram = self._delays[name] = Histogram()
        histogram.add(seconds)

    def count(self, name: str, more: int = 1) -> None:
        """Raise a counter."""
        self._counters[name] = self._counters.get(name, 0) + more

    def take(self, now: float) -> VitalsLine:
        """Everything since the last time, as a line of the file; begins anew."""
        delays = {name: histogram.counts for name, histogram in self._delays.items()}
        line = VitalsLine(since=self._since, until=now, delays=delays, counters=self._counters)
        self._since, self._delays, self._counters = now, {}, {}
        return line


class ActorVitals:
    """The sum over a window."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.delays: dict[str, Histogram] = {}
        self.counters: dict[str, int] = {}

    def add(self, line: VitalsLine) -> None:
        self.seconds += line.until - line.since
        for name, counts in line.delays.items():
            self.delays.setdefault(name, Histogram()).merge(Histogram(counts))
        for name, count in line.counters.items():
            self.counters[name] = self.counters.get(name, 0) + count


def read_vitals(directory: Path, since: float = 0.0, until: float = math.inf) -> dict[str, ActorVitals]:
    """By actor: the sum of all lines that lie in the window. A line that was cut off is left out."""
    return {path.stem: _sum(_lines(path), since, until) for path in sorted(directory.glob("*.jsonl"))}


def _sum(lines: Iterable[VitalsLine], since: float, until: float) -> ActorVitals:
    found = ActorVitals()
    for line in lines:
        if since <= line.since and line.until <= until:
            found.add(line)
    return found


def _lines(path: Path) -> Iterable[VitalsLine]:
    for line in path.read_bytes().splitlines():
        try:
            yield msgspec.json.decode(line, type=VitalsLine)
        except msgspec.DecodeError:  # torn by a kill -9
            continue


_vitals = Vitals(0.0)


def process_vitals() -> Vitals:
    """The vitals of this process."""
    return _vitals
