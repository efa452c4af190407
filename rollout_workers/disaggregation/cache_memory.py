"""Memory of a KV cache that other processes of the node write into: one file without a name, which ends with its owner.

The owner tells where it is (`CachePlace`). Another process opens it through ``/proc``, which the kernel allows to processes
of the same user that see the owner's process id, and compares the nonce at its beginning. Where that fails (another node,
another container, another user), KV goes another way.
"""

from __future__ import annotations

import logging
import math
import mmap
import os
import re
import secrets
import weakref
from pathlib import Path

import msgspec
import torch
from torch import Tensor

logger = logging.getLogger(__name__)

NONCE_BYTES = 32
_PATH = re.compile(r"/proc/\d+/fd/\d+")


class CachePlace(msgspec.Struct, frozen=True):
    """Where an engine's cache lies, and how."""

    path: str
    nonce: str
    slots: int
    max_len: int
    offsets: tuple[int, ...]
    """Where each tensor ``[slots, G, max_len, D]`` begins in the file: keys and values, layer after layer."""


class CacheMemory:
    """Owned by one process, which takes tensors from it. Raises OSError where the system has no such memory."""

    def __init__(self) -> None:
        self._file = os.memfd_create("millrace-kv")
        weakref.finalize(self, os.close, self._file)
        self.path = f"/proc/{os.getpid()}/fd/{self._file}"
        self.nonce = secrets.token_hex(NONCE_BYTES // 2)
        self._size = mmap.PAGESIZE
        os.ftruncate(self._file, self._size)
        os.pwrite(self._file, self.nonce.encode(), 0)
        self._offsets: dict[int, int] = {}
        """By address."""

    def zeros(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A new tensor. Memory is used where it is written, as with any other."""
        count = math.prod(shape)
        nbytes = -(-count * dtype.itemsize // mmap.PAGESIZE) * mmap.PAGESIZE
        os.ftruncate(self._file, self._size + nbytes)
        tensor = torch.frombuffer(mmap.mmap(self._file, nbytes, offset=self._size), dtype=dtype, count=count)
        self._offsets[tensor.data_ptr()] = self._size
        self._size += nbytes
        return tensor.view(shape)

    def place(self, tensors: list[Tensor]) -> CachePlace:
        """Where ``tensors``, all of them from `zeros` and of shape ``[slots, G, max_len, D]``, are."""
        slots, _, max_len, _ = tensors[0].shape
        offsets = tuple(self._offsets[tensor.data_ptr()] for tensor in tensors)
        return CachePlace(self.path, self.nonce, slots, max_len, offsets)


def cache_memory() -> CacheMemory | None:
    """None (and a line in the log) where the system has none: KV then goes through a ring."""
    try:
        return CacheMemory()
    except (OSError, AttributeError) as error:
        logger.warning("no memory for a KV cache that other engines can reach (%s)", error)
        return None


class PeerCache:
    """The cache of another engine. ``tensors`` are writable."""

    def __init__(self, place: CachePlace, tensors: list[Tensor]) -> None:
        self.slots, self.max_len = place.slots, place.max_len
        self.tensors = tensors


def map_cache(place: CachePlace, like: list[Tensor]) -> PeerCache | None:
    """The cache that another process offers, whose tensors differ from ``like`` in slots and positions only.

    None where this process cannot reach it, or where it is not what the offer says.
    """
    if not _PATH.fullmatch(place.path) or len(place.nonce) != NONCE_BYTES or len(place.offsets) != len(like):
        return None
    try:
        with Path(place.path).open("r+b") as file:
            mapped = mmap.mmap(file.fileno(), 0)
    except (OSError, ValueError) as error:
        logger.info("the other engine's cache cannot be reached from here: %s", error)
        return None
    if mapped[:NONCE_BYTES] != place.nonce.encode():
        return None
    tensors = []
    for offset, mine in zip(place.offsets, like, strict=True):
        shape = (place.slots, mine.shape[1], place.max_len, mine.shape[3])
        count = math.prod(shape)
        if offset < mmap.PAGESIZE or count < 1 or offset + count * mine.itemsize > len(mapped):
            return None
        tensors.append(torch.frombuffer(mapped, dtype=mine.dtype, count=count, offset=offset).view(shape))
    return PeerCache(place, tensors)
