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

The side that dials may be able to write into the other one's cache. Therefore it hangs up only after its event loop has
learned that the connection is over, and the side that listens takes a connection for lost only after the other one has hung
up. So whoever hears ``on_lost`` there knows that nobody writes any more.
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
from dataclasses import dataclass

from torch import Tensor

from rollout_workers.disaggregation.cache_memory import CachePlace, PeerCache, map_cache
from rollout_workers.disaggregation.messages import (
    LENGTH,
    MAX_FRAME,
    Hello,
    KvAddress,
    KvLinkError,
    Message,
    Piece,
    Reach,
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


@dataclass(frozen=True)
class Greeting:
    """What two sides of a new connection have agreed on."""

    ring: RingMemory
    inline: bool
    """Whether pieces travel over the socket."""
    direct: bool
    """Whether the side that dialled writes into the other one's cache."""
    cache: PeerCache | None = None
    """That cache, on the side that dialled."""


Greet = Callable[[socket.socket], Greeting]
"""Open a connection. Raises KvLinkError or OSError."""


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
        *,
        dialled: bool,
    ) -> None:
        self.peer = peer
        self._greeting: Greeting | None = None
        self._dialled = dialled
        self._connect = connect
        self._greet = greet
        self._on_message = on_message
        self._on_lost = on_lost
        self._loop = asyncio.get_running_loop()
        self._socket: socket.socket | None = None
        self._outgoing: queue.SimpleQueue[tuple[bytes, memoryview | None] | None] = queue.SimpleQueue()
        self._closed = False
        self._over = threading.Event()
        """The event loop knows that the connection is over."""
        threading.Thread(target=self._read, name=f"kv-reader-{peer}", daemon=True).start()

    @property
    def greeting(self) -> Greeting:
        """Known when the first message has arrived."""
        assert self._greeting is not None, "the other side has not answered yet"
        return self._greeting

    @property
    def ring(self) -> RingMemory:
        """The memory of the ring."""
        return self.greeting.ring

    @property
    def cache(self) -> PeerCache | None:
        """The other side's cache, as long as it may be written into."""
        return None if self._closed or self._greeting is None else self._greeting.cache

    def send(self, message: Message) -> None:
        """Queue a message; a piece's bytes must stay in the ring until its credit comes back."""
        payload = None
        if isinstance(message, Piece) and self.greeting.inline:
            payload = self.ring.part(message.offset, message.nbytes)
        self._outgoing.put((frame(message), payload))

    def close(self) -> None:
        """End the connection; what was queued may not arrive. Nothing is called back from now on."""
        self._closed = True
        self._over.set()
        self._outgoing.put(None)
        self._shut(socket.SHUT_RDWR)

    def _shut(self, how: int) -> None:
        if self._socket is not None:
            try:
                self._socket.shutdown(how)
            except OSError:  # closed by the other side already
                logger.debug("the connection to %s was closed before", self.peer)

    # ---------------------------------------------------------------------------------------------------- the threads

    def _read(self) -> None:
        try:
            with self._connect() as connection:
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
                connection.settimeout(HANDSHAKE_S)
                self._greeting = self._greet(connection)
                connection.settimeout(None)
                self._socket = connection
                if not self._closed:
                    self._exchange(connection)
        except (OSError, KvLinkError, ValueError) as error:
            self._tell(self._lose, error)

    def _exchange(self, connection: socket.socket) -> None:
        writer = threading.Thread(target=self._write, args=(connection,), name=f"kv-writer-{self.peer}", daemon=True)
        writer.start()
        try:
            while True:
                self._take(connection)
        except (OSError, KvLinkError, ValueError) as error:
            if self._dialled:
                self._tell(self._lose, error)
                self._wait_until_told()
            else:
                self._shut(socket.SHUT_WR)
                self._drain(connection)
                self._tell(self._lose, error)
        finally:
            self._outgoing.put(None)
            self._shut(socket.SHUT_RDWR)
            writer.join(HANDSHAKE_S)

    def _wait_until_told(self) -> None:
        """Until the event loop writes into the other side's cache no more."""
        while not self._over.wait(HANDSHAKE_S) and not self._loop.is_closed():
            logger.warning("the event loop is busy: the lost connection to %s stays open", self.peer)

    def _drain(self, connection: socket.socket) -> None:
        """Until the other side has hung up."""
        if not self.greeting.direct:
            return
        connection.settimeout(HANDSHAKE_S)
        while not self._closed:
            try:
                if not connection.recv(1 << 16):
                    return
            except TimeoutError:
                logger.warning("%s does not hang up: what was lent to it is kept", self.peer)
            except OSError:  # hung up less politely
                return

    def _take(self, connection: socket.socket) -> None:
        message = receive(connection)
        if isinstance(message, Piece):
            place = self.ring.part(message.offset, message.nbytes)  # also checks that it lies in the ring
            if self.greeting.inline:
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
            self._shut(socket.SHUT_RD)  # the reader notices, and tells

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
        self._over.set()


def dial(
    address: KvAddress,
    layout: str,
    ring_bytes: int,
    transport: str,
    tensors: list[Tensor] | None,
    on_message: Callable[[KvLink, Message], None],
    on_lost: Callable[[KvLink, Exception], None],
) -> KvLink:
    """A connection to an engine that listens. Returns at once: what is sent meanwhile waits.

    ``tensors``: this engine's cache, if KV may be written into the other one's, which then looks like it.
    """

    def greet(connection: socket.socket) -> Greeting:
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
        cache = map_cache(answer.cache, tensors) if answer.cache is not None and tensors is not None else None
        connection.sendall(frame(Reach(cache is not None)))
        return Greeting(ring, not answer.shared, cache is not None, cache)

    def connect() -> socket.socket:
        return socket.create_connection((address.host, address.port), timeout=HANDSHAKE_S)

    return KvLink(f"{address.host}:{address.port}", connect, greet, on_message, on_lost, dialled=True)


class KvListener:
    """Accepts connections at ``address``. Made and closed on the event loop that hears of messages.

    ``cache``: where callers may write into this engine's slots.
    """

    def __init__(
        self,
        host: str,
        layout: str,
        cache: CachePlace | None,
        on_message: Callable[[KvLink, Message], None],
        on_lost: Callable[[KvLink, Exception], None],
    ) -> None:
        self._layout, self._cache = layout, cache
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
        link = KvLink(peer, lambda: connection, self._greet, self._on_message, self._lost, dialled=False)
        self._links.append(link)

    def _lost(self, link: KvLink, error: Exception) -> None:
        self._links.remove(link)
        self._on_lost(link, error)

    def _greet(self, connection: socket.socket) -> Greeting:
        hello = receive(connection)
        if not isinstance(hello, Hello) or not hmac.compare_digest(hello.secret, self.address.secret):
            raise KvLinkError("a caller that does not know the secret")
        if hello.layout != self._layout or not 0 < hello.ring_bytes <= MAX_RING_BYTES:
            refused = f"its KV is {hello.layout} in a ring of {hello.ring_bytes} bytes, here it is {self._layout}"
            connection.sendall(frame(Welcome(refused=refused)))
            raise KvLinkError(refused)
        ring = map_ring(hello.ring_path, hello.ring_nonce, hello.ring_bytes)
        connection.sendall(frame(Welcome(shared=ring is not None, cache=self._cache)))
        answer = receive(connection)
        if not isinstance(answer, Reach):
            raise KvLinkError(f"{type(answer).__name__} where the caller should say what it reaches")
        return Greeting(ring or private_ring(hello.ring_bytes), ring is None, answer.cache and self._cache is not None)


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
