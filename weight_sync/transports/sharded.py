"""One version from several senders: each rank of a learner offers the tensors that it gathered last.

All ranks walk the same tensors in the same order, because gathering a tensor takes all of them; each keeps those of its own
buckets and lets go of the rest. So nobody ever holds more than its share and one tensor.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from weight_sync.errors import WeightTransferError
from weight_sync.plan import Manifest, PlanBuilder
from weight_sync.transports.protocol import Offer, ShardedOffer, decode_offer, encode_offer

if TYPE_CHECKING:
    import torch

    from weight_sync.tensors import NamedTensors


def share_of(named: NamedTensors, rank: int, world: int, bucket_bytes: int) -> Iterator[tuple[str, torch.Tensor]]:
    """Those of ``named`` that ``rank`` sends: bucket i belongs to rank i modulo ``world``. Walks to the end on every rank."""
    bucket, filled = 0, 0
    for name, tensor in named:
        if filled and filled + tensor.nbytes > bucket_bytes:
            bucket, filled = bucket + 1, 0
        filled += tensor.nbytes
        if bucket % world == rank:
            yield name, tensor


def join_offers(parts: Sequence[bytes]) -> bytes:
    """One offer of the parts of several senders.

    Raises WeightTransferError if they are of different versions, or two have a tensor of the same name.
    """
    if len(parts) == 1:
        return parts[0]
    manifests = [decode_offer(part).manifest for part in parts]
    versions = sorted({manifest.version for manifest in manifests})
    if len(versions) != 1:
        raise WeightTransferError(f"the senders offer different versions: {versions}")
    return encode_offer(ShardedOffer(manifest=_together(versions[0], manifests), parts=tuple(parts)))


def check_parts(offer: ShardedOffer, parts: Sequence[Offer]) -> None:
    """Raises WeightTransferError if the parts are not the version that the offer names."""
    version, found = offer.manifest.version, [spec.name for part in parts for spec in part.manifest.tensors]
    if any(part.manifest.version != version for part in parts):
        raise WeightTransferError(f"version {version}: a part of it is another version")
    if any(isinstance(part, ShardedOffer) for part in parts) or sorted(found) != sorted(
        spec.name for spec in offer.manifest.tensors
    ):
        raise WeightTransferError(f"version {version}: its parts do not hold the tensors that it names")


def _together(version: int, manifests: Sequence[Manifest]) -> Manifest:
    plan = PlanBuilder(version, max(1, *(m.largest_bucket for m in manifests)))
    for manifest in manifests:
        for spec in manifest.tensors:
            plan.add(spec.name, spec.shape, spec.dtype)
    return plan.manifest()
