"""Weights through stagers: the learner lays a version out and goes on; whoever wants it pulls.

An engine asks the stager that its offer names for it. The stager pulls the version from the sender when the first engine asks,
checks every tensor, and keeps it in shared memory, where engines of its node map it; an engine elsewhere reads it over TCP. An
engine that joins later gets it from the stager, whatever the learner does meanwhile. An offer without a route is read from
the sender itself.
"""

from __future__ import annotations

import socket
import threading
import uuid
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from weight_sync.errors import WeightTransferError
from weight_sync.plan import PlanBuilder, TensorSpec, padded
from weight_sync.relay.frames import Request, ask, connect, read
from weight_sync.relay.serving import VersionServer
from weight_sync.tensors import NamedTensors, bucket_tensors, pack, verify_bucket
from weight_sync.transports.protocol import (
    OnTensor,
    RelayOffer,
    SharedMemoryOffer,
    StandingSender,
    decode_offer,
    encode_offer,
)
from weight_sync.transports.shared_memory import SharedMemoryReceiver

KEPT = 2
"""Publications that the sender itself keeps: stagers keep more."""


@dataclass
class _Publication:
    key: str
    flat: torch.Tensor

    def place(self, plan: PlanBuilder, spec: TensorSpec) -> torch.Tensor:
        end = spec.offset + padded(spec.nbytes)
        if self.flat.numel() < end:
            grown = torch.zeros(max(end, 2 * self.flat.numel()), dtype=torch.uint8)
            grown[: self.flat.numel()].copy_(self.flat)
            self.flat = grown
        return self.flat[spec.offset : spec.offset + spec.nbytes]


class RelaySender(StandingSender):
    """Keeps the last versions in host memory and gives their bytes to who asks; ``send`` has nothing left to do."""

    kind = "relay"

    def __init__(self, *, host: str = "127.0.0.1", bucket_bytes: int = 64 << 20, timeout_s: float = 60.0) -> None:
        self._host, self._bucket_bytes, self._timeout_s = host, bucket_bytes, timeout_s
        self._name = uuid.uuid4().hex[:12]
        self._published: list[_Publication] = []
        self._count = 0
        self._lock = threading.Lock()
        self._prepared: RelayOffer | None = None
        self._server = VersionServer(host, self._bytes_of)

    def prepare(self, version: int, named: NamedTensors, members: Sequence[str] = ()) -> bytes:
        self._count += 1
        with self._lock:
            # Who still reads the oldest one gets bytes that its checksums refuse.
            old = self._published.pop(0) if len(self._published) == KEPT else None
        flat = old.flat if old is not None else torch.zeros(0, dtype=torch.uint8)
        fresh = _Publication(f"{self._name}-{self._count}", flat)
        manifest = pack(version, named, self._bucket_bytes, fresh.place, checksums=True)
        with self._lock:
            self._published.append(fresh)
        self._prepared = RelayOffer(
            manifest=manifest,
            key=fresh.key,
            sender=self._name,
            source=(self._host, self._server.port),
            routes={},
            timeout_s=self._timeout_s,
        )
        return encode_offer(self._prepared)

    def _bytes_of(self, key: str) -> memoryview:
        with self._lock:
            for publication in self._published:
                if publication.key == key:
                    return memoryview(publication.flat.numpy().data)
        raise WeightTransferError(f"the learner no longer holds {key}: ask for the current version")

    def close(self) -> None:
        self._server.close()
        self._prepared = None
        with self._lock:
            self._published = []


class RelayReceiver:
    """Pulls from the stager that its route names. ``member``: this engine's name in the offers."""

    def __init__(self, member: str) -> None:
        self._member = member
        self._mapped = SharedMemoryReceiver()

    def fetch(self, offer: bytes, on_tensor: OnTensor) -> int:
        decoded = decode_offer(offer)
        if not isinstance(decoded, RelayOffer):
            raise WeightTransferError("a relay's receiver got the offer of another transport")
        route = decoded.routes.get(self._member)
        if route is None:
            what = f"the sender of version {decoded.manifest.version}"
            with connect(decoded.source, decoded.timeout_s, what) as connection:
                return self._read(connection, decoded, on_tensor)
        what = f"engine {self._member}: its stager (for version {decoded.manifest.version})"
        with connect(route, decoded.timeout_s, what) as connection:
            shared = ask(connection, Request(kind="stage", offer=offer)).shared
            place = decode_offer(shared)
            if not isinstance(place, SharedMemoryOffer) or place.manifest != decoded.manifest:
                raise WeightTransferError(f"{what} holds something else than what was offered")
            if place.node == socket.gethostname():
                return self._mapped.fetch(shared, on_tensor)
            return self._read(connection, decoded, on_tensor)

    def _read(self, connection: socket.socket, offer: RelayOffer, on_tensor: OnTensor) -> int:
        manifest = offer.manifest
        buffer = torch.empty(manifest.largest_bucket, dtype=torch.uint8)
        for index, bucket in enumerate(manifest.buckets):
            data = buffer[: bucket.nbytes]
            read(connection, offer.key, bucket.start, data.numpy().data)
            verify_bucket(manifest, index, data)
            for name, tensor in bucket_tensors(manifest, bucket, data):
                on_tensor(name, tensor)
        return manifest.version

    def close(self) -> None:
        self._mapped.close()
