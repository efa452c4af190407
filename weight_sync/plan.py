"""Where every tensor lies in one flat run of bytes, and in which buckets it travels.

Names are the Hugging Face ``state_dict`` names; weights that share storage appear once. A bucket holds whole tensors,
so a receiver can hand each of them on as soon as its bucket has arrived; a larger tensor than a bucket travels alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import prod

import msgspec

from weight_sync.errors import WeightTransferError

ALIGNMENT = 64
"""Every tensor starts at a multiple of this many bytes: typed views need it, and it is one cache line."""

ITEM_SIZES = {
    "float64": 8, "float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1, "float8_e5m2": 1,
    "int64": 8, "int32": 4, "int16": 2, "int8": 1, "uint8": 1, "bool": 1,
}  # fmt: skip
"""Bytes of one element, by dtype name; other dtypes are refused."""


class TensorSpec(msgspec.Struct, frozen=True, array_like=True):
    """One tensor: ``nbytes`` bytes from ``offset`` of the flat layout, row-major."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    offset: int
    nbytes: int


class Bucket(msgspec.Struct, frozen=True, array_like=True):
    """Bytes ``start:end`` of the flat layout, which hold the tensors ``first:last`` of the manifest."""

    start: int
    end: int
    first: int
    last: int

    @property
    def nbytes(self) -> int:
        return self.end - self.start


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """What one published version consists of."""

    version: int
    tensors: tuple[TensorSpec, ...]
    buckets: tuple[Bucket, ...]
    total_bytes: int
    checksums: tuple[int, ...] = ()
    """Of each tensor's bytes (`weight_sync.checksums`); empty when none were taken."""

    @property
    def largest_bucket(self) -> int:
        return max((bucket.nbytes for bucket in self.buckets), default=0)

    def check(self) -> None:
        """Raises WeightTransferError if offsets, sizes and buckets contradict each other."""
        position = 0
        for spec in self.tensors:
            if spec.offset < position or spec.nbytes != tensor_bytes(spec.name, spec.shape, spec.dtype):
                raise self._broken(f"tensor {spec.name} has a wrong place or size")
            position = spec.offset + spec.nbytes
        covered, start = 0, 0
        for bucket in self.buckets:
            if bucket.first != covered or bucket.last < bucket.first or bucket.start != start or bucket.end < start:
                raise self._broken("the buckets do not cover the tensors in order")
            inside = self.tensors[bucket.first : bucket.last]
            if any(spec.offset < bucket.start or spec.offset + spec.nbytes > bucket.end for spec in inside):
                raise self._broken("a tensor lies outside of its bucket")
            covered, start = bucket.last, bucket.end
        if covered != len(self.tensors) or start != self.total_bytes:
            raise self._broken("buckets and total size disagree")
        if self.checksums and len(self.checksums) != len(self.tensors):
            raise self._broken("it must have one checksum per tensor")

    def _broken(self, what: str) -> WeightTransferError:
        return WeightTransferError(f"manifest of version {self.version}: {what}")


def tensor_bytes(name: str, shape: tuple[int, ...], dtype: str) -> int:
    """Size of a tensor in bytes. Raises WeightTransferError for a dtype that cannot be sent."""
    if dtype not in ITEM_SIZES:
        raise WeightTransferError(
            f"tensor {name} has dtype {dtype}, which cannot be sent: use one of {sorted(ITEM_SIZES)}"
        )
    if any(extent < 0 for extent in shape):
        raise WeightTransferError(f"tensor {name} has the impossible shape {shape}")
    return prod(shape) * ITEM_SIZES[dtype]


class PlanBuilder:
    """Lays tensors out one after another, as they come, and cuts the layout into buckets."""

    def __init__(self, version: int, bucket_bytes: int) -> None:
        self._version, self._bucket_bytes = version, bucket_bytes
        self._specs: list[TensorSpec] = []
        self._buckets: list[Bucket] = []
        self._seen: set[str] = set()
        self._start = self._first = self._position = 0

    @property
    def bucket(self) -> tuple[int, int]:
        """Index and first byte of the bucket that the last tensor lies in."""
        return len(self._buckets), self._start

    def add(self, name: str, shape: tuple[int, ...], dtype: str) -> TensorSpec:
        """The place of the next tensor. Raises WeightTransferError for a dtype that cannot be sent or a name given twice."""
        if name in self._seen:
            raise WeightTransferError(f"tensor {name} was given twice: send weights that share storage once")
        self._seen.add(name)
        nbytes, count = tensor_bytes(name, shape, dtype), len(self._specs)
        if count > self._first and self._position + nbytes - self._start > self._bucket_bytes:
            self._buckets.append(Bucket(self._start, self._position, self._first, count))
            self._start, self._first = self._position, count
        spec = TensorSpec(name, tuple(shape), dtype, self._position, nbytes)
        self._specs.append(spec)
        self._position += padded(nbytes)
        return spec

    def manifest(self, checksums: Iterable[int] = ()) -> Manifest:
        """The plan of all tensors so far."""
        buckets = list(self._buckets)
        if self._specs:
            buckets.append(Bucket(self._start, self._position, self._first, len(self._specs)))
        return Manifest(
            version=self._version,
            tensors=tuple(self._specs),
            buckets=tuple(buckets),
            total_bytes=self._position,
            checksums=tuple(checksums),
        )


def padded(nbytes: int) -> int:
    """Bytes that a tensor takes in the layout."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def make_plan(version: int, tensors: Iterable[tuple[str, tuple[int, ...], str]], bucket_bytes: int) -> Manifest:
    """Lays tensors, given as ``(name, shape, dtype)``, out in the order given and cuts the layout into buckets.

    Raises WeightTransferError for a dtype that cannot be sent and for a name that occurs twice.
    """
    builder = PlanBuilder(version, bucket_bytes)
    for name, shape, dtype in tensors:
        builder.add(name, shape, dtype)
    return builder.manifest()
