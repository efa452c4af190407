"""The queue's side of the transport: accepts connections, hands frames to a `QueuePort`, answers when it is durable.

A producer whose episode does not fit into the byte budget is not read from until there is space: at most one buffer of
a connection is held, the rest stays with the producer. A connection that adds must therefore not lease.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import secrets
import socket
from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol, cast

from experience.entries import Added, LeasedGroup
from experience.journal import JournalError
from experience.transport.frames import (
    LETTER_OF,
    MAX_BODY_BYTES,
    MAX_STRANGER_BYTES,
    Endpoint,
    FrameError,
    FrameReader,
    Kind,
    LeaseRequest,
    head,
    prove,
)
from experience.wire import Buffer, WireFormatError, decode

logger = logging.getLogger(__name__)

HELLO_S = 20.0
"""How long a new connection may take to prove itself."""


class QueuePort(Protocol):
    """What the server needs of a queue. All methods are called on the event loop."""

    def add_encoded(self, payload: bytes) -> Added:
        """Take one encoded `EpisodeEntry`. Raises ``WireFormatError``."""

    def when_durable(self, answer: Callable[[Exception | None], None]) -> None:
        """Call ``answer`` once all that was taken so far is durable, or with why it cannot be."""

    async def lease_groups(self, request: LeaseRequest) -> list[LeasedGroup]:
        """Up to ``limit`` groups, none after the time-out."""


class QueueServer:
    """Listens on a Unix socket and, unless ``host`` is empty, on TCP."""

    def __init__(self, port: QueuePort, max_body: int = MAX_BODY_BYTES) -> None:
        self.port = port
        self.max_body = max_body
        self.token = secrets.token_bytes(32)
        self.connections: set[_Connection] = set()
        self._servers: list[asyncio.Server] = []

    async def start(self, host: str) -> Endpoint:
        """Listen; returns where. Raises ``OSError`` when the address cannot be used."""
        loop = asyncio.get_running_loop()
        local = f"\0millrace-queue-{secrets.token_hex(12)}"
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(local)  # by hand: not every event loop takes an abstract name
        self._servers.append(await loop.create_unix_server(lambda: _Connection(self), sock=listener))
        port = 0
        if host:
            server = await loop.create_server(lambda: _Connection(self), host, 0)
            self._servers.append(server)
            port = int(server.sockets[0].getsockname()[1])
        return Endpoint(local=local, host=host, port=port, token=self.token)

    def space(self) -> None:
        """The byte budget has room again: go on with the producers that were refused, in turn."""
        for connection in list(self.connections):
            connection.resume()

    def close(self) -> None:
        """Stop listening and end all connections; a second call does nothing."""
        for server in self._servers:
            server.close()
        self._servers.clear()
        for connection in list(self.connections):
            connection.end()


class _Connection(asyncio.BufferedProtocol):
    """One client."""

    def __init__(self, server: QueueServer) -> None:
        self._server = server
        self._reader = FrameReader(MAX_STRANGER_BYTES)
        self._challenge = secrets.token_bytes(32)
        self._proved = False
        self._refused: deque[tuple[int, bytes]] = deque()
        self._leases: set[asyncio.Task[None]] = set()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        set_options(transport.get_extra_info("socket"))
        self._server.connections.add(self)
        self._send([head(Kind.CHALLENGE, 0, len(self._challenge)), self._challenge])
        self._hello_due = asyncio.get_running_loop().call_later(HELLO_S, self._late)

    def connection_lost(self, exc: Exception | None) -> None:
        self._server.connections.discard(self)
        self._hello_due.cancel()
        self._refused.clear()
        for lease in self._leases:
            lease.cancel()

    def get_buffer(self, sizehint: int) -> memoryview:
        del sizehint
        return self._reader.free()

    def buffer_updated(self, nbytes: int) -> None:
        answers: list[tuple[int, Added | str]] = []
        try:
            for kind, call, body in self._reader.received(nbytes):
                if not self._proved:
                    self._welcome(kind, body)
                elif kind == Kind.ADD:
                    self._add(call, body, answers)
                elif kind == Kind.LEASE:
                    self._begin_lease(call, body)
                else:
                    raise FrameError(f"a frame of kind {kind} is not for a queue")
        except FrameError as error:
            logger.warning("a connection to the queue was ended: %s", error)
            self._transport.abort()
        self._answer(answers)

    def resume(self) -> None:
        """Offer again what did not fit."""
        if not self._refused:
            return
        answers: list[tuple[int, Added | str]] = []
        waiting, self._refused = self._refused, deque()
        for call, body in waiting:
            self._add(call, body, answers)
        if not self._refused:
            self._transport.resume_reading()
        self._answer(answers)

    def end(self) -> None:
        self._transport.abort()

    def _welcome(self, kind: int, body: bytes) -> None:
        if kind != Kind.HELLO or not hmac.compare_digest(body, prove(self._server.token, self._challenge)):
            raise FrameError("it does not know the token of this run")
        self._proved = True
        self._reader.max_body = self._server.max_body
        self._hello_due.cancel()
        self._send([head(Kind.WELCOME, 0, 0)])

    def _late(self) -> None:
        logger.warning("a connection to the queue was ended: it did not prove itself within %g s", HELLO_S)
        self._transport.abort()

    def _add(self, call: int, body: bytes, answers: list[tuple[int, Added | str]]) -> None:
        if self._refused:
            self._refused.append((call, body))
            return
        try:
            added = self._server.port.add_encoded(body)
        except WireFormatError as error:
            answers.append((call, f"not an episode: {error}"))
            return
        except JournalError as error:
            answers.append((call, str(error)))
            return
        if added is not Added.FULL:
            answers.append((call, added))
            return
        self._refused.append((call, body))
        self._transport.pause_reading()

    def _answer(self, answers: list[tuple[int, Added | str]]) -> None:
        if answers:
            self._server.port.when_durable(lambda error: self._send(_frames_of(answers, error)))

    def _begin_lease(self, call: int, body: bytes) -> None:
        try:
            request = decode(body, LeaseRequest)
        except WireFormatError as error:
            self._send(_error_frame(call, f"not a lease request: {error}"))
            return
        lease = asyncio.get_running_loop().create_task(self._lease(call, request))
        self._leases.add(lease)
        lease.add_done_callback(self._leases.discard)

    async def _lease(self, call: int, request: LeaseRequest) -> None:
        try:
            groups = await self._server.port.lease_groups(request)
        except Exception as error:
            logger.exception("a lease for %s failed", request.consumer)
            self._send(_error_frame(call, f"{type(error).__name__}: {error}"))
            return
        frames: list[Buffer] = []
        for group in groups:
            parts = group.encode_parts()
            frames += (head(Kind.GROUP, call, sum(len(part) for part in parts)), *parts)
        self._send([*frames, head(Kind.LEASED, call, 0)])

    def _send(self, frames: Sequence[Buffer]) -> None:
        if not self._transport.is_closing():
            self._transport.writelines(frames)


def set_options(connection: socket.socket) -> None:
    """Small answers leave at once; a machine that vanished is noticed; large records need few wake-ups."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
    if connection.family != socket.AF_UNIX:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 10)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 4)


def _frames_of(answers: list[tuple[int, Added | str]], error: Exception | None) -> list[bytes]:
    """The answers of neighbouring episodes of one call share a frame."""
    frames: list[bytes] = []
    letters, of_call = b"", -1
    for call, answer in answers:
        letter = LETTER_OF.get(answer) if isinstance(answer, Added) and error is None else None
        if letters and (letter is None or call != of_call):
            frames += (head(Kind.ADDED, of_call, len(letters)), letters)
            letters = b""
        if letter is None:
            frames += _error_frame(call, answer if error is None else str(error))
        else:
            letters, of_call = letters + letter, call
    if letters:
        frames += (head(Kind.ADDED, of_call, len(letters)), letters)
    return [b"".join(frames)]


def _error_frame(call: int, message: str) -> list[bytes]:
    body = message.encode()
    return [head(Kind.ERROR, call, len(body)), body]
