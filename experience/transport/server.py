"""The queue's side of the transport: accepts connections, hands frames to a `QueuePort`, answers when it is durable.

A producer whose episode does not fit into the byte budget is not read from until there is space: at most one buffer of
a connection is held, the rest stays with the producer. A connection that adds must therefore not lease.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from typing import Protocol

from experience.entries import Added, LeasedGroup
from experience.journal import JournalError
from experience.transport.frames import LETTER_OF, MAX_BODY_BYTES, FrameError, Kind, LeaseRequest, head
from experience.transport.listening import ProvedConnection, SocketServer, error_frame
from experience.wire import Buffer, WireFormatError, decode

logger = logging.getLogger(__name__)


class QueuePort(Protocol):
    """What the server needs of a queue. All methods are called on the event loop."""

    def add_encoded(self, payload: bytes) -> Added:
        """Take one encoded `EpisodeEntry`. Raises ``WireFormatError``."""

    def when_durable(self, answer: Callable[[Exception | None], None]) -> None:
        """Call ``answer`` once all that was taken so far is durable, or with why it cannot be."""

    async def lease_groups(self, request: LeaseRequest) -> list[LeasedGroup]:
        """Up to ``limit`` groups, none after the time-out."""


class QueueServer(SocketServer):
    """Where producers and consumers of a queue connect."""

    def __init__(self, port: QueuePort, max_body: int = MAX_BODY_BYTES) -> None:
        super().__init__("queue", max_body)
        self.port = port

    def make_connection(self) -> ProvedConnection:
        return _QueueConnection(self, self.port)

    def space(self) -> None:
        """The byte budget has room again: go on with the producers that were refused, in turn."""
        for connection in list(self.connections):
            if isinstance(connection, _QueueConnection):
                connection.resume()


class _QueueConnection(ProvedConnection):
    """One producer or consumer."""

    def __init__(self, server: SocketServer, port: QueuePort) -> None:
        super().__init__(server)
        self.port = port
        self._answers: list[tuple[int, Added | str]] = []
        self._refused: deque[tuple[int, bytes]] = deque()
        self._leases: set[asyncio.Task[None]] = set()

    def ended(self) -> None:
        self._refused.clear()
        for lease in self._leases:
            lease.cancel()

    def take(self, kind: int, call: int, body: bytes) -> None:
        if kind == Kind.ADD:
            self._add(call, body)
        elif kind == Kind.LEASE:
            self._begin_lease(call, body)
        else:
            raise FrameError(f"a frame of kind {kind} is not for a queue")

    def resume(self) -> None:
        """Offer again what did not fit."""
        if not self._refused:
            return
        waiting, self._refused = self._refused, deque()
        for call, body in waiting:
            self._add(call, body)
        if not self._refused:
            self.transport.resume_reading()
        self.taken()

    def _add(self, call: int, body: bytes) -> None:
        if self._refused:
            self._refused.append((call, body))
            return
        try:
            added = self.port.add_encoded(body)
        except WireFormatError as error:
            self._answers.append((call, f"not an episode: {error}"))
            return
        except JournalError as error:
            self._answers.append((call, str(error)))
            return
        if added is not Added.FULL:
            self._answers.append((call, added))
            return
        self._refused.append((call, body))
        self.transport.pause_reading()

    def taken(self) -> None:
        answers, self._answers = self._answers, []
        if answers:
            self.port.when_durable(lambda error: self.send(_frames_of(answers, error)))

    def _begin_lease(self, call: int, body: bytes) -> None:
        try:
            request = decode(body, LeaseRequest)
        except WireFormatError as error:
            self.send(error_frame(call, f"not a lease request: {error}"))
            return
        lease = asyncio.get_running_loop().create_task(self._lease(call, request))
        self._leases.add(lease)
        lease.add_done_callback(self._leases.discard)

    async def _lease(self, call: int, request: LeaseRequest) -> None:
        try:
            groups = await self.port.lease_groups(request)
        except Exception as error:
            logger.exception("a lease for %s failed", request.consumer)
            self.send(error_frame(call, f"{type(error).__name__}: {error}"))
            return
        frames: list[Buffer] = []
        for group in groups:
            parts = group.encode_parts()
            frames += (head(Kind.GROUP, call, sum(len(part) for part in parts)), *parts)
        self.send([*frames, head(Kind.LEASED, call, 0)])


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
            frames += error_frame(call, answer if error is None else str(error))
        else:
            letters, of_call = letters + letter, call
    if letters:
        frames += (head(Kind.ADDED, of_call, len(letters)), letters)
    return [b"".join(frames)]
