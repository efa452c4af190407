"""The picture of who did what when, and the same in a table. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from experience.accounting import Cause
from orchestrator.report.figures import Figure, label, vertical
from orchestrator.report.timeline import CAUSES, Timeline, place_of, role_of
from orchestrator.report.words import duration, percent

COLOURS: dict[Cause, str] = {
    Cause.PREFILL: "#7ab8f5",
    Cause.DECODE: "#2f74d0",
    Cause.TRAIN: "#2f9e63",
    Cause.ENVIRONMENT: "#e8973a",
    Cause.REWARD: "#d9bf2f",
    Cause.QUEUE_FULL: "#c06bc9",
    Cause.QUEUE_EMPTY: "#8567d6",
    Cause.WEIGHT_STALL: "#d8434e",
    Cause.STRAGGLER: "#ee8a8f",
    Cause.PACING: "#a08d6f",
    Cause.OTHER_PHASE: "#5fb7b0",
    Cause.STARTUP: "#7f97a6",
    Cause.SAVE: "#4f6f80",
    Cause.FAILURE: "#7d1128",
    Cause.IDLE: "#b9c0c7",
}
LEVELS = 10
"""Shares in the utilisation picture are drawn in tenths."""


def utilisation(timeline: Timeline) -> Figure:
    """One row a lane; in each stretch of time the row is filled with the causes in proportion to their seconds."""
    grid: list[list[int | None]] = []
    texts: list[list[str]] = []
    ticks: list[float] = []
    for row in reversed(timeline.rows):
        ticks.append(len(grid) + (LEVELS - 1) / 2)
        cells = [_stack(shares.tolist()) for shares in row.shares]
        hovers = [_breakdown(shares.tolist()) for shares in row.shares]
        for level in range(LEVELS):
            grid.append([cell[level] for cell in cells])
            texts.append(hovers)
        grid += [[None] * len(cells)] * 2
        texts += [[""] * len(cells)] * 2
    steps = [(index / len(CAUSES), (index + 1) / len(CAUSES)) for index in range(len(CAUSES))]
    scale = [[edge, COLOURS[cause]] for cause, step in zip(CAUSES, steps, strict=True) for edge in step]
    middles = (timeline.edges[:-1] + timeline.edges[1:]) / 2
    heatmap = {
        "type": "heatmap",
        "x": [round(float(x), 2) for x in middles],
        "z": grid,
        "text": texts,
        "colorscale": scale,
        "zmin": -0.5,
        "zmax": len(CAUSES) - 0.5,
        "showscale": False,
        "hovertemplate": "%{x:.1f} s: %{text}<extra></extra>",
        "hoverongaps": False,
    }
    layout: dict[str, Any] = {
        "xaxis": {"title": {"text": "seconds since the first record"}, "range": [0, float(timeline.edges[-1])]},
        "yaxis": {
            "tickvals": ticks,
            "ticktext": [label(row.name) for row in reversed(timeline.rows)],
            "showgrid": False,
            "zeroline": False,
            "fixedrange": True,
        },
        "shapes": [vertical(at, "dash") for at, _ in timeline.cuts],
    }
    cut = sum(length for _, length in timeline.cuts)
    note = f"Dashed lines: pauses of {duration(cut)} in all, in which no actor ran, are cut out." if cut else ""
    alt = "Utilisation over time. " + ". ".join(_role_in_words(timeline, role) for role in timeline.seconds) + "."
    height = 90 + 26 * len(timeline.rows)
    return Figure("utilisation", "Who did what, when", alt, [heatmap], layout, height, note)


def _stack(shares: Sequence[float]) -> list[int | None]:
    """Causes from the bottom up, each with as many levels as its share of ``LEVELS``; None where nothing was recorded."""
    filled: list[int | None] = []
    reached = 0.0
    for cause, share in enumerate(shares):
        reached += share * LEVELS
        filled += [cause] * (round(reached) - len(filled))
    return (filled + [None] * LEVELS)[:LEVELS]


def _breakdown(shares: Sequence[float]) -> str:
    largest = sorted(
        ((share, cause) for share, cause in zip(shares, CAUSES, strict=True) if share >= 0.005), reverse=True
    )
    return ", ".join(f"{cause.value.replace('_', ' ')} {share:.0%}" for share, cause in largest[:4])


def _role_in_words(timeline: Timeline, role: str) -> str:
    seconds = timeline.seconds[role]
    whole = sum(seconds.values())
    parts = sorted(seconds.items(), key=lambda item: -item[1])[:3]
    return f"{role}: " + ", ".join(f"{cause.value.replace('_', ' ')} {percent(spent, whole)}" for cause, spent in parts)


def cause_table(
    timeline: Timeline | None, accounts: Mapping[str, Mapping[str, float]]
) -> list[tuple[str, list[tuple[str, str, str, str]]]]:
    """For each role its causes by size: (name, colour, seconds, share).

    From the run's ``accounts`` (lane -> cause -> seconds, idle time explained); without them from the timeline.
    """
    roles: dict[str, dict[str, float]] = {}
    lanes: Counter[str] = Counter()
    for lane in sorted(accounts, key=lambda lane: place_of(role_of(lane))):
        role = role_of(lane)
        lanes[role] += 1
        for cause, spent in accounts[lane].items():
            roles.setdefault(role, {})[cause] = roles.get(role, {}).get(cause, 0.0) + spent
    if not accounts and timeline is not None:
        roles = {
            role: {cause.value: spent for cause, spent in causes.items()} for role, causes in timeline.seconds.items()
        }
        lanes = Counter(timeline.lanes)
    return [
        (role if lanes[role] == 1 else f"{role} ({lanes[role]} lanes)", _cause_rows(causes))
        for role, causes in roles.items()
    ]


def _cause_rows(causes: Mapping[str, float]) -> list[tuple[str, str, str, str]]:
    whole = sum(causes.values())
    colours = {cause.value: colour for cause, colour in COLOURS.items()}
    return [
        (cause.replace("_", " "), colours.get(cause, COLOURS[Cause.IDLE]), duration(spent), percent(spent, whole))
        for cause, spent in sorted(causes.items(), key=lambda item: -item[1])
        if spent > 0
    ]
