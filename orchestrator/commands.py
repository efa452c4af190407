"""What a person may tell a run that is under way. So far: how many engines it shall have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from orchestrator.control import Say
from orchestrator.crew import EngineCrew
from orchestrator.fleet_log import FleetEvent, FleetLog
from orchestrator.scaling import ScaleError

SCALE = "scale"
SCALABLE = ("training", "evaluating")
"""Phases in which engines can come and go by command."""


class Commands:
    """The handler of a run's `ControlServer`. ``phase()`` is what the run is doing."""

    def __init__(self, crew: EngineCrew, log: FleetLog, phase: Callable[[], str]) -> None:
        self._crew = crew
        self._log = log
        self._phase = phase

    async def __call__(self, name: str, text: str, say: Say) -> dict[str, Any]:
        """Carry out a command; ``say`` passes on what happens to the engines meanwhile. Raises ScaleError."""
        if name != SCALE:
            raise ScaleError(f"this run knows no command {name!r}, only {SCALE}")
        if self._phase() not in SCALABLE:
            raise ScaleError(f"the run is {self._phase()}: scale it while it trains")

        def tell(event: FleetEvent) -> None:
            say(event.text())

        self._log.listeners.add(tell)
        try:
            return await self._crew.scale(text)
        finally:
            self._log.listeners.discard(tell)
