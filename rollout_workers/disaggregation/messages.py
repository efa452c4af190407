"""What a prefill and a decode engine tell each other, and how it is framed: four bytes of length, then msgpack.

=============  ==========  ===============================================================================
message        from        says
=============  ==========  ===============================================================================
``Hello``      prefill     who is calling, and where the ring is (once, first)
``Welcome``    decode      whether the ring is shared memory to both, and where the KV cache is; ``refused``: why there is
                           no connection
``Reach``      prefill     whether it can write into that cache
``Announce``   prefill     a hand-off begins
``Answer``     decode      how much of it is there already and into which slot the rest goes, or (at any later time) why it
                           is not wanted
``Written``    prefill     some tokens' KV is in the slot
``Piece``      prefill     some tokens' KV lies in the ring; without a shared ring its bytes follow the frame
``Credit``     decode      the oldest piece was taken in: its place in the ring is free
``End``        prefill     that was all; the slot is not written into any more
``Cancel``     prefill     no more will come, nor be written; the answer to every refusal, too
=============  ==========  ===============================================================================
"""

from __future__ import annotations

import struct

import msgspec

from rollout_workers.disaggregation.cache_memory import CachePlace

LENGTH = struct.Struct("<I")
MAX_FRAME = 16 << 20
"""Bytes of the largest frame (a prompt is four bytes a token)."""


class KvLinkError(RuntimeError):
    """A connection between two engines could not be made, broke, or carried what makes no sense."""


class Hello(msgspec.Struct, frozen=True, tag="hello"):
    secret: str
    layout: str
    """What KV looks like (`KvExchange.layout`): both sides must agree."""
    ring_bytes: int
    ring_path: str = ""
    """The ring in shared memory; empty: pieces shall travel over the connection."""
    ring_nonce: str = ""
    """What the file begins with."""


class Welcome(msgspec.Struct, frozen=True, tag="welcome"):
    shared: bool = False
    refused: str = ""
    cache: CachePlace | None = None


class Reach(msgspec.Struct, frozen=True, tag="reach"):
    cache: bool


class Announce(msgspec.Struct, frozen=True, tag="announce"):
    handoff_id: str
    session: str
    prompt: bytes
    """int32 little-endian: the tokens whose KV will come."""
    version: int
    """The policy version that computes it."""
    pin: int | None
    """It is pinned for this request; None: it is what the engine serves."""
    max_tokens: int
    """Tokens that the request may still sample."""
    prefix_group: str = ""
    """Sessions of one group begin alike."""


class Answer(msgspec.Struct, frozen=True, tag="answer"):
    handoff_id: str
    have: int = 0
    refused: str = ""
    """A `Reason`; empty: accepted."""
    slot: int | None = None
    """KV is written into this slot; None: it goes through the ring."""


class Written(msgspec.Struct, frozen=True, tag="written"):
    handoff_id: str
    start: int
    end: int
    nbytes: int
    version: int
    oldest: int
    """As of a `Piece`."""


class Piece(msgspec.Struct, frozen=True, tag="piece"):
    handoff_id: str
    start: int
    end: int
    offset: int
    nbytes: int
    version: int
    oldest: int
    """Oldest version that computed any KV of the sequence (older than ``version`` only where KV is kept over updates)."""


class Credit(msgspec.Struct, frozen=True, tag="credit"):
    offset: int


class End(msgspec.Struct, frozen=True, tag="end"):
    handoff_id: str
    wanted: bool
    """Whether a request will come for it; otherwise it is only kept for the session's next turn."""


class Cancel(msgspec.Struct, frozen=True, tag="cancel"):
    handoff_id: str
    reason: str


Message = Hello | Welcome | Reach | Announce | Answer | Written | Piece | Credit | End | Cancel

_ENCODER = msgspec.msgpack.Encoder()
_DECODER: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(Message)


def frame(message: Message) -> bytes:
    """A message as it goes over the wire."""
    body = _ENCODER.encode(message)
    return LENGTH.pack(len(body)) + body


def parse(body: bytes | memoryview) -> Message:
    """Raises KvLinkError for anything but one message."""
    try:
        return _DECODER.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise KvLinkError(f"not a message: {error}") from error


class KvAddress(msgspec.Struct, frozen=True):
    """Where an engine listens for others' KV."""

    host: str
    port: int
    secret: str

    def __str__(self) -> str:
        return f"{self.host}:{self.port}:{self.secret}"

    @classmethod
    def parse(cls, text: str) -> KvAddress:
        """Raises KvLinkError unless ``text`` is ``host:port:secret``."""
        host, _, rest = text.partition(":")
        port, _, secret = rest.partition(":")
        if not (host and port.isdigit() and secret):
            raise KvLinkError(f"{text!r} is no address of an engine; it must be host:port:secret")
        return cls(host, int(port), secret)
