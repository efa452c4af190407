"""What happened to the engines of a run: one JSON line an event in ``fleet.jsonl``, counts for the summary, news for who listens."""

from __future__ import annotations

import json
import logging
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from experience.vitals import Histogram
from orchestrator.run_directory import RunDirectoryError

logger = logging.getLogger(__name__)

SUMMARISED = 200
"""Events that the summary keeps; the file has all."""


@dataclass(frozen=True)
class FleetEvent:
    """One thing that happened to one engine, or (``engine`` empty) to the fleet."""

    at: float
    """Unix seconds."""
    event: str
    """A `MemberState` that the engine is in now, its new role (``prefill``, ``decode``), or ``rerouted``, ``condemned``,
    ``scaled``."""
    engine: str = ""
    version: int | None = None
    detail: str = ""
    numbers: dict[str, float] = field(default_factory=dict)

    def text(self) -> str:
        """The event in words."""
        if not self.engine:
            return self.detail
        version = "" if self.version is None else f" version {self.version}"
        detail = f": {self.detail}" if self.detail else ""
        return f"{self.engine} {self.event}{version}{detail}".strip()


class FleetLog:
    """Keeps the events of this attempt of the run."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._first: list[FleetEvent] = []
        self._counts: Counter[str] = Counter()
        self._publications = Histogram()
        self.listeners: set[Callable[[FleetEvent], None]] = set()

    def note(
        self, event: str, engine: str = "", version: int | None = None, detail: str = "", **numbers: float
    ) -> FleetEvent:
        """Write an event down, and tell the listeners."""
        entry = FleetEvent(round(time.time(), 3), event, engine, version, detail, numbers)
        logger.info("%s", entry.text())
        self._counts[event] += 1
        if len(self._first) < SUMMARISED:
            self._first.append(entry)
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(entry)) + "\n")
        except OSError as error:
            logger.error("%s cannot be written: %s", self._path, error.strerror or error)
        for listener in list(self.listeners):
            listener(entry)
        return entry

    def published(self, seconds: float) -> None:
        """A version was brought to all engines; it took that long, in which they served on."""
        self._publications.add(seconds)

    def summary(self) -> dict[str, Any]:
        """For ``summary.json``: the events (the first of them, if there are many), their counts, and how long versions took."""
        seconds = self._publications
        took: dict[str, float] = {"count": seconds.count}
        if seconds.count:
            took |= {name: round(seconds.quantile(share), 4) for name, share in (("p50_s", 0.5), ("p99_s", 0.99))}
        return {"events": [asdict(event) for event in self._first], "counts": dict(self._counts), "publications": took}


def read_fleet_events(path: Path) -> list[FleetEvent]:
    """The events of all attempts of a run, oldest first; none when the file is not there.

    Raises:
        RunDirectoryError: The file cannot be read, or a line of it is damaged; a last line without an end is left out.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise RunDirectoryError(f"{path} cannot be read: {error.strerror or error}") from error
    events = []
    for number, line in enumerate(text.splitlines(keepends=True), 1):
        if not line.endswith("\n"):
            continue
        try:
            events.append(FleetEvent(**json.loads(line)))
        except (ValueError, TypeError) as error:
            raise RunDirectoryError(f"{path} line {number} is not a fleet event: {error}") from error
    return events
