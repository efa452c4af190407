"""The memory of a ring: a file in shared memory that two engines of one node map, or private where they cannot."""

from __future__ import annotations

import logging
import mmap
import os
import secrets
import tempfile
from pathlib import Path

logger = logging.getLogger(__name__)

DIRECTORY = Path("/dev/shm")
PREFIX = "millrace-kv-"
HEADER_BYTES = 4096
NONCE_BYTES = 32
MAX_RING_BYTES = 4 << 30


class RingMemory:
    """``nbytes`` of memory. ``path`` and ``nonce`` are empty unless another process can map it."""

    def __init__(self, mapped: mmap.mmap, nbytes: int, path: str = "", nonce: str = "") -> None:
        self._map = mapped
        self.nbytes = nbytes
        self.path = path
        self.nonce = nonce

    @property
    def offset(self) -> int:
        """Where the ring begins in `buffer`."""
        return len(self._map) - self.nbytes

    @property
    def buffer(self) -> mmap.mmap:
        """The whole mapping, header included."""
        return self._map

    def part(self, offset: int, nbytes: int) -> memoryview:
        """Some bytes of the ring. Raises ValueError outside of it."""
        if offset < 0 or nbytes < 1 or offset + nbytes > self.nbytes:
            raise ValueError(f"bytes {offset}..{offset + nbytes} of a ring of {self.nbytes}")
        begin = self.offset + offset
        return memoryview(self._map)[begin : begin + nbytes]

    def forget_path(self) -> None:
        """Remove the file; mappings of it stay. So nothing is left behind, however the processes end."""
        if self.path:
            Path(self.path).unlink(missing_ok=True)
            self.path = ""


def private_ring(nbytes: int) -> RingMemory:
    """A ring that only this process sees."""
    return RingMemory(mmap.mmap(-1, nbytes), nbytes)


def shared_ring(nbytes: int) -> RingMemory:
    """A ring that another process of this node can map; a private one (and a warning) where there is no room for it."""
    try:
        handle, path = tempfile.mkstemp(prefix=PREFIX, dir=DIRECTORY)
    except OSError as error:
        logger.warning("no shared memory for KV (%s): it goes over TCP", error)
        return private_ring(nbytes)
    try:
        os.posix_fallocate(handle, 0, HEADER_BYTES + nbytes)
        mapped = mmap.mmap(handle, HEADER_BYTES + nbytes)
    except OSError as error:
        Path(path).unlink(missing_ok=True)
        logger.warning("no %d bytes of shared memory for KV (%s): it goes over TCP", nbytes, error)
        return private_ring(nbytes)
    finally:
        os.close(handle)
    nonce = secrets.token_hex(NONCE_BYTES // 2)
    mapped[:NONCE_BYTES] = nonce.encode()
    return RingMemory(mapped, nbytes, path, nonce)


def map_ring(path: str, nonce: str, nbytes: int) -> RingMemory | None:
    """The ring that another process offers; None where this node has no such file (it is another node's)."""
    file = Path(path)
    if not path or file.parent != DIRECTORY or not file.name.startswith(PREFIX) or len(nonce) != NONCE_BYTES:
        return None
    try:
        with file.open("r+b") as handle:
            mapped = mmap.mmap(handle.fileno(), 0)
    except (OSError, ValueError):
        return None
    if len(mapped) != HEADER_BYTES + nbytes or mapped[:NONCE_BYTES] != nonce.encode():
        return None
    return RingMemory(mapped, nbytes)
