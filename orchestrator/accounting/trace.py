"""A run as a Chrome trace (open it in ui.perfetto.dev): lanes, counters, groups, and arrows from dispatch to training.

The format is the JSON one of the Trace Event specification: complete slices (``X``), counters (``C``), flow arrows
(``s``, ``t``, ``f``; an end binds to the slice around it) and names (``M``); times are microseconds since the run began.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from experience.accounting import Span, thin

Event = dict[str, Any]

ROLES = ("controller", "worker", "engine", "environment", "reward", "queue", "learner")
"""Processes of the trace from top to bottom; dispatches and steps are threads of the controller and the learner."""
GROUPS = "groups"
MOST_SLICES = 400_000
"""Lanes become coarser until they have no more slices than this together."""
COLOURS = {
    "decode": "thread_state_running",
    "prefill": "rail_response",
    "train": "thread_state_running",
    "idle": "grey",
    "queue_empty": "terrible",
    "queue_full": "terrible",
    "weight_stall": "bad",
    "failure": "terrible",
    "startup": "startup",
    "save": "rail_load",
}


@dataclass(frozen=True)
class Member:
    """One episode of a group; Unix seconds."""

    episode_id: str
    began_at: float
    ended_at: float


@dataclass(frozen=True)
class GroupPath:
    """A group's way: its episodes, and the metrics step that trained it."""

    group_id: str
    members: tuple[Member, ...]
    step: int | None = None

    @property
    def began_at(self) -> float:
        return min(member.began_at for member in self.members)

    @property
    def ended_at(self) -> float:
        return max(member.ended_at for member in self.members)


@dataclass(frozen=True)
class Step:
    """A learner step; Unix seconds."""

    number: int
    began_at: float
    ended_at: float


@dataclass(frozen=True)
class Counter:
    """A value from ``at`` on."""

    name: str
    at: float
    value: float


@dataclass
class TraceSources:
    """What a trace is made of."""

    spans: Sequence[Span]
    groups: Sequence[GroupPath] = ()
    steps: Sequence[Step] = ()
    counters: Sequence[Counter] = ()
    notes: list[str] = field(default_factory=list)


def build_trace(sources: TraceSources, zero: float, episodes: bool = False) -> dict[str, Any]:
    """The trace as the object that the JSON file holds. ``zero``: Unix seconds of the run's beginning."""
    notes = list(sources.notes)
    lanes = _lanes(sources.spans, notes)
    builder = _Builder(zero)
    for lane, spans in lanes.items():
        process, at = role_of(lane), 0.0
        for span in spans:
            begin, at = max(span.began_at, at), max(span.ended_at, at)  # the file rounds: slices must not overlap
            builder.slice(process, lane, span.cause.value, begin, at, COLOURS.get(span.cause.value))
    for counter in sources.counters:
        builder.counter(counter.name, counter.at, counter.value)
    steps = {step.number: step for step in sources.steps}
    for step in sources.steps:
        builder.slice("learner", "steps", f"step {step.number}", step.began_at, step.ended_at, None)
    _groups(builder, sources.groups, steps, episodes)
    return {
        "traceEvents": builder.events(),
        "displayTimeUnit": "ms",
        "otherData": {"run began (Unix seconds)": zero, "notes": notes},
    }


def role_of(lane: str) -> str:
    """``engine`` for ``engine-0/3``."""
    return lane.partition("-")[0]


def _lanes(spans: Sequence[Span], notes: list[str]) -> dict[str, list[Span]]:
    """Spans by lane, coarser when there are too many."""
    lanes: dict[str, list[Span]] = defaultdict(list)
    for span in spans:
        lanes[span.lane].append(span)
    least_s = 0.0
    while sum(map(len, lanes.values())) > MOST_SLICES and least_s < 3600.0:
        least_s = max(0.02, least_s * 2)
        lanes = defaultdict(list, {lane: thin(spans, least_s) for lane, spans in lanes.items()})
    if least_s:
        notes.append(f"thinned: slices shorter than {least_s:g} s are merged; choose less time with --from and --to")
    return dict(sorted(lanes.items()))


