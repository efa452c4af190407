"""Weights through files in shared memory, for engines on the learner's node.

Two persistent files take turns, so that the version before the newest stays readable while the newest is written. A
file starts with one header page: which publication it holds, or that it is being written. A receiver reads the header
before and after it copies, so bytes that were overwritten meanwhile are noticed, whether or not checksums are taken.

A sender holds a lock on its files. Files without a locked owner are left over from a process that was killed; the next
sender in the same directory removes them.
"""

from __future__ import annotations

import fcntl
import logging
import mmap
import os
import socket
import uuid
from collections.abc import Sequence
from pathlib import Path

import torch

from weight_sync.errors import WeightTransferError
from weight_sync.plan import PlanBuilder, TensorSpec, padded
from weight_sync.tensors import NamedTensors, bucket_tensors, pack, verify_bucket
from weight_sync.transports.protocol import OnTensor, SharedMemoryOffer, StandingSender, decode_offer, encode_offer
from weight_sync.transports.weight_file import (
    BEING_WRITTEN,
    HEADER,
    HEADER_BYTES,
    MAGIC,
    PREFIX,
    WeightFiles,
    expect,
)

logger = logging.getLogger(__name__)

SLOTS = 2
GROWTH_BYTES = 16 << 20
"""By how much a file grows at a time, while the size of a version is not known yet."""


def remove_stale_files(directory: str | Path = "/dev/shm") -> list[Path]:
    """Removes weight files whose owner is gone; returns them."""
    removed = []
    for path in sorted(Path(directory).glob(PREFIX + "*")):
        try:
            descriptor = os.open(path, os.O_RDWR)
        except OSError:
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink(missing_ok=True)
            removed.append(path)
        except BlockingIOError:
            continue
        finally:
            os.close(descriptor)
    return removed


class SharedFile:
    """One locked, mapped file: a header page and ``capacity`` bytes, which may grow."""

    def __init__(self, path: Path, capacity: int) -> None:
        self.path, self.capacity = path, 0
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self.grow(capacity)
        self.mark(BEING_WRITTEN, 0, 0)

    def grow(self, capacity: int) -> None:
        """Room for so many bytes; what is there stays. Raises WeightTransferError, and is of no use then."""
        size = HEADER_BYTES + capacity
        try:
            os.posix_fallocate(self._descriptor, 0, size)
            self._map = mmap.mmap(self._descriptor, size)
        except (OSError, ValueError) as error:
            self._remove()
            reason = error.strerror if isinstance(error, OSError) else error
            raise WeightTransferError(
                f"{self.path.parent} has no room for {size / 2**20:.1f} MiB of weights ({reason}): free some, or use "
                "weights.transport=collective"
            ) from error
        self.flat = torch.frombuffer(self._map, dtype=torch.uint8, offset=HEADER_BYTES) if capacity else torch.empty(0)
        self.capacity = capacity

    def mark(self, publication: int, version: int, total_bytes: int) -> None:
        HEADER.pack_into(self._map, 0, MAGIC, publication, version, total_bytes)

    def place(self, plan: PlanBuilder, spec: TensorSpec) -> torch.Tensor:
        """Where the tensor goes."""
        end = spec.offset + padded(spec.nbytes)
        if end > self.capacity:
            # Linear growth costs nothing here: the bytes stay where they are, and only the first version grows.
            self.grow(max(end, self.capacity + GROWTH_BYTES))
        return self.flat[spec.offset : spec.offset + spec.nbytes]

    def _remove(self) -> None:
        self.path.unlink(missing_ok=True)
        os.close(self._descriptor)

    def close(self) -> None:
        self.flat = torch.empty(0)
        self._remove()

    def discard(self) -> None:
        """`close`, also after a `grow` that failed."""
        if self.path.exists():
            self.close()


class SharedMemorySender(StandingSender):
    """Writes each version into one of two files under ``directory``; ``send`` has nothing left to do."""

    kind = "shared_memory"

    def __init__(
        self, *, directory: str | Path = "/dev/shm", bucket_bytes: int = 64 << 20, checksums: bool = True
    ) -> None:
        self._directory = Path(directory)
        if not self._directory.is_dir():
            raise WeightTransferError(f"{directory} is not a directory: weights.transport=shared_memory needs one")
        removed = remove_stale_files(self._directory)
        if removed:
            logger.info("removed %d weight files of dead processes from %s", len(removed), directory)
        self._identity = f"{PREFIX}{os.getpid()}-{uuid.uuid4().hex[:12]}"
        self._bucket_bytes, self._checksums = bucket_bytes, checksums
        self._buffers: dict[int, SharedFile] = {}
        self._publication = 0
        self._expected_bytes = 0
        self._prepared: SharedMemoryOffer | None = None

    def prepare(self, version: int, named: NamedTensors, members: Sequence[str] = ()) -> bytes:
        publication = self._publication + 1
        slot = publication % SLOTS
        buffer = self._buffer(slot, publication)
        buffer.mark(BEING_WRITTEN, version, 0)
        try:
            manifest = pack(version, named, self._bucket_bytes, buffer.place, checksums=self._checksums)
        except WeightTransferError:
            self._buffers.pop(slot).discard()
            raise
        buffer.mark(publication, version, manifest.total_bytes)
        self._publication = publication
        self._expected_bytes = manifest.total_bytes
        self._prepared = SharedMemoryOffer(
            manifest=manifest, path=str(buffer.path), publication=publication, node=socket.gethostname()
        )
        return encode_offer(self._prepared)

    def _buffer(self, slot: int, publication: int) -> SharedFile:
        if slot not in self._buffers:
            path = self._directory / f"{self._identity}-{publication}"
            self._buffers[slot] = SharedFile(path, self._expected_bytes)
        return self._buffers[slot]

    def close(self) -> None:
        """Removes the files. Receivers that have mapped them keep what they have."""
        while self._buffers:
            self._buffers.popitem()[1].close()
        self._prepared = None


class SharedMemoryReceiver:
    """Maps the sender's files; ``on_tensor`` sees views of them, without a copy of its own."""

    def __init__(self) -> None:
        self._files = WeightFiles()

    def fetch(self, offer: bytes, on_tensor: OnTensor) -> int:
        decoded = decode_offer(offer)
        if not isinstance(decoded, SharedMemoryOffer):
            raise WeightTransferError("a shared-memory receiver got the offer of another transport")
        mapped = self._files.map(decoded)
        manifest = decoded.manifest
        expect(mapped, decoded)
        if manifest.total_bytes:
            flat = torch.frombuffer(mapped, dtype=torch.uint8, offset=HEADER_BYTES, count=manifest.total_bytes)
            for index, bucket in enumerate(manifest.buckets):
                data = flat[bucket.start : bucket.end]
                verify_bucket(manifest, index, data)
                for name, tensor in bucket_tensors(manifest, bucket, data):
                    on_tensor(name, tensor)
        expect(mapped, decoded)
        return manifest.version

    def close(self) -> None:
        self._files.clear()
