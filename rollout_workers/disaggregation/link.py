"""A connection between a prefill and a decode engine: messages both ways, KV one way.

Each connection has two threads, because an engine's event loop is busy computing most of the time:

==========  ================================  =======================================  ===========================
thread      consumes                          produces                                 waits for
==========  ================================  =======================================  ===========================
reader      the socket                        ``on_message`` calls on the event loop   the other side
writer      what `send` queued                the socket                               `send`, room in the socket
==========  ================================  =======================================  ===========================

With a shared ring, pieces do not pass through the socket at all. Without one, the writer sends a piece's bytes from its ring
behind the frame, and the reader puts them at the same place of a ring of its own: the two engines see no difference.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import queue
import secrets
import socket
import threading
from collections.abc import Callable

from rollout_workers.disaggregation.messages import (
    LENGTH,
    MAX_FRAME,
    Hello,
    KvAddress,
    KvLinkError,
    Message,
    Piece,
    Welcome,
    frame,
    parse,
)
from rollout_workers.disaggregation.ring_memory import (
    MAX_RING_BYTES,
    RingMemory,
    map_ring,
    private_ring,
    shared_ring,
)

logger = logging.getLogger(__name__)

HANDSHAKE_S = 10.0

Greet = Callable[[socket.socket], "tuple[RingMemory, bool]"]
"""Open a connection: returns the ring and whether pieces travel over the socket. Raises KvLinkError or OSError."""


class KvLink:
    """One side of a connection. All methods and callbacks belong to the event loop that it was made on.

    ``on_message`` gets every message in order; ``on_lost`` is called once, with why the connection ended, unless `close`
    was called before.
    """

    def __init__(
        self,
        peer: str,
        connect: Callable[[], socket.socket],
        greet: Greet,
        on_message: Callable[[KvLink, Message], None],
        on_lost: Callable[[KvLink, Exception], None],
    ) -> None:
        self.peer = peer
        self.inline = False
        """Whether pieces travel over the socket."""
        self._ring: RingMemory | None = None
        self._connect = connect
        self._greet = greet
        self._on_message = on_message
        self._on_lost = on_lost
        self._loop = asyncio.get_running_loop()
        self._socket: socket.socket | None = None
        self._outgoing: queue.SimpleQueue[tuple[bytes, memoryview | None] | None] = queue.SimpleQueue()
        self._closed = False
        threading.Thread(target=self._read, name=f"kv-reader-{peer}", daemon=True).start()

    @property
    def ring(self) -> RingMemory:
        """The memory of the ring, known when the first message has arrived."""
        assert self._ring is not None, "the other side has not answered yet"
        return self._ring

    def send(self, message: Message) -> None:
        """Queue a message; a piece's bytes must stay in the ring until its credit comes back."""
        inline = isinstance(message, Piece) and self.inline
        payload = self.ring.part(message.offset, message.nbytes) if inline and isinstance(message, Piece) else None
        self._outgoing.put((frame(message), payload))

    def close(self) -> None:
        """End the connection; what was queued may not arrive. Nothing is called back from now on."""
        self._closed = True
        self._outgoing.put(None)
        self._shut()

    def _shut(self) -> None:
        if self._socket is not None:
            try:
                self._socket.shutdown(socket.SHUT_RDWR)
            except OSError:  # closed by the other side already
                logger.debug("the connection to %s was closed before", self.peer)

    # ---------------------------------------------------------------------------------------------------- the threads

    def _read(self) -> None:
        try:
            with self._connect() as connection:
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
                connection.settimeout(HANDSHAKE_S)
                self._ring, self.inline = self._greet(connection)
                connection.settimeout(None)
                self._socket = connection
                if self._closed:
                    return
                writer = threading.Thread(target=self._write, args=(connection,), name=f"kv-writer-{self.peer}")
                writer.daemon = True
                writer.start()
                try:
                    while True:
                        self._take(connection)
                finally:
                    self._outgoing.put(None)
                    self._shut()
                    writer.join(HANDSHAKE_S)
        except (OSError, KvLinkError, ValueError) as error:
            self._tell(self._lose, error)

    def _take(self, connection: socket.socket) -> None:
        message = receive(connection)
        if isinstance(message, Piece):
            place = self.ring.part(message.offset, message.nbytes)  # also checks that it lies in the ring
            if self.inline:
                fill(connection, place)
        self._tell(self._message, message)

    def _write(self, connection: socket.socket) -> None:
        try:
            while (item := self._outgoing.get()) is not None:
                data, payload = item
                connection.sendall(data)
                if payload is not None:
                    connection.sendall(payload)
        except OSError as error:
            logger.debug("writing to %s: %s", self.peer, error)
            self._shut()  # the reader notices, and tells

    def _tell(self, call: Callable[..., None], argument: Message | Exception) -> None:
        try:
            self._loop.call_soon_threadsafe(call, argument)
        except RuntimeError:
            logger.debug("the event loop ended before the connection to %s", self.peer)

    # ------------------------------------------------------------------------------------------------ on the event loop

    def _message(self, message: Message) -> None:
        if not self._closed:
            self._on_message(self, message)

    def _lose(self, error: Exception) -> None:
        if not self._closed:
            self._closed = True
            self._on_lost(self, error)


