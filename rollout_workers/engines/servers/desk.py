"""Hand-offs between servers of which some prefill and others decode.

The KV itself moves between the servers, by their own connectors. What a decode server must be told to fetch it is known
to the prefill server's actor; it leaves that at the desk of the decode server's actor, where the request finds it.
"""

from __future__ import annotations

import asyncio
import contextlib
import struct
from collections import OrderedDict
from typing import Any, Protocol

import msgspec

from rollout_workers.engines.protocol import GenerateRequest
from rollout_workers.engines.servers.adapter import Call
from rollout_workers.engines.servers.errors import ServerUnreachable

MAX_NOTE_BYTES = 4 << 20
MAX_NOTES = 4096
"""Notes that nobody asks for are forgotten, oldest first (their requests were aborted)."""
READ_S = 10.0
_SIZE = struct.Struct("<I")
_TAKEN = b"\x01"


class ServerHandoff(msgspec.Struct, frozen=True, kw_only=True):
    """KV that a prefill server keeps for a request."""

    version: int
    """Of the weights that computed it."""
    params: dict[str, Any]
    """What the decode server is told, in its own terms."""


class SplitAdapter(Protocol):
    """What an adapter can do besides, if its servers can split prefill and decode."""

    def prefill(self, request: GenerateRequest, served: int) -> Call:
        """Have the server compute the prompt and keep its KV. Answered once, when it is computed."""
        ...

    def parse_prefill(self, body: bytes) -> ServerHandoff: ...

    def decode(self, request: GenerateRequest, served: int, handoff: ServerHandoff) -> Call:
        """As `ServerAdapter.generate`, with the KV of ``handoff`` if it is of the version served."""
        ...


class _Note(msgspec.Struct, frozen=True, kw_only=True):
    handoff_id: str
    handoff: ServerHandoff


_NOTE = msgspec.msgpack.Decoder(_Note)


class HandoffDesk:
    """Takes notes of hand-offs over TCP and keeps each until its request comes."""

    def __init__(self) -> None:
        self._notes: OrderedDict[str, ServerHandoff] = OrderedDict()
        self._server: asyncio.Server | None = None
        self.address = ""
        """Where `leave_note` reaches it; empty before `open`."""

    async def open(self, host: str) -> None:
        self._server = await asyncio.start_server(self._serve, host, 0)
        self.address = f"{host}:{self._server.sockets[0].getsockname()[1]}"

    def take(self, handoff_id: str) -> ServerHandoff | None:
        """The note of a hand-off, once; None if there is none."""
        return self._notes.pop(handoff_id, None)

    def close(self) -> None:
        if self._server is not None:
            self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One note a connection; anything else ends it without an answer."""
        try:
            async with asyncio.timeout(READ_S):
                (size,) = _SIZE.unpack(await reader.readexactly(_SIZE.size))
                if size <= MAX_NOTE_BYTES:
                    note = _NOTE.decode(await reader.readexactly(size))
                    self._keep(note)
                    writer.write(_TAKEN)
                    await writer.drain()
        except (TimeoutError, OSError, asyncio.IncompleteReadError, msgspec.MsgspecError):
            return
        finally:
            writer.close()

    def _keep(self, note: _Note) -> None:
        self._notes[note.handoff_id] = note.handoff
        while len(self._notes) > MAX_NOTES:
            self._notes.popitem(last=False)


async def leave_note(address: str, handoff_id: str, handoff: ServerHandoff, timeout_s: float) -> None:
    """Tell the desk at ``address`` (``host:port``) of a hand-off. Raises ServerUnreachable if it cannot be told."""
    host, _, port = address.rpartition(":")
    data = msgspec.msgpack.encode(_Note(handoff_id=handoff_id, handoff=handoff))
    try:
        async with asyncio.timeout(timeout_s):
            reader, writer = await asyncio.open_connection(host, int(port))
            try:
                writer.write(_SIZE.pack(len(data)) + data)
                await writer.drain()
                answer = await reader.read(1)
            finally:
                writer.close()
                with contextlib.suppress(OSError):
                    await writer.wait_closed()
    except (TimeoutError, OSError, ValueError) as error:
        raise ServerUnreachable(f"the decode engine at {address} took no hand-off: {error or 'too late'}") from error
    if answer != _TAKEN:
        raise ServerUnreachable(f"the decode engine at {address} refused hand-off {handoff_id}")
