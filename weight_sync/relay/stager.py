"""The stager of a node: versions in shared memory, pulled from their sender once, whenever the first engine asks."""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
import uuid
from pathlib import Path

from weight_sync.errors import WeightTransferError
from weight_sync.relay.frames import connect, read
from weight_sync.relay.keeping import Kept
from weight_sync.relay.serving import VersionServer
from weight_sync.tensors import verify_bucket
from weight_sync.transports.protocol import DELTA, RelayOffer, SharedMemoryOffer, decode_offer, encode_offer
from weight_sync.transports.shared_memory import SharedFile, remove_stale_files
from weight_sync.transports.weight_file import BEING_WRITTEN, PREFIX

logger = logging.getLogger(__name__)


class Stager:
    """Holds versions and serves them on ``address``: by mapping to engines of this node, by TCP to others."""

    def __init__(self, host: str = "127.0.0.1", directory: str | Path = "/dev/shm") -> None:
        self._directory = Path(directory)
        if not self._directory.is_dir():
            raise WeightTransferError(f"{directory} is not a directory: weights.transport=relay needs one")
        remove_stale_files(self._directory)
        self._name = f"{PREFIX}stager-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        self._files: dict[str, tuple[SharedFile, SharedMemoryOffer]] = {}
        self._kept = Kept()
        self._spare: SharedFile | None = None
        self._lock = threading.Lock()
        self._arriving: dict[str, threading.Event] = {}
        self._count = 0
        self._server = VersionServer(host, self._bytes_of, self.stage)
        self.address = (host, self._server.port)

    def stage(self, offer: bytes) -> bytes:
        """Hold the version of a relay's offer; returns the offer of its file. Several may ask at once: one pulls.

        Raises WeightTransferError if it cannot be had, or is not what was offered.
        """
        decoded = decode_offer(offer)
        if not isinstance(decoded, RelayOffer):
            raise WeightTransferError("a stager got the offer of another transport")
        deadline = time.monotonic() + decoded.timeout_s
        while True:
            with self._lock:
                held = self._files.get(decoded.key)
                if held is not None:
                    return encode_offer(held[1])
                coming = self._arriving.get(decoded.key)
                if coming is None:
                    coming = self._arriving[decoded.key] = threading.Event()
                    break
            if not coming.wait(max(0.0, deadline - time.monotonic())):
                raise WeightTransferError(
                    f"version {decoded.manifest.version} did not arrive at the stager within {decoded.timeout_s:g} s"
                )
        try:
            return encode_offer(self._pull(decoded))
        finally:
            with self._lock:
                self._arriving.pop(decoded.key).set()

    def held(self) -> list[int]:
        """The versions that are here."""
        with self._lock:
            return sorted({offer.manifest.version for _, offer in self._files.values()})

    def _pull(self, offer: RelayOffer) -> SharedMemoryOffer:
        manifest = offer.manifest
        file, number = self._file(manifest.total_bytes)
        try:
            file.mark(BEING_WRITTEN, manifest.version, manifest.total_bytes)
            what = f"the sender of version {manifest.version}"
            with connect(offer.source, offer.timeout_s, what) as connection:
                for index, bucket in enumerate(manifest.buckets):
                    data = file.flat[bucket.start : bucket.end]
                    read(connection, offer.key, bucket.start, data.numpy().data)
                    verify_bucket(manifest, index, data)
        except BaseException:
            file.close()
            raise
        file.mark(number, manifest.version, manifest.total_bytes)
        shared = SharedMemoryOffer(
            manifest=manifest, path=str(file.path), publication=number, node=socket.gethostname()
        )
        change = [spec.name for spec in manifest.tensors] == [DELTA]
        with self._lock:
            self._files[offer.key] = (file, shared)
            gone = [self._files.pop(key)[0] for key in self._kept.add(offer.sender, offer.key, change=change)]
            gone += [self._spare] if self._spare is not None else []
            self._spare = max(gone, key=lambda old: old.capacity, default=None)
        for old in gone:
            if old is not self._spare:
                old.close()  # engines that have mapped it keep what they have
        return shared

    def _file(self, capacity: int) -> tuple[SharedFile, int]:
        """Room for a version, and its number: memory that was touched before, if there is enough of it."""
        with self._lock:
            self._count += 1
            number, spare = self._count, self._spare
            if spare is not None and spare.capacity >= capacity > spare.capacity // 2:
                self._spare = None
                return spare, number
        return SharedFile(self._directory / f"{self._name}-{number}", capacity), number

    def _bytes_of(self, key: str) -> memoryview:
        with self._lock:
            held = self._files.get(key)
        if held is None:
            raise WeightTransferError(f"the stager does not hold {key}: ask for the current version")
        return held[0].flat.numpy().data

    def close(self) -> None:
        """Stop serving and remove the files."""
        self._server.close()
        with self._lock:
            files = [file for file, _ in self._files.values()] + ([self._spare] if self._spare is not None else [])
            self._files, self._spare = {}, None
        for file in files:
            file.close()


class StagerActor:
    """One stager a node, as an actor: all bytes go by the stager's own road, the calls here only ask how it is."""

    def __init__(self, directory: str = "/dev/shm") -> None:
        try:
            host = socket.gethostbyname(socket.gethostname())
        except OSError:
            host = "127.0.0.1"
        self._stager = Stager(host, directory)

    def address(self) -> tuple[str, int]:
        return self._stager.address

    def held(self) -> list[int]:
        """Versions that are here."""
        return self._stager.held()

    def process(self) -> int:
        return os.getpid()

    def stop(self) -> None:
        self._stager.close()
