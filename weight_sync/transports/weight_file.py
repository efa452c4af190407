"""The header page of a weight file in shared memory, and how a receiver maps and checks one. Free of torch."""

from __future__ import annotations

import mmap
import os
import socket
import struct
from pathlib import Path

from weight_sync.errors import WeightTransferError
from weight_sync.transports.protocol import SharedMemoryOffer

PREFIX = "millrace-weights-"
HEADER_BYTES = 4096
HEADER = struct.Struct("<8sqqq")
MAGIC = b"MLRCWGT1"
BEING_WRITTEN = -1


class WeightFiles:
    """The weight files that a receiver has mapped, by path."""

    def __init__(self) -> None:
        self._maps: dict[str, mmap.mmap] = {}

    def map(self, offer: SharedMemoryOffer) -> mmap.mmap:
        """The file of an offer. Raises WeightTransferError when it is gone, no weight file, or too short."""
        known = self._maps.get(offer.path)
        if known is not None and len(known) >= HEADER_BYTES + offer.manifest.total_bytes:
            return known
        if not Path(offer.path).name.startswith(PREFIX):
            raise WeightTransferError(f"{offer.path} is not a weight file")
        try:
            with open(offer.path, "rb") as file:
                # A private mapping is writable for torch but can never change what the others see.
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except (OSError, ValueError) as error:
            where = "" if offer.node == socket.gethostname() else f" (the learner is on node {offer.node})"
            raise WeightTransferError(
                f"cannot map the weights of version {offer.manifest.version}: {error}{where}"
            ) from error
        if len(mapped) < HEADER_BYTES + offer.manifest.total_bytes:
            raise WeightTransferError(f"{offer.path} is shorter than version {offer.manifest.version} needs")
        self._forget_removed()
        self._maps[offer.path] = mapped
        return mapped

    def clear(self) -> None:
        self._maps.clear()

    def _forget_removed(self) -> None:
        for path in [p for p in self._maps if not os.path.exists(p)]:
            del self._maps[path]


def expect(mapped: mmap.mmap, offer: SharedMemoryOffer) -> None:
    """Raises WeightTransferError unless the mapped file holds exactly what was offered."""
    magic, publication, version, total = HEADER.unpack_from(mapped, 0)
    expected = (MAGIC, offer.publication, offer.manifest.version, offer.manifest.total_bytes)
    if (magic, publication, version, total) == expected:
        return
    holds = "is being written" if publication == BEING_WRITTEN else f"holds version {version}"
    raise WeightTransferError(
        f"{offer.path} {holds}, not the offered version {offer.manifest.version}: ask for the current one"
    )
