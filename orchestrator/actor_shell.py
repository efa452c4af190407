"""What every actor of a run has around its class: a log, books, a pulse. Light, because every process imports it."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from experience.accounting import Cause
from experience.books import clock, open_books
from orchestrator.run_directory import RunDirectory
from orchestrator.vitals_taker import vitals_taken


@dataclass(frozen=True)
class Identity:
    """Who an actor is in its run: for its log and its accounts."""

    run_directory: str
    actor: str
    attempt: int
    replaces: bool
    """It stands in for one that died."""
    secrets: list[str]


class Pulse(NamedTuple):
    """What an actor tells of itself once or twice a second."""

    answer: Any
    """Its `health` or `stats`, encoded where that is."""
    accounts: dict[str, dict[Cause, float]]
    """Seconds by lane and cause since the process began."""
    slots: dict[str, float]
    """Slot-seconds of a worker by what its episodes do (`experience.slots`)."""
    cpu_s: float
    """CPU seconds of the process."""


class Lifecycle:
    """What the supervisor asks of every actor, for classes that need nothing special."""

    async def alive(self) -> None:
        """Ends with the process only."""
        await asyncio.Event().wait()

    def slot_seconds(self) -> dict[str, float]:
        """Only workers have slots."""
        return {}

    async def stop(self) -> None:
        """Nothing to let go of."""


def logged(kind: type) -> type:
    """The class with logging and books set up before its constructor runs, with a `Lifecycle`, and with a pulse."""

    class Logged(kind, Lifecycle):  # type: ignore[misc]
        def __init__(self, identity: Identity, *arguments: Any) -> None:
            from orchestrator.telemetry import setup_actor_logging

            setup_actor_logging(identity.run_directory, identity.actor, identity.attempt, secrets=identity.secrets)
            self._books = open_books(
                identity.actor, RunDirectory(Path(identity.run_directory)).timeline, identity.replaces
            )
            self._identity = identity
            super().__init__(*arguments)

        async def alive(self) -> None:
            async with vitals_taken(RunDirectory(Path(self._identity.run_directory)).vitals, self._identity.actor):
                await super().alive()

        async def pulse(self) -> Pulse:
            """How the actor is (its `health` or `stats`), and where its seconds went."""
            accounts = self._books.totals(clock())
            answer = await (self.health() if hasattr(self, "health") else self.stats())
            return Pulse(answer, accounts, self.slot_seconds(), time.process_time())

        async def stop(self) -> None:
            self._books.write(clock())
            await super().stop()

    Logged.__name__ = Logged.__qualname__ = kind.__name__
    return Logged
