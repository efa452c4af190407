"""Versions as changes of the version before, over any transport.

The sender keeps the last version and the new one in host memory, and encodes what differs. A member that has taken the last
version is offered the change; anyone else (who joins, who refused the change, whom a snapshot is due for) the whole version. A
receiver keeps one whole version in host memory, in the dtypes of the wire, and changes that; engines get every tensor from it.
The copy is the receiver's own, because what an engine serves may have another dtype or layout.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from weight_sync.delta import DeltaChain, apply_delta, decode_delta
from weight_sync.errors import WeightTransferError
from weight_sync.plan import Manifest, PlanBuilder, TensorSpec, padded
from weight_sync.transports.protocol import DELTA, WHOLE, DeltaOffer, WeightSender, encode_offer

logger = logging.getLogger(__name__)

Bytes = npt.NDArray[np.uint8]
Fetch = Callable[[bytes, Callable[[str, Any], None]], int]
"""How a receiver fetches an offer by another transport."""


class DeltaSender:
    """Sends changes by ``carrier``, and every ``snapshot_every``-th version whole."""

    def __init__(self, carrier: WeightSender, *, snapshot_every: int, bucket_bytes: int = 64 << 20) -> None:
        self.kind = carrier.kind
        self.moved_bytes = 0
        """Bytes of the last offer: what a member gets, without the offer itself."""
        self._carrier, self._bucket_bytes = carrier, bucket_bytes
        self._chain = DeltaChain(snapshot_every)
        self._name = uuid.uuid4().hex[:12]
        self._flats: list[Any] = [None, None]  # uint8 tensors; as large as the first version turns out to be
        self._manifest: Manifest | None = None
        self._change: tuple[int, bytes] | None = None
        self._carried: tuple[int, bool] | None = None
        self._holds: dict[str, int] = {}
        self._turn = self._writing = 0

    def prepare(self, version: int, named: Any, members: Sequence[str]) -> bytes:
        from weight_sync.tensors import pack

        self._writing = self._turn ^ 1  # the other one is what the change is taken from
        self._manifest, self._change, self._carried = None, None, None
        manifest = pack(version, named, self._bucket_bytes, self._place, checksums=True)
        base = next(self._chain.versions(), WHOLE)
        flat = self._flats[self._writing]
        packed = np.zeros(0, np.uint8) if flat is None else flat[: manifest.total_bytes].numpy()
        encoded = self._chain.take(manifest, packed)
        self._turn = self._writing
        self._change = None if encoded is None else (base, encoded)
        self._manifest = manifest
        return self.offer(members)

    def offer(self, members: Sequence[str]) -> bytes:
        manifest = self._manifest
        if manifest is None:
            raise WeightTransferError("no version has been prepared yet: call prepare first")
        if not members:
            return encode_offer(DeltaOffer(manifest=manifest, chain=self._name, base=WHOLE, carried=b""))
        base, change = self._change or (WHOLE, b"")
        # Who was offered this version before and is offered it again did not take it.
        as_change = bool(change) and all(self._holds.get(member) == base for member in members)
        for member in members:
            self._holds[member] = manifest.version
        carried = self._carry(manifest, change if as_change else None, members)
        offer = DeltaOffer(manifest=manifest, chain=self._name, base=base if as_change else WHOLE, carried=carried)
        return encode_offer(offer)

    def _carry(self, manifest: Manifest, change: bytes | None, members: Sequence[str]) -> bytes:
        import torch

        from weight_sync.tensors import tensors_of

        wanted = (manifest.version, change is not None)
        self.moved_bytes = manifest.total_bytes if change is None else len(change)
        if self._carried == wanted:
            return self._carrier.offer(members)
        self._carried = None
        if change is None:
            flat = self._flats[self._turn]
            named = [] if flat is None else list(tensors_of(manifest, flat))
        else:
            named = [(DELTA, torch.frombuffer(bytearray(change), dtype=torch.uint8))]
        offer = self._carrier.prepare(manifest.version, named, members)
        self._carried = wanted
        return offer

    def _place(self, plan: PlanBuilder, spec: TensorSpec) -> Any:
        import torch

        flat, end = self._flats[self._writing], spec.offset + padded(spec.nbytes)
        if flat is None or flat.numel() < end:
            other, have = self._flats[self._writing ^ 1], 0 if flat is None else flat.numel()
            grown = torch.zeros(max(end, 0 if other is None else other.numel(), 2 * have), dtype=torch.uint8)
            if flat is not None:
                grown[:have].copy_(flat)
            self._flats[self._writing] = flat = grown
        return flat[spec.offset : spec.offset + spec.nbytes]

    def send(self) -> None:
        if self._manifest is None:
            raise WeightTransferError("no version has been prepared yet: call prepare first")
        if self._carried is not None:
            self._carrier.send()

    def cancel(self) -> None:
        self._carrier.cancel()

    def taken(self, member: str, version: int) -> None:
        self._holds[member] = version

    def close(self) -> None:
        self._carrier.close()
        self._manifest, self._flats = None, [None, None]


class HeldVersion:
    """The whole version that a receiver keeps of one sender: one copy of the wire's bytes in host memory."""

    def __init__(self) -> None:
        self._manifest: Manifest | None = None
        self._flat: Bytes = np.zeros(0, np.uint8)

    @property
    def version(self) -> int | None:
        """None while it holds nothing whole."""
        return None if self._manifest is None else self._manifest.version

    def bring(self, offer: DeltaOffer, fetch: Fetch, as_bytes: Callable[[Any], Bytes]) -> None:
        """Become the offered version, whole or by its change. ``as_bytes`` turns what ``fetch`` gives into uint8 [nbytes].

        Raises WeightTransferError. What refuses a change it is not made for stays as it was; what was half changed is dropped.
        """
        if not offer.carried:
            raise WeightTransferError(f"version {offer.manifest.version} was offered to nobody")
        if offer.base == WHOLE:
            self._take_whole(offer, fetch, as_bytes)
        else:
            self._change(offer, fetch, as_bytes)

    def tensors(self) -> Iterator[tuple[TensorSpec, Bytes]]:
        """Every tensor and its bytes, uint8 [nbytes]; valid until the next `bring`."""
        if self._manifest is None:
            return
        for spec in self._manifest.tensors:
            yield spec, self._flat[spec.offset : spec.offset + spec.nbytes]

    def _take_whole(self, offer: DeltaOffer, fetch: Fetch, as_bytes: Callable[[Any], Bytes]) -> None:
        places = {spec.name: spec for spec in offer.manifest.tensors}
        self._manifest = None
        if len(self._flat) != offer.manifest.total_bytes:
            self._flat = np.zeros(offer.manifest.total_bytes, np.uint8)

        def keep(name: str, tensor: Any) -> None:
            spec = places.pop(name, None)
            data = as_bytes(tensor)
            if spec is None or len(data) != spec.nbytes:
                raise WeightTransferError(f"version {offer.manifest.version}: {name} is not what its manifest names")
            self._flat[spec.offset : spec.offset + spec.nbytes] = data

        fetch(offer.carried, keep)
        if places:
            raise WeightTransferError(f"version {offer.manifest.version}: {', '.join(sorted(places)[:3])} missing")
        self._manifest = offer.manifest

    def _change(self, offer: DeltaOffer, fetch: Fetch, as_bytes: Callable[[Any], Bytes]) -> None:
        arrived: list[bytes] = []
        # Fetched before anything is refused: in a broadcast the others wait for this member.
        fetch(offer.carried, lambda name, tensor: arrived.append(as_bytes(tensor).tobytes()))
        held, version = self._manifest, offer.manifest.version
        if held is None or held.tensors != offer.manifest.tensors:
            here = "nothing is here" if held is None else "other tensors are here"
            raise WeightTransferError(
                f"version {version} is a change of version {offer.base}, and {here}: ask for a full copy"
            )
        if held.version == version:
            return  # an offer repeated after it was taken
        if len(arrived) != 1:
            raise WeightTransferError(f"version {version}: {len(arrived)} tensors arrived instead of one change")
        delta = decode_delta(arrived[0])
        if (delta.version, delta.base) != (version, offer.base):
            raise WeightTransferError(
                f"offered was version {version} as a change of {offer.base}, and what came is version {delta.version} as a "
                f"change of {delta.base}: ask for a full copy"
            )
        try:
            apply_delta(held, delta, self._flat, held.version)
        except WeightTransferError:
            if held.version == offer.base:
                self._manifest = None  # perhaps half changed
            raise
        self._manifest = offer.manifest
