"""What a run left behind that a trace is made of: timelines, metrics, the queue's journal."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from experience.accounting import Span, read_timeline
from experience.entries import EpisodeEntry
from experience.journal import JournalError, JournalReader
from experience.queue_records import AckRecord, RevertRecord
from experience.wire import WireFormatError, decode, decode_trajectory
from orchestrator.accounting.trace import Counter, GroupPath, Member, Step, TraceSources
from orchestrator.run_directory import RunDirectory
from orchestrator.telemetry import read_metrics

MOST_GROUPS = 2_000
"""Groups of which the trace tells; more are thinned evenly."""

COUNTERS = {
    "groups in flight": "dispatch/in_flight",
    "groups live": "groups/live",
    "lag mean": "lag/mean",
    "lag max": "lag/max",
    "tokens/s": "throughput/tokens_per_s",
}


def run_began_at(run: RunDirectory, spans: Iterable[Span]) -> float:
    """Unix seconds of the first thing that is known of the run; 0 for one of which nothing is."""
    first = [span.began_at for span in spans]
    first += [line["time"] - line["wall_s"] for line in list(read_metrics(run))[:1]]
    return min(first, default=0.0)


def read_sources(run: RunDirectory, begin_s: float, end_s: float) -> tuple[TraceSources, float]:
    """Everything between ``begin_s`` and ``end_s`` (seconds of the run), and when the run began (Unix seconds)."""
    spans = read_timeline(run.timeline) if run.timeline.is_dir() else []
    zero = run_began_at(run, spans)
    first, last = zero + begin_s, zero + end_s
    notes: list[str] = []
    steps, counters = _metrics(run, first, last)
    within = [
        span._replace(began_at=max(span.began_at, first), ended_at=min(span.ended_at, last))
        for span in spans
        if span.began_at < last and span.ended_at > first
    ]
    groups = _groups(run, {step.number for step in steps}, notes)
    clipped = [group for group in groups if group.began_at >= first and group.ended_at <= last]
    ready = _ready_counter(clipped, {step.number: step for step in steps})
    return TraceSources(within, clipped, steps, [*counters, *ready], notes), zero


def _metrics(run: RunDirectory, first: float, last: float) -> tuple[list[Step], list[Counter]]:
    steps: list[Step] = []
    counters: list[Counter] = []
    for line in read_metrics(run):
        at = line["time"]
        if "time/step_s" not in line or not first <= at <= last:
            continue
        begin = at - line["time/step_s"]
        steps.append(Step(line["step"], max(begin, steps[-1].ended_at) if steps else begin, at))
        counters += [Counter(name, at, line[key]) for name, key in COUNTERS.items() if line.get(key) is not None]
    return steps, counters


def _groups(run: RunDirectory, numbers: set[int], notes: list[str]) -> list[GroupPath]:
    """The groups that these steps trained, with the times of their episodes."""
    reader = JournalReader(run.journal)
    positions: dict[str, list[int]] = defaultdict(list)
    trained: dict[str, int] = {}
    try:
        for record in reader.records():
            if record.kind == "add":
                positions[decode(record.payload, EpisodeEntry).group_id].append(record.position)
            elif record.kind == "ack":
                ack = decode(record.payload, AckRecord)
                trained |= dict.fromkeys(ack.group_ids, ack.step + 1)
            elif record.kind == "revert":
                kept = decode(record.payload, RevertRecord).committed_step + 1
                trained = {group: step for group, step in trained.items() if step <= kept}
    except (JournalError, WireFormatError) as error:
        notes.append(f"the journal ends early: {error}")
    if not positions:
        notes.append("no groups and no arrows: the run has no journal (queue.journal=false)")
    chosen = [group for group in positions if trained.get(group) in numbers]
    if len(chosen) > MOST_GROUPS:
        notes.append(f"thinned: {MOST_GROUPS} of {len(chosen)} groups; choose less time with --from and --to")
        chosen = [chosen[index * len(chosen) // MOST_GROUPS] for index in range(MOST_GROUPS)]
    found = (GroupPath(group, _members(reader, positions[group]), trained[group]) for group in chosen)
    return [path for path in found if path.members]


def _members(reader: JournalReader, positions: list[int]) -> tuple[Member, ...]:
    members = []
    for position in positions:
        entry = decode(reader.read(position).payload, EpisodeEntry)
        turns = [turn for data in entry.trajectories for turn in decode_trajectory(data).turns if turn.began_at > 0]
        if turns:
            begin, end = min(turn.began_at for turn in turns), max(turn.ended_at for turn in turns)
            members.append(Member(entry.episode_id, begin, end))
    return tuple(members)


def _ready_counter(groups: list[GroupPath], steps: dict[int, Step]) -> list[Counter]:
    """Groups that were finished and not trained yet, after each change."""
    changes = [(group.ended_at, 1) for group in groups]
    changes += [(max(group.ended_at, steps[group.step].ended_at), -1) for group in groups if group.step is not None]
    counters, ready = [], 0
    for at, change in sorted(changes, key=lambda item: (item[0], -item[1])):
        ready += change
        counters.append(Counter("groups ready", at, ready))
    return counters
