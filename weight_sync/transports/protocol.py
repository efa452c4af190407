"""The interface of every transport, and the offers that travel ahead of the bytes.

One order of calls works for all of them::

    learner                                        engines (each in a thread of its own)
    offer = sender.prepare(version, named, members)
                         ── offer (small bytes, any RPC) ──►
                                                   receiver.fetch(offer, on_tensor)
    sender.send()        ══ the weights ══════════►    on_tensor(name, tensor) ...

``prepare`` copies the weights, so the learner may change them as soon as it returns, while ``send`` still runs.
``send`` must run at the same time as the receivers' ``fetch`` (it returns at once where the bytes can be read without
the sender). ``offer`` makes another offer of the same version, for engines that join or have to try again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import msgspec

from weight_sync.errors import WeightTransferError
from weight_sync.plan import Manifest

if TYPE_CHECKING:
    from weight_sync.tensors import NamedTensors

OnTensor = Callable[[str, Any], None]
"""Called with a Hugging Face name and a tensor that is valid only during the call: copy it."""


class SharedMemoryOffer(msgspec.Struct, frozen=True, kw_only=True, tag="shared_memory"):
    """The version lies in a file that engines of the same node can map."""

    manifest: Manifest
    path: str
    publication: int
    """Counts the sender's publications: a file whose header shows another one has been written again."""
    node: str
    """Host name of the sender's node."""


class CollectiveOffer(msgspec.Struct, frozen=True, kw_only=True, tag="collective"):
    """The version will be broadcast from rank 0 of the process group ``epoch``, whose members meet at a store."""

    manifest: Manifest
    host: str
    port: int
    epoch: int
    serial: int
    """Counts the sender's offers."""
    backend: str
    """``gloo`` or ``nccl``."""
    ranks: dict[str, int]
    """Rank of each receiver, by member name, from 1."""
    timeout_s: float


class DiskOffer(msgspec.Struct, frozen=True, kw_only=True, tag="disk"):
    """The version lies in a safetensors file in the directory ``path``."""

    manifest: Manifest
    path: str
    node: str
    """Host name of the node that wrote it."""


class RelayOffer(msgspec.Struct, frozen=True, kw_only=True, tag="relay"):
    """The version can be pulled, from a stager or from the sender itself."""

    manifest: Manifest
    """With checksums."""
    key: str
    """Names this publication among all senders'."""
    sender: str
    source: tuple[str, int]
    """Host and port where the sender gives its bytes."""
    routes: dict[str, tuple[str, int]]
    """Host and port of the stager of each receiver, by member name."""
    timeout_s: float


class DeltaOffer(msgspec.Struct, frozen=True, kw_only=True, tag="delta"):
    """A version of a sender that sends changes: whole, or as the change of the version ``base``."""

    manifest: Manifest
    """Of the whole version."""
    chain: str
    """Names the sender's life: a change applies to nothing that came from elsewhere."""
    base: int
    """The version it is a change of; `WHOLE`: of none."""
    carried: bytes
    """The offer of another transport: of all tensors, or of the encoded change, named `DELTA`."""


class ShardedOffer(msgspec.Struct, frozen=True, kw_only=True, tag="sharded"):
    """A version whose tensors come from several senders, each of which offers its own."""

    manifest: Manifest
    """Of all tensors."""
    parts: tuple[bytes, ...]
    """One encoded offer a sender, all of the same version."""


WHOLE = -1
DELTA = "delta"

Offer = SharedMemoryOffer | CollectiveOffer | DiskOffer | RelayOffer | DeltaOffer | ShardedOffer

_DECODER = msgspec.msgpack.Decoder(Offer)


def encode_offer(offer: Offer) -> bytes:
    return msgspec.msgpack.encode(offer)


def decode_offer(data: bytes) -> Offer:
    """Raises WeightTransferError for anything but a consistent offer."""
    try:
        offer: Offer = _DECODER.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise WeightTransferError(f"not an offer of weights: {error}") from error
    offer.manifest.check()
    return offer


def carriers(data: bytes) -> list[Offer]:
    """The offers that bytes move by: the offer itself, or those that it is made of."""
    offer = decode_offer(data)
    if isinstance(offer, DeltaOffer):
        return carriers(offer.carried) if offer.carried else []
    if isinstance(offer, ShardedOffer):
        return [carrier for part in offer.parts for carrier in carriers(part)]
    return [offer]


def is_broadcast(data: bytes) -> bool:
    """Whether only the named members can receive it, and only while it is sent."""
    return any(isinstance(carrier, CollectiveOffer) for carrier in carriers(data))


class WeightSender(Protocol):
    """The learner's side.

    ``send`` may run in another thread than the rest, but an offer and its ``send`` belong together: the caller makes the
    next offer after the ``send`` of the one before.
    """

    kind: str

    def prepare(self, version: int, named: NamedTensors, members: Sequence[str]) -> bytes:
        """Copies the weights, tensor by tensor as the iterator gives them, and returns the encoded offer for these members.

        Tensors that share storage may be given once or several times; they are sent once, under their first name.
        Raises WeightTransferError if the weights cannot be laid out or stored.
        """
        ...

    def offer(self, members: Sequence[str]) -> bytes:
        """The last prepared version again, for these members; ``send`` must follow.

        Raises WeightTransferError if no version has been prepared.
        """
        ...

    def send(self) -> None:
        """Moves the bytes to the members of the last offer; returns when all have them.

        Raises WeightTransferError within the transport's time-out when a member is gone; the next ``offer`` starts
        afresh.
        """
        ...

    def cancel(self) -> None:
        """End a `send` under way in another thread with an error: a member is known to be gone."""
        ...

    def taken(self, member: str, version: int) -> None:
        """A member got ``version`` without this sender's help (from a stager)."""
        ...

    def close(self) -> None: ...


class StandingSender:
    """What senders have in common whose versions lie somewhere for whoever comes: there is nothing to send."""

    _prepared: Any = None
    """The offer of the last version."""

    def offer(self, members: Sequence[str] = ()) -> bytes:
        if self._prepared is None:
            raise WeightTransferError("no version has been prepared yet: call prepare first")
        return encode_offer(self._prepared)

    def send(self) -> None:
        if self._prepared is None:
            raise WeightTransferError("no version has been prepared yet: call prepare first")

    def cancel(self) -> None:
        """Nothing is ever under way."""

    def taken(self, member: str, version: int) -> None:
        """It makes no difference."""


class WeightReceiver(Protocol):
    """An engine's side."""

    def fetch(self, offer: bytes, on_tensor: OnTensor) -> int:
        """Blocks until every tensor of the offer has been handed to ``on_tensor``; returns the version.

        Raises WeightTransferError if bytes are missing, damaged, overwritten or late: what was handed over must then be
        thrown away.
        """
        ...

    def close(self) -> None: ...


def with_routes(offer: bytes, routes: Mapping[str, tuple[str, int]]) -> bytes:
    """The offer with the stager of each member, also inside of what it is made of; others stay as they are."""
    decoded = decode_offer(offer)
    if isinstance(decoded, RelayOffer):
        return encode_offer(msgspec.structs.replace(decoded, routes=dict(routes)))
    if isinstance(decoded, DeltaOffer) and decoded.carried:
        return encode_offer(msgspec.structs.replace(decoded, carried=with_routes(decoded.carried, routes)))
    if isinstance(decoded, ShardedOffer):
        parts = tuple(with_routes(part, routes) for part in decoded.parts)
        return encode_offer(msgspec.structs.replace(decoded, parts=parts))
    return offer