def dial(
    address: KvAddress,
    layout: str,
    ring_bytes: int,
    transport: str,
    on_message: Callable[[KvLink, Message], None],
    on_lost: Callable[[KvLink, Exception], None],
) -> KvLink:
    """A connection to an engine that listens. Returns at once: what is sent meanwhile waits."""

    def greet(connection: socket.socket) -> tuple[RingMemory, bool]:
        ring = private_ring(ring_bytes) if transport == "tcp" else shared_ring(ring_bytes)
        try:
            connection.sendall(frame(Hello(address.secret, layout, ring_bytes, ring.path, ring.nonce)))
            answer = receive(connection)
        finally:
            ring.forget_path()
        if not isinstance(answer, Welcome):
            raise KvLinkError(f"{address.host}:{address.port} answered with {type(answer).__name__}")
        if answer.refused:
            raise KvLinkError(answer.refused)
        if transport == "shared_memory" and not answer.shared:
            raise KvLinkError(
                "engines.handoff.transport=shared_memory, but the two engines have no shared memory: set it to auto"
            )
        return ring, not answer.shared

    def connect() -> socket.socket:
        return socket.create_connection((address.host, address.port), timeout=HANDSHAKE_S)

    return KvLink(f"{address.host}:{address.port}", connect, greet, on_message, on_lost)


class KvListener:
    """Accepts connections at ``address``. Made and closed on the event loop that hears of messages."""

    def __init__(
        self,
        host: str,
        layout: str,
        on_message: Callable[[KvLink, Message], None],
        on_lost: Callable[[KvLink, Exception], None],
    ) -> None:
        self._layout = layout
        self._on_message, self._on_lost = on_message, on_lost
        self._links: list[KvLink] = []
        self._loop = asyncio.get_running_loop()
        self._socket = socket.create_server((host, 0))
        self.address = KvAddress(host, self._socket.getsockname()[1], secrets.token_hex(16))
        threading.Thread(target=self._accept, name="kv-listener", daemon=True).start()

    def close(self) -> None:
        """Accept nothing more and end all connections."""
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError as error:
            logger.debug("closing the listener: %s", error)
        self._socket.close()
        for link in self._links:
            link.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, peer = self._socket.accept()
                self._loop.call_soon_threadsafe(self._open, connection, f"{peer[0]}:{peer[1]}")
            except (OSError, RuntimeError):  # closed, here or with the event loop
                return

    def _open(self, connection: socket.socket, peer: str) -> None:
        self._links.append(KvLink(peer, lambda: connection, self._greet, self._on_message, self._lost))

    def _lost(self, link: KvLink, error: Exception) -> None:
        self._links.remove(link)
        self._on_lost(link, error)

    def _greet(self, connection: socket.socket) -> tuple[RingMemory, bool]:
        hello = receive(connection)
        if not isinstance(hello, Hello) or not hmac.compare_digest(hello.secret, self.address.secret):
            raise KvLinkError("a caller that does not know the secret")
        if hello.layout != self._layout or not 0 < hello.ring_bytes <= MAX_RING_BYTES:
            refused = f"its KV is {hello.layout} in a ring of {hello.ring_bytes} bytes, here it is {self._layout}"
            connection.sendall(frame(Welcome(refused=refused)))
            raise KvLinkError(refused)
        ring = map_ring(hello.ring_path, hello.ring_nonce, hello.ring_bytes)
        connection.sendall(frame(Welcome(shared=ring is not None)))
        return ring or private_ring(hello.ring_bytes), ring is None


def receive(connection: socket.socket) -> Message:
    """The next message. Raises KvLinkError at the end of the stream and for what is no message, OSError as sockets do."""
    head = bytearray(LENGTH.size)
    fill(connection, memoryview(head))
    (size,) = LENGTH.unpack(head)
    if size > MAX_FRAME:
        raise KvLinkError(f"a frame of {size} bytes; at most {MAX_FRAME} are allowed")
    body = bytearray(size)
    fill(connection, memoryview(body))
    return parse(memoryview(body))


def fill(connection: socket.socket, place: memoryview) -> None:
    """Receive exactly as many bytes as ``place`` has."""
    at = 0
    while at < len(place):
        count = connection.recv_into(place[at:])
        if not count:
            raise KvLinkError("the other engine closed the connection")
        at += count
