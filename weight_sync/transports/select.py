"""Choosing a transport, and the receiver that understands every offer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from weight_sync.config import WeightsConfig
from weight_sync.transports.collective import CollectiveReceiver, CollectiveSender
from weight_sync.transports.disk import DiskReceiver, DiskSender
from weight_sync.transports.protocol import (
    DiskOffer,
    OnTensor,
    SharedMemoryOffer,
    WeightReceiver,
    WeightSender,
    decode_offer,
)
from weight_sync.transports.shared_memory import SharedMemoryReceiver, SharedMemorySender


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
    bucket_bytes = int(config.bucket_mb * 2**20)
    if kind == "shared_memory":
        return SharedMemorySender(directory=directory, bucket_bytes=bucket_bytes)
    if kind == "collective":
        return CollectiveSender(host=host, device=device, bucket_bytes=bucket_bytes, timeout_s=config.timeout_s)
    if kind == "disk":
        chosen = config.directory or disk_directory
        if chosen is None:
            raise ValueError("weights.transport=disk needs weights.directory: one that learner and engines both see")
        return DiskSender(directory=chosen, bucket_bytes=bucket_bytes)
    raise ValueError(f"unknown weight transport {kind!r}: use shared_memory, collective or disk")


class AnyReceiver:
    """Fetches by whichever transport an offer belongs to. ``member``: this engine's name in collective offers."""

    def __init__(self, member: str, *, device: str | torch.device = "cpu") -> None:
        self._member, self._device = member, device
        self._receivers: dict[type, WeightReceiver] = {}

    def fetch(self, offer: bytes, on_tensor: OnTensor) -> int:
        kind = type(decode_offer(offer))
        if kind not in self._receivers:
            self._receivers[kind] = self._make(kind)
        return self._receivers[kind].fetch(offer, on_tensor)

    def _make(self, kind: type) -> WeightReceiver:
        if kind is SharedMemoryOffer:
            return SharedMemoryReceiver()
        if kind is DiskOffer:
            return DiskReceiver()
        return CollectiveReceiver(self._member, device=self._device)

    def close(self) -> None:
        while self._receivers:
            self._receivers.popitem()[1].close()
