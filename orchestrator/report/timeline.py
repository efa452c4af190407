"""The spans of a run's actors, put into a grid that can be drawn: lanes by stretches of time, each with its causes. Pure."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from experience.accounting import Cause, Span

CAUSES = tuple(Cause)
ROLES = ("engine", "learner", "worker", "environment", "reward", "queue", "controller")
"""The order in which lanes are shown."""

BINS = 160
MAX_LANES_OF_A_ROLE = 8
"""A role with more lanes gets one row for all of them, and rows for the first few."""

SHOWN_OF_MANY = 4
GAP_S = 5.0
"""A longer stretch without any span (between a kill and the next start) is cut out of the time axis."""


@dataclass(frozen=True)
class Row:
    """One row of the picture: a lane, or the mean of all lanes of a role."""

    name: str
    shares: npt.NDArray[np.float64]
    """Bins x causes: the part of the bin's seconds with that cause."""


@dataclass(frozen=True)
class Timeline:
    """``edges``: seconds on the time axis, from 0, one more than there are bins. ``cuts``: where gaps were cut out, and
    how long they were (seconds)."""

    rows: list[Row]
    edges: npt.NDArray[np.float64]
    cuts: list[tuple[float, float]]
    seconds: dict[str, dict[Cause, float]]
    """Role -> cause -> seconds of all its lanes."""
    lanes: dict[str, int]
    """Role -> how many lanes it has."""


def role_of(lane: str) -> str:
    """``engine-0.3`` is of the role ``engine``."""
    return re.split(r"[-.\d]", lane, maxsplit=1)[0]


def make_timeline(spans: Sequence[Span], *, bins: int = BINS) -> Timeline | None:
    """Put spans into ``bins`` equal stretches of the time in which anything was recorded; None without spans."""
    spans = [span for span in spans if span.ended_at > span.began_at]
    if not spans:
        return None
    clock = _Clock(spans)
    edges = np.linspace(0.0, clock.length, bins + 1)
    lanes: dict[str, npt.NDArray[np.float64]] = {}
    seconds: dict[str, dict[Cause, float]] = {}
    for span in spans:
        grid = lanes.setdefault(span.lane, np.zeros((bins, len(CAUSES))))
        began, ended = clock.at(span.began_at), clock.at(span.ended_at)
        _spread(grid[:, CAUSES.index(span.cause)], began, ended, clock.length / bins)
        totals = seconds.setdefault(role_of(span.lane), {})
        totals[span.cause] = totals.get(span.cause, 0.0) + span.ended_at - span.began_at
    for grid in lanes.values():
        # A lane is one cause at a time; rounding and a restarted actor's overlap must not fill more than the bin.
        whole = np.maximum(grid.sum(axis=1, keepdims=True), clock.length / bins)
        grid /= whole
    seconds = {role: seconds[role] for role in sorted(seconds, key=place_of)}
    counts = {role: sum(role_of(lane) == role for lane in lanes) for role in seconds}
    return Timeline(_rows(lanes, counts), edges, clock.cuts, seconds, counts)


class _Clock:
    """Unix seconds to seconds on the axis, long gaps cut out."""

    def __init__(self, spans: Sequence[Span]) -> None:
        self.cuts: list[tuple[float, float]] = []
        self._starts: list[float] = []
        self._offsets: list[float] = []
        reached, removed = None, min(span.began_at for span in spans)
        origin = removed
        for span in sorted(spans, key=lambda span: span.began_at):
            if reached is not None and span.began_at - reached > GAP_S:
                self.cuts.append((reached - removed, span.began_at - reached))
                removed += span.began_at - reached
            if reached is None or removed != self._offsets[-1]:
                self._starts.append(span.began_at if reached is not None else origin)
                self._offsets.append(removed)
            reached = span.ended_at if reached is None else max(reached, span.ended_at)
        assert reached is not None
        self.length = reached - removed

    def at(self, time: float) -> float:
        index = max(0, int(np.searchsorted(self._starts, time, side="right")) - 1)
        return time - self._offsets[index]


def _spread(column: npt.NDArray[np.float64], began: float, ended: float, width: float) -> None:
    """Add the seconds from ``began`` to ``ended`` to the bins of ``width`` seconds that they fall into."""
    last = len(column) - 1
    first_bin, last_bin = min(int(began / width), last), min(int(ended / width), last)
    if first_bin == last_bin:
        column[first_bin] += ended - began
        return
    column[first_bin] += (first_bin + 1) * width - began
    column[first_bin + 1 : last_bin] += width
    column[last_bin] += ended - last_bin * width


def _rows(lanes: dict[str, npt.NDArray[np.float64]], counts: dict[str, int]) -> list[Row]:
    rows = []
    for role in counts:
        names = sorted((lane for lane in lanes if role_of(lane) == role), key=_natural)
        if len(names) > MAX_LANES_OF_A_ROLE:
            mean = np.mean([lanes[name] for name in names], axis=0)
            rows.append(Row(f"{role} (mean of {len(names)})", mean))
            names = names[:SHOWN_OF_MANY]
        rows += [Row(name, lanes[name]) for name in names]
    return rows


def place_of(role: str) -> tuple[int, str]:
    """Sorts roles in the order in which they are shown."""
    return (ROLES.index(role) if role in ROLES else len(ROLES), role)


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts ``engine-10`` behind ``engine-9``."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
