"""Choosing a transport, and the receiver that understands every offer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from weight_sync.adapters import Merging, is_adapter
from weight_sync.base_weights import BaseWeights
from weight_sync.config import WeightsConfig
from weight_sync.tensors import typed
from weight_sync.transports.collective import CollectiveReceiver, CollectiveSender
from weight_sync.transports.delta import DeltaSender, HeldVersion
from weight_sync.transports.disk import DiskReceiver, DiskSender
from weight_sync.transports.protocol import (
    CollectiveOffer,
    DeltaOffer,
    DiskOffer,
    Offer,
    OnTensor,
    RelayOffer,
    ShardedOffer,
    SharedMemoryOffer,
    WeightReceiver,
    WeightSender,
    carriers,
    decode_offer,
)
from weight_sync.transports.relay import RelayReceiver, RelaySender
from weight_sync.transports.sharded import check_parts
from weight_sync.transports.shared_memory import SharedMemoryReceiver, SharedMemorySender
from weight_sync.wire_dtypes import dequantising


def choose_transport(transport: str, learner_node: str, engine_nodes: Sequence[str]) -> str:
    """``auto`` becomes ``shared_memory`` when every engine is on the learner's node, else ``collective``."""
    if transport != "auto":
        return transport
    return "shared_memory" if all(node == learner_node for node in engine_nodes) else "collective"


def make_sender(
    config: WeightsConfig,
    kind: str,
    *,
    host: str = "127.0.0.1",
    device: str | torch.device = "cpu",
    directory: str | Path = "/dev/shm",
    disk_directory: str | Path | None = None,
) -> WeightSender:
    """The sender of ``kind``, as :func:`choose_transport` named it. ``host``: where engines reach this process.

    ``disk_directory``: where ``disk`` writes when ``weights.directory`` does not say.
    """
    if not config.delta:
        return _make_carrier(config, kind, host, device, directory, disk_directory)
    # What changed is taken in host memory, and travels from there.
    carrier = _make_carrier(config, kind, host, "cpu", directory, disk_directory)
    return DeltaSender(carrier, snapshot_every=config.delta_snapshot_every, bucket_bytes=config.bucket_bytes)


def _make_carrier(
    config: WeightsConfig,
    kind: str,
    host: str,
    device: str | torch.device,
    directory: str | Path,
    disk_directory: str | Path | None,
) -> WeightSender:
    bucket_bytes, checksums = config.bucket_bytes, config.checksums
    if kind == "shared_memory":
        return SharedMemorySender(directory=directory, bucket_bytes=bucket_bytes, checksums=checksums)
    if kind == "collective":
        return CollectiveSender(
            host=host, device=device, bucket_bytes=bucket_bytes, timeout_s=config.timeout_s, checksums=checksums
        )
    if kind == "relay":
        return RelaySender(host=host, bucket_bytes=bucket_bytes, timeout_s=config.timeout_s)
    if kind == "disk":
        chosen = config.directory or disk_directory
        if chosen is None:
            raise ValueError("weights.transport=disk needs weights.directory: one that learner and engines both see")
        return DiskSender(directory=chosen, bucket_bytes=bucket_bytes)
    raise ValueError(f"unknown weight transport {kind!r}: use shared_memory, collective, relay or disk")


class AnyReceiver:
    """Fetches by whichever transport an offer belongs to. ``member``: this engine's name in collective offers.

    Matrices in blocks of 8 bits are handed over as plain ones, unless ``fp8``: then with their ``_scale_inv``, as they came. A
    version that is an adapter is handed over as the whole model: merged into ``base``.
    """

    def __init__(
        self,
        member: str,
        *,
        device: str | torch.device = "cpu",
        fp8: bool = False,
        base: BaseWeights | None = None,
    ) -> None:
        self._member, self._device, self._fp8, self._base = member, device, fp8, base
        self._receivers: dict[type | tuple[str, int], WeightReceiver] = {}
        self._held: dict[str, HeldVersion] = {}

    def fetch(self, offer: bytes, on_tensor: OnTensor) -> int:
        decoded = decode_offer(offer)
        if not is_adapter(spec.name for spec in decoded.manifest.tensors):
            take = on_tensor if self._fp8 else dequantising(decoded.manifest, on_tensor)
            self._fetch_all(offer, decoded, take)
            return decoded.manifest.version
        merging = Merging(decoded.manifest, self._base, on_tensor)
        self._fetch_all(offer, decoded, merging.take)
        merging.finish()
        return decoded.manifest.version

    def _fetch_all(self, offer: bytes, decoded: Offer, take: OnTensor) -> None:
        if isinstance(decoded, ShardedOffer):
            parts = [decode_offer(part) for part in decoded.parts]
            check_parts(decoded, parts)
            self._forget_all_but(parts, offer)
            for encoded, part in zip(decoded.parts, parts, strict=True):
                self._fetch(encoded, part, take)
        else:
            self._forget_all_but([decoded], offer)
            self._fetch(offer, decoded, take)

    def _fetch(self, offer: bytes, decoded: Offer, on_tensor: OnTensor) -> int:
        if isinstance(decoded, DeltaOffer):
            held = self._held.setdefault(decoded.chain, HeldVersion())
            held.bring(decoded, self._carried, as_bytes)
            for spec, data in held.tensors():
                on_tensor(spec.name, typed(torch.from_numpy(data), spec))
            return decoded.manifest.version
        # Each sender of a broadcast has a group of its own, which outlives the version.
        key = (decoded.host, decoded.port) if isinstance(decoded, CollectiveOffer) else type(decoded)
        if key not in self._receivers:
            self._receivers[key] = self._make(type(decoded))
        return self._receivers[key].fetch(offer, on_tensor)

    def _carried(self, offer: bytes, on_tensor: OnTensor) -> int:
        return self._fetch(offer, decode_offer(offer), on_tensor)

    def _forget_all_but(self, parts: Sequence[Offer], offer: bytes) -> None:
        """Let go of the copies and the process groups of senders that others have taken the place of."""
        chains = {part.chain for part in parts if isinstance(part, DeltaOffer)}
        if chains:
            self._held = {chain: held for chain, held in self._held.items() if chain in chains}
        places = {(each.host, each.port) for each in carriers(offer) if isinstance(each, CollectiveOffer)}
        if places:
            for key in [key for key in self._receivers if isinstance(key, tuple) and key not in places]:
                self._receivers.pop(key).close()

    def _make(self, kind: type) -> WeightReceiver:
        if kind is SharedMemoryOffer:
            return SharedMemoryReceiver()
        if kind is DiskOffer:
            return DiskReceiver()
        if kind is RelayOffer:
            return RelayReceiver(self._member)
        return CollectiveReceiver(self._member, device=self._device)

    def close(self) -> None:
        self._held.clear()
        while self._receivers:
            self._receivers.popitem()[1].close()


def as_bytes(tensor: torch.Tensor) -> Any:
    """The bytes of a tensor, numpy uint8 [nbytes]."""
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