def _groups(builder: _Builder, groups: Sequence[GroupPath], steps: dict[int, Step], episodes: bool) -> None:
    """Dispatches, groups, arrows and, if wanted, episodes."""
    rows, member_rows = _Rows(), _Rows()
    for dispatched_at, together in _dispatches(groups):
        names = [group.group_id for group in together]
        title = names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
        builder.slice("controller", "dispatch", title, dispatched_at, dispatched_at + 2e-4, None, {"groups": names})
        for group in together:
            row = f"row {rows.take(group.began_at, group.ended_at):03d}"
            details = {"episodes": len(group.members), "trained at step": group.step}
            builder.slice(GROUPS, row, group.group_id, group.began_at, group.ended_at, None, details)
            step = steps.get(group.step) if group.step is not None else None
            middle = (group.began_at + group.ended_at) / 2
            if step is not None and middle <= step.ended_at:
                arrive = min(max(group.ended_at, step.began_at), step.ended_at)
                builder.arrow(
                    group.group_id,
                    ("controller", "dispatch", dispatched_at),
                    (GROUPS, row, middle),
                    ("learner", "steps", arrive),
                )
    members = [member for group in groups for member in group.members] if episodes else []
    for member in sorted(members, key=lambda member: member.began_at):
        row = f"row {member_rows.take(member.began_at, member.ended_at):04d}"
        builder.slice("episodes", row, member.episode_id, member.began_at, member.ended_at, None)


def _dispatches(groups: Sequence[GroupPath]) -> Iterable[tuple[float, list[GroupPath]]]:
    """Groups that began within a millisecond were dispatched together."""
    together: list[GroupPath] = []
    for group in sorted(groups, key=lambda group: group.began_at):
        if together and group.began_at - together[0].began_at > 1e-3:
            yield together[0].began_at, together
            together = []
        together.append(group)
    if together:
        yield together[0].began_at, together


class _Rows:
    """Rows in which intervals lie side by side without overlapping; asked in order of their beginning."""

    def __init__(self) -> None:
        self._free: list[int] = []
        self._busy: list[tuple[float, int]] = []
        self._rows = 0

    def take(self, began_at: float, ended_at: float) -> int:
        while self._busy and self._busy[0][0] <= began_at:
            heapq.heappush(self._free, heapq.heappop(self._busy)[1])
        if not self._free:
            heapq.heappush(self._free, self._rows)
            self._rows += 1
        row = heapq.heappop(self._free)
        heapq.heappush(self._busy, (ended_at, row))
        return row


class _Builder:
    """Collects events; gives processes and threads their numbers."""

    def __init__(self, zero: float) -> None:
        self._zero = zero
        self._events: list[Event] = []
        self._threads: dict[tuple[str, str], int] = {}
        self._flows = 0

    def slice(
        self,
        process: str,
        thread: str,
        name: str,
        began_at: float,
        ended_at: float,
        colour: str | None,
        details: dict[str, Any] | None = None,
    ) -> None:
        begin = self._at(began_at)
        event = {
            "ph": "X",
            "name": name,
            "cat": process,
            **self._place(process, thread),
            "ts": begin,
            "dur": round(max(0.0, self._at(ended_at) - begin), 1),
        }
        if colour:
            event["cname"] = colour
        if details:
            event["args"] = details
        self._events.append(event)

    def counter(self, name: str, at: float, value: float) -> None:
        place = {"pid": _pid("controller")}
        self._events.append({"ph": "C", "name": name, **place, "ts": self._at(at), "args": {name: value}})

    def arrow(self, name: str, *points: tuple[str, str, float]) -> None:
        """An arrow through slices that hold these (process, thread, time)."""
        self._flows += 1
        for kind, (process, thread, at) in zip(("s", "t", "f"), points, strict=True):
            event: Event = {"ph": kind, "id": self._flows, "name": name, "cat": "group"}
            event |= {**self._place(process, thread), "ts": self._at(at)}
            if kind == "f":
                event["bp"] = "e"
            self._events.append(event)

    def events(self) -> list[Event]:
        """All events in order of time; names first."""
        names: list[Event] = []
        for order, process in enumerate((*ROLES, GROUPS, "episodes")):
            if any(known == process for known, _ in self._threads):
                names.append({"ph": "M", "name": "process_name", "pid": _pid(process), "args": {"name": process}})
                names.append(
                    {"ph": "M", "name": "process_sort_index", "pid": _pid(process), "args": {"sort_index": order}}
                )
        for (process, thread), number in self._threads.items():
            place = {"pid": _pid(process), "tid": number}
            names.append({"ph": "M", "name": "thread_name", **place, "args": {"name": thread}})
        return names + sorted(self._events, key=lambda event: event["ts"])

    def _place(self, process: str, thread: str) -> dict[str, int]:
        number = self._threads.setdefault((process, thread), len(self._threads) + 1)
        return {"pid": _pid(process), "tid": number}

    def _at(self, unix: float) -> float:
        return round((unix - self._zero) * 1e6, 1)


def _pid(process: str) -> int:
    order = (*ROLES, GROUPS, "episodes")
    return order.index(process) + 1 if process in order else len(order) + 1
