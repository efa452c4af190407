"""Frames on a byte stream: ``body length (4) | call number (4) | kind (1) | body``, little-endian.

===========  ==================  ==============================================================================
kind         from                body
===========  ==================  ==============================================================================
challenge    queue, on connect   random bytes
hello        client, first       what `prove` makes of the challenge with the token of the run
welcome      queue               nothing
add          producer            one encoded `EpisodeEntry`; a call may have several of these frames
added        queue               one letter an episode (`LETTER_OF`), in the order of the call
lease        consumer            one encoded `LeaseRequest`
group        queue               one encoded group, for each group leased
leased       queue               nothing: the end of the call
error        queue, actor        why a call failed, as text
call + n     client              the argument of an actor's method number n (see `experience.transport.lane`)
returned     actor               what the method returned
===========  ==================  ==============================================================================

No frame holds code: bodies are msgpack, decoded into declared types, and none is larger than the reader's bound.
"""

from __future__ import annotations

import hmac
import struct
from collections.abc import Iterator
from enum import IntEnum

import msgspec

from experience.entries import Added

HEAD = struct.Struct("<IIB")
MAX_BODY_BYTES = 1 << 30
"""Largest body that is read from a peer that has proved itself."""
MAX_STRANGER_BYTES = 256
"""Largest body that is read from a peer that has not."""
BUFFER_BYTES = 1 << 20

LETTER_OF = {Added.ACCEPTED: b"a", Added.DUPLICATE: b"d", Added.UNKNOWN: b"u"}
ADDED_OF = {letter[0]: added for added, letter in LETTER_OF.items()}


class Kind(IntEnum):
    """What a frame is; see the module's docstring."""

    CHALLENGE = 1
    HELLO = 2
    WELCOME = 3
    ADD = 4
    ADDED = 5
    LEASE = 6
    GROUP = 7
    LEASED = 8
    ERROR = 9
    RETURNED = 10
    CALL = 64
    """And all above it: the number of a method is added."""


class FrameError(ConnectionError):
    """What arrived is not a frame, or larger than is allowed; the connection is of no more use."""


class Endpoint(msgspec.Struct, frozen=True, kw_only=True):
    """Where a queue or another actor listens."""

    local: str
    """Name of a Unix socket in Linux's abstract name space, for processes of the same machine."""
    host: str
    port: int
    """For all others; 0: none."""
    token: bytes


class LeaseRequest(msgspec.Struct, frozen=True, kw_only=True):
    """Body of ``lease``. A request with the ``number`` of the one before is the same one again, after a lost answer."""

    consumer: str
    limit: int
    version: int
    timeout_s: float
    number: int


def prove(token: bytes, challenge: bytes) -> bytes:
    """What only a holder of the token can say to a challenge."""
    return hmac.digest(token, challenge, "sha256")


def head(kind: int, call: int, body_bytes: int) -> bytes:
    """All of a frame that comes before its body."""
    return HEAD.pack(body_bytes, call, kind)


class FrameReader:
    """Cuts a byte stream into frames; the stream is received into its buffer."""

    def __init__(self, max_body: int) -> None:
        self.max_body = max_body
        self._buffer = bytearray(BUFFER_BYTES)
        self._begin = 0
        self._end = 0

    def free(self) -> memoryview:
        """Where the next bytes go; never empty."""
        return memoryview(self._buffer)[self._end :]

    def received(self, count: int) -> Iterator[tuple[int, int, bytes]]:
        """(kind, call, body) of each frame that ``count`` more bytes in ``free`` complete.

        Raises ``FrameError`` at a frame over the bound.
        """
        self._end += count
        while self._end - self._begin >= HEAD.size:
            length, call, kind = HEAD.unpack_from(self._buffer, self._begin)
            if length > self.max_body:
                raise FrameError(f"a frame of {length} bytes is over the limit of {self.max_body}")
            begin = self._begin + HEAD.size
            if begin + length > self._end:
                self._make_room(HEAD.size + length)
                return
            self._begin = begin + length
            with memoryview(self._buffer) as view:
                body = bytes(view[begin : self._begin])
            yield kind, call, body
        self._make_room(HEAD.size)

    def _make_room(self, frame_bytes: int) -> None:
        """Move an unfinished frame to the front, where all of it fits."""
        held = self._end - self._begin
        wanted = max(BUFFER_BYTES, frame_bytes)
        if len(self._buffer) != wanted:
            larger = bytearray(wanted)
            larger[:held] = self._buffer[self._begin : self._end]
            self._buffer = larger
        elif self._begin > 0:
            self._buffer[:held] = self._buffer[self._begin : self._end]
        self._begin, self._end = 0, held
