"""What every listening side of the transport has: sockets, and connections that must prove that they belong to the run."""

from __future__ import annotations

import asyncio
import hmac
import logging
import secrets
import socket
import sys
from collections.abc import Sequence
from typing import cast

from experience.transport.frames import (
    MAX_BODY_BYTES,
    MAX_STRANGER_BYTES,
    Endpoint,
    FrameError,
    FrameReader,
    Kind,
    head,
    prove,
)
from experience.wire import Buffer

logger = logging.getLogger(__name__)

HELLO_S = 20.0
"""How long a new connection may take to prove itself."""


class SocketServer:
    """Listens on a Unix socket and, unless ``host`` is empty, on TCP. ``what`` it is stands in messages."""

    def __init__(self, what: str, max_body: int = MAX_BODY_BYTES) -> None:
        self.what = what
        self.max_body = max_body
        self.token = secrets.token_bytes(32)
        self.connections: set[ProvedConnection] = set()
        self._servers: list[asyncio.Server] = []

    def make_connection(self) -> ProvedConnection:
        """The protocol of a new connection."""
        raise NotImplementedError

    async def start(self, host: str) -> Endpoint:
        """Listen; returns where. Raises ``OSError`` when the address cannot be used."""
        loop = asyncio.get_running_loop()
        local = f"\0millrace-{secrets.token_hex(12)}"
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(local)  # by hand: not every event loop takes an abstract name
        self._servers.append(await loop.create_unix_server(self.make_connection, sock=listener))
        port = 0
        if host:
            server = await loop.create_server(self.make_connection, host, 0)
            self._servers.append(server)
            port = int(server.sockets[0].getsockname()[1])
        return Endpoint(local=local, host=host, port=port, token=self.token)

    def close(self) -> None:
        """Stop listening and end all connections; a second call does nothing."""
        for server in self._servers:
            server.close()
        self._servers.clear()
        for connection in list(self.connections):
            connection.end()


class ProvedConnection(asyncio.BufferedProtocol):
    """One client. Nothing of it reaches `take` before it has shown that it knows the token of the run."""

    def __init__(self, server: SocketServer) -> None:
        self.server = server
        self._reader = FrameReader(MAX_STRANGER_BYTES)
        self._challenge = secrets.token_bytes(32)
        self._proved = False

    def take(self, kind: int, call: int, body: bytes) -> None:
        """One frame. Raises ``FrameError`` for one that has no place here: the connection ends."""
        raise NotImplementedError

    def taken(self) -> None:
        """All that arrived together has been taken."""

    def ended(self) -> None:
        """The connection is gone."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        set_options(transport.get_extra_info("socket"))
        self.server.connections.add(self)
        self.send([head(Kind.CHALLENGE, 0, len(self._challenge)), self._challenge])
        self._hello_due = asyncio.get_running_loop().call_later(HELLO_S, self._late)

    def connection_lost(self, exc: Exception | None) -> None:
        self.server.connections.discard(self)
        self._hello_due.cancel()
        self.ended()

    def get_buffer(self, sizehint: int) -> memoryview:
        del sizehint
        return self._reader.free()

    def buffer_updated(self, nbytes: int) -> None:
        try:
            for kind, call, body in self._reader.received(nbytes):
                if self._proved:
                    self.take(kind, call, body)
                else:
                    self._welcome(kind, body)
        except FrameError as error:
            logger.warning("a connection to the %s was ended: %s", self.server.what, error)
            self.transport.abort()
        self.taken()

    def end(self) -> None:
        self.transport.abort()

    def send(self, frames: Sequence[Buffer]) -> None:
        if not self.transport.is_closing():
            self.transport.writelines(frames)

    def _welcome(self, kind: int, body: bytes) -> None:
        if kind != Kind.HELLO or not hmac.compare_digest(body, prove(self.server.token, self._challenge)):
            raise FrameError("it does not know the token of this run")
        self._proved = True
        self._reader.max_body = self.server.max_body
        self._hello_due.cancel()
        self.send([head(Kind.WELCOME, 0, 0)])

    def _late(self) -> None:
        logger.warning(
            "a connection to the %s was ended: it did not prove itself within %g s", self.server.what, HELLO_S
        )
        self.transport.abort()


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


def error_frame(call: int, message: str) -> list[bytes]:
    """Why a call failed."""
    body = message.encode()
    return [head(Kind.ERROR, call, len(body)), body]


def own_address() -> str:
    """The address under which this machine is known in the Ray cluster; empty outside of one."""
    ray = sys.modules.get("ray")  # outside of a cluster it need not even be installed
    return str(ray.util.get_node_ip_address()) if ray is not None and ray.is_initialized() else ""
