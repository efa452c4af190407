"""An actor's busiest methods over a socket of their own, which costs both processes much less than a call through Ray.

The actor offers some of its methods by number; each takes bytes and returns bytes. A client wraps the actor's Ray handle
(`OverLane`), and what it calls travels over the socket where one can be opened, else through Ray as ever. A connection
that ends in the middle of a call raises `LaneLostError`: whether the call was carried out is not known, so the caller must
treat the actor as lost (its process, or the way to it, is).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from experience.transport.connecting import ProvedChannel, connect
from experience.transport.frames import Endpoint, FrameError, Kind, head
from experience.transport.listening import ProvedConnection, SocketServer, error_frame, own_address
from experience.wire import decode, encode

logger = logging.getLogger(__name__)

Method = Callable[[bytes], Awaitable[bytes | None]]


class LaneLostError(ConnectionError):
    """The connection ended while a call was waiting for its answer."""


class LaneCallError(RuntimeError):
    """The method raised; the message is what it raised."""


class LaneServer(SocketServer):
    """The actor's side. ``methods`` by name; their order is their number, and the names travel with the address."""

    def __init__(self, what: str, methods: Mapping[str, Method]) -> None:
        super().__init__(what)
        self.methods = tuple(methods.values())
        self._names = tuple(methods)
        self._starting = asyncio.Lock()
        self._endpoint: Endpoint | None = None

    def make_connection(self) -> ProvedConnection:
        return _LaneConnection(self, self.methods)

    async def endpoint(self) -> bytes:
        """Begin to listen, once; address and method names, encoded, or nothing where no socket can be opened."""
        async with self._starting:
            if self._endpoint is None:
                try:
                    self._endpoint = await self.start(own_address())
                except OSError as error:
                    logger.warning("calls to the %s go through Ray: %s", self.what, error)
                    return b""
        return encode((self._endpoint, self._names))


class _LaneConnection(ProvedConnection):
    def __init__(self, server: SocketServer, methods: Sequence[Method]) -> None:
        super().__init__(server)
        self._methods = methods
        self._calls: set[asyncio.Task[None]] = set()

    def take(self, kind: int, call: int, body: bytes) -> None:
        number = kind - Kind.CALL
        if not 0 <= number < len(self._methods):
            raise FrameError(f"a frame of kind {kind} is not for the {self.server.what}")
        task = asyncio.get_running_loop().create_task(self._perform(call, self._methods[number], body))
        self._calls.add(task)
        task.add_done_callback(self._calls.discard)

    def ended(self) -> None:
        for task in self._calls:
            task.cancel()

    async def _perform(self, call: int, method: Method, body: bytes) -> None:
        try:
            answer = await method(body) or b""
        except Exception as error:
            logger.exception("a call of the %s failed", self.server.what)
            self.send(error_frame(call, f"{type(error).__name__}: {error}"))
            return
        self.send([head(Kind.RETURNED, call, len(answer)), answer])


class _LaneChannel(ProvedChannel):
    """The client's side of one connection."""

    def __init__(self, token: bytes, what: str) -> None:
        super().__init__(token, what)
        self._answers: dict[int, asyncio.Future[bytes]] = {}
        self._number = 0

    def abandon(self, error: ConnectionError) -> None:
        answers, self._answers = self._answers, {}
        lost = LaneLostError(str(error))
        for answer in answers.values():
            if not answer.done():
                answer.set_exception(lost)

    async def call(self, number: int, body: bytes) -> bytes:
        if self.closed:
            raise LaneLostError(f"the connection to the {self.what} has ended")
        self._number = (self._number + 1) & 0xFFFFFFFF
        call, answer = self._number, self._loop.create_future()
        self._answers[call] = answer
        try:
            await self.write([head(Kind.CALL + number, call, len(body)), body])
            result: bytes = await answer
            return result
        finally:
            self._answers.pop(call, None)

    def take(self, kind: int, number: int, body: bytes) -> None:
        answer = self._answers.get(number)
        if answer is None or answer.done():
            return
        if kind == Kind.ERROR:
            answer.set_exception(LaneCallError(body.decode(errors="replace")))
        else:
            answer.set_result(body)


class _LaneMethod:
    """Shaped like a method of a Ray handle."""

    def __init__(self, lane: OverLane, name: str) -> None:
        self._lane = lane
        self._name = name

    def remote(self, argument: bytes | str) -> Awaitable[Any]:
        """The method's answer (bytes, or what Ray returns where there is no socket)."""
        return self._lane.call(self._name, argument)


class OverLane:
    """Shaped like the Ray handle that it wraps: the methods that the actor offers over its socket travel there.

    One connection, opened by the first such call. When it cannot be opened, Ray takes its place for good: which of two
    ways a call took must not depend on when it was made.
    """

    def __init__(self, handle: Any, what: str, names: Sequence[str], endpoint: str = "endpoint") -> None:
        """``endpoint``: the actor's method that tells where its socket is."""
        self._handle = handle
        self._endpoint = endpoint
        self._what = what
        self._over = frozenset(names)
        self._opening = asyncio.Lock()
        self._opened = False
        self._channel: _LaneChannel | None = None
        self._numbers: dict[str, int] = {}

    def __getattr__(self, name: str) -> Any:
        return _LaneMethod(self, name) if name in self._over else getattr(self._handle, name)

    @property
    def route(self) -> str:
        """How calls travel: ``unix``, ``tcp``, ``ray``, or ``not yet``."""
        if not self._opened:
            return "not yet"
        return "ray" if self._channel is None else self._channel.network

    async def call(self, name: str, argument: bytes | str) -> Any:
        """Raises `LaneLostError`, `LaneCallError`, or what Ray raises."""
        if not self._opened:
            await self._open()
        if self._channel is None or name not in self._numbers:
            return await getattr(self._handle, name).remote(argument)
        body = argument.encode() if isinstance(argument, str) else argument
        return await self._channel.call(self._numbers[name], body)

    def close(self) -> None:
        """End the connection; calls that wait for an answer end with `LaneLostError`."""
        if self._channel is not None:
            self._channel.close()

    async def _open(self) -> None:
        async with self._opening:
            if self._opened:
                return
            offer = await getattr(self._handle, self._endpoint).remote()
            if offer:
                endpoint, names = decode(offer, tuple[Endpoint, tuple[str, ...]])
                self._numbers = {name: number for number, name in enumerate(names)}
                try:
                    self._channel = await connect(endpoint, lambda: _LaneChannel(endpoint.token, self._what))
                except OSError as error:
                    logger.warning("calls to the %s go through Ray: %s", self._what, error)
            self._opened = True
