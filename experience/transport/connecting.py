"""What every connecting side of the transport has: a proven connection, over the Unix socket where that reaches."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable, Sequence
from typing import TypeVar, cast

from experience.transport.frames import MAX_BODY_BYTES, Endpoint, FrameError, FrameReader, Kind, head, prove
from experience.transport.listening import set_options

logger = logging.getLogger(__name__)

CONNECT_S = 10.0


class ProvedChannel(asyncio.BufferedProtocol):
    """One connection to a listening actor; ``what`` it is stands in messages."""

    def __init__(self, token: bytes, what: str) -> None:
        self.what = what
        self._token = token
        self._reader = FrameReader(MAX_BODY_BYTES)
        self._loop = asyncio.get_running_loop()
        self.welcome: asyncio.Future[None] = self._loop.create_future()
        self._writable = asyncio.Event()
        self._writable.set()
        self.closed = False

    def take(self, kind: int, number: int, body: bytes) -> None:
        """One frame that answers a call."""
        raise NotImplementedError

    def abandon(self, error: ConnectionError) -> None:
        """The connection is gone: all calls that wait for an answer end with ``error``."""
        raise NotImplementedError

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        connection = transport.get_extra_info("socket")
        self.network = "unix" if connection.family == socket.AF_UNIX else "tcp"
        set_options(connection)
        self._transport.set_write_buffer_limits(high=1 << 20)

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed = True
        self._writable.set()
        error = ConnectionResetError(f"the connection to the {self.what} ended ({exc or 'closed by it'})")
        if not self.welcome.done():
            self.welcome.set_exception(error)
            self.welcome.exception()  # nobody may be left who waits for it
        self.abandon(error)

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    def get_buffer(self, sizehint: int) -> memoryview:
        del sizehint
        return self._reader.free()

    def buffer_updated(self, nbytes: int) -> None:
        try:
            for kind, number, body in self._reader.received(nbytes):
                self._received(kind, number, body)
        except FrameError as error:
            logger.error("the connection to the %s was ended: %s", self.what, error)
            self.close()

    def close(self) -> None:
        self._transport.abort()

    async def write(self, frames: Sequence[bytes]) -> None:
        """Returns when they are sent or buffered; a connection that has ended is told by the call's future."""
        if not self._writable.is_set():
            await self._writable.wait()
        if not self.closed:
            self._transport.writelines(frames)

    def _received(self, kind: int, number: int, body: bytes) -> None:
        if kind == Kind.CHALLENGE:
            proof = prove(self._token, body)
            self._transport.writelines([head(Kind.HELLO, 0, len(proof)), proof])
        elif kind == Kind.WELCOME:
            if not self.welcome.done():
                self.welcome.set_result(None)
        else:
            self.take(kind, number, body)


AnyChannel = TypeVar("AnyChannel", bound=ProvedChannel)


async def connect(endpoint: Endpoint, make: Callable[[], AnyChannel]) -> AnyChannel:
    """A proven connection, over the Unix socket if the actor is on this machine. Raises ``OSError``."""
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(CONNECT_S):
            try:
                channel = await _connect_local(endpoint, make)
            except OSError:
                if not endpoint.port:
                    raise
                _, channel = await loop.create_connection(make, endpoint.host, endpoint.port)
            await channel.welcome
    except TimeoutError:
        raise ConnectionError(f"no connection to {endpoint.host}:{endpoint.port} within {CONNECT_S:g} s") from None
    return channel


async def _connect_local(endpoint: Endpoint, make: Callable[[], AnyChannel]) -> AnyChannel:
    """Over the Unix socket, connected by hand: not every event loop takes an abstract name."""
    loop = asyncio.get_running_loop()
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.setblocking(False)
    try:
        connection.connect(endpoint.local)
        _, channel = await loop.create_unix_connection(make, sock=connection)
    except OSError:
        connection.close()
        raise
    return channel
