"""Torch tensors and the flat byte layout of a :class:`~weight_sync.plan.Manifest`."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator

import msgspec
import torch

from weight_sync.errors import WeightTransferError
from weight_sync.plan import Bucket, Manifest, TensorSpec, make_plan

NamedTensors = Iterable[tuple[str, torch.Tensor]]


def unique_tensors(named: NamedTensors) -> list[tuple[str, torch.Tensor]]:
    """The tensors in order, each storage once: of tied weights the first name stays."""
    seen: set[tuple[int, tuple[int, ...], tuple[int, ...]]] = set()
    kept: list[tuple[str, torch.Tensor]] = []
    for name, tensor in named:
        key = (tensor.data_ptr(), tuple(tensor.shape), tuple(tensor.stride()))
        if tensor.numel() > 0 and key in seen:
            continue
        seen.add(key)
        kept.append((name, tensor.detach()))
    return kept


def plan_tensors(version: int, named: Iterable[tuple[str, torch.Tensor]], bucket_bytes: int) -> Manifest:
    """The plan of these tensors."""
    described = ((name, tuple(t.shape), str(t.dtype).removeprefix("torch.")) for name, t in named)
    return make_plan(version, described, bucket_bytes)


def view_of(flat: torch.Tensor, spec: TensorSpec, start: int = 0) -> torch.Tensor:
    """The tensor ``spec`` as a view of ``flat`` (uint8), whose first byte is byte ``start`` of the layout."""
    dtype = getattr(torch, spec.dtype)
    begin = spec.offset - start
    return flat[begin : begin + spec.nbytes].view(dtype).view(spec.shape)


def pack(flat: torch.Tensor, manifest: Manifest, named: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Copies every tensor to its place in ``flat`` (uint8, at least ``total_bytes`` long)."""
    for spec, (_, tensor) in zip(manifest.tensors, named, strict=True):
        view_of(flat, spec).copy_(tensor)


def bucket_tensors(manifest: Manifest, bucket: Bucket, data: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of one bucket as views of its bytes ``data`` (uint8)."""
    for spec in manifest.tensors[bucket.first : bucket.last]:
        yield spec.name, view_of(data, spec, bucket.start)


def checksum(data: torch.Tensor) -> int:
    """CRC-32 of the bytes of a contiguous uint8 CPU tensor."""
    return zlib.crc32(data.numpy().data)


def with_checksums(manifest: Manifest, flat: torch.Tensor) -> Manifest:
    """The manifest with the checksum of each bucket of ``flat`` (a CPU tensor)."""
    sums = tuple(checksum(flat[bucket.start : bucket.end]) for bucket in manifest.buckets)
    return msgspec.structs.replace(manifest, checksums=sums)


def verify_bucket(manifest: Manifest, index: int, data: torch.Tensor) -> None:
    """Raises WeightTransferError if the bucket's bytes are not those that were offered."""
    if not manifest.checksums or data.device.type != "cpu":
        return
    found = checksum(data)
    if found != manifest.checksums[index]:
        raise WeightTransferError(
            f"version {manifest.version}, bucket {index} of {len(manifest.buckets)}: checksum {found:08x} instead of "
            f"{manifest.checksums[index]:08x}; the bytes were damaged or overwritten, fetch again"
        )
