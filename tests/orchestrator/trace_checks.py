"""What holds for every trace file."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

ROUNDING_US = 0.2
"""Times in the file are rounded to a tenth of a microsecond."""


def check_trace(path: Path) -> dict[str, Any]:
    """Assert that the file is a sound trace; returns it. Slices of a thread nest or lie apart, arrows hold on to slices."""
    trace: dict[str, Any] = json.loads(path.read_text())
    events = trace["traceEvents"]
    timed = [event for event in events if event["ph"] != "M"]
    assert [event["ts"] for event in timed] == sorted(event["ts"] for event in timed)
    named = {(event["pid"], event["tid"]) for event in events if event["name"] == "thread_name"}
    slices: dict[tuple[int, int], list[tuple[float, float]]] = defaultdict(list)
    flows: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for event in timed:
        if event["ph"] == "X":
            assert event["dur"] >= 0
            slices[event["pid"], event["tid"]].append((event["ts"], event["ts"] + event["dur"]))
        elif event["ph"] in "stf":
            flows[event["id"]].append(event)
        else:
            assert event["ph"] == "C"
            assert all(isinstance(value, int | float) for value in event["args"].values())
    assert set(slices) <= named
    for place, spans in slices.items():
        for (_, end), (begin, _) in zip(spans, spans[1:], strict=False):  # noqa: RUF007
            assert begin >= end - ROUNDING_US, (place, begin, end)
    for number, arrow in flows.items():
        assert [event["ph"] for event in arrow] == ["s", "t", "f"], number
        assert arrow[-1]["bp"] == "e"
        for event in arrow:
            around = slices[event["pid"], event["tid"]]
            assert any(begin - ROUNDING_US <= event["ts"] <= end + ROUNDING_US for begin, end in around), event
    return trace
