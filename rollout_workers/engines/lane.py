"""The calls that workers make of an engine all the time, over a socket (see `experience.transport.lane`)."""

from __future__ import annotations

from typing import Protocol

from experience.transport.lane import LaneServer

ENGINE_LANE = ("submit", "collect")
"""What clients call there."""


class EngineCalls(Protocol):
    """An engine's actor."""

    async def submit(self, batch: bytes) -> bytes | None: ...

    async def collect(self, client: str) -> bytes: ...


def engine_lane(actor: EngineCalls, name: str) -> LaneServer:
    """The socket over which an engine takes requests and gives tokens."""
    return LaneServer(
        f"engine {name}", {"submit": actor.submit, "collect": lambda client: actor.collect(client.decode())}
    )
