"""Torch tensors and the flat byte layout of a :class:`~weight_sync.plan.Manifest`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from weight_sync.checksums import block_checksum
from weight_sync.errors import WeightTransferError
from weight_sync.plan import Bucket, Manifest, PlanBuilder, TensorSpec

NamedTensors = Iterable[tuple[str, torch.Tensor]]
"""Tensors by Hugging Face name. An iterator is walked once, tensor by tensor, and nothing that it gave is kept."""

Place = Callable[[PlanBuilder, TensorSpec], torch.Tensor]
"""Where a tensor that has just been planned goes: contiguous uint8 [nbytes]."""


def each_once(named: NamedTensors) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors in order, each storage once: of tied weights the first name stays."""
    seen: dict[tuple[int, tuple[int, ...], tuple[int, ...]], StorageWeakRef] = {}
    for name, tensor in named:
        key = (tensor.data_ptr(), tuple(tensor.shape), tuple(tensor.stride()))
        # The address of a tensor that is gone may have been given to another one.
        if tensor.numel() > 0 and key in seen and not seen[key].expired():
            continue
        seen[key] = StorageWeakRef(tensor.untyped_storage())
        yield name, tensor.detach()


def unique_tensors(named: NamedTensors) -> list[tuple[str, torch.Tensor]]:
    """`each_once`, all at the same time."""
    return list(each_once(named))


def pack(version: int, named: NamedTensors, bucket_bytes: int, place: Place, *, checksums: bool) -> Manifest:
    """Copies every tensor to where ``place`` says, one after another; returns the plan that came of it.

    Raises WeightTransferError for tensors that cannot be laid out.
    """
    builder = PlanBuilder(version, bucket_bytes)
    sums: list[int] = []
    for name, tensor in each_once(named):
        spec = builder.add(name, tuple(tensor.shape), dtype_name(tensor))
        target = place(builder, spec)
        typed(target, spec).copy_(tensor)
        if checksums:
            sums.append(checksum(target))
    return builder.manifest(sums)


def dtype_name(tensor: torch.Tensor) -> str:
    """``float32`` for ``torch.float32``."""
    return str(tensor.dtype).removeprefix("torch.")


def typed(data: torch.Tensor, spec: TensorSpec) -> torch.Tensor:
    """The bytes of a tensor, uint8 [nbytes], as that tensor."""
    return data.view(getattr(torch, spec.dtype)).view(spec.shape)


def view_of(flat: torch.Tensor, spec: TensorSpec, start: int = 0) -> torch.Tensor:
    """The tensor ``spec`` as a view of ``flat`` (uint8), whose first byte is byte ``start`` of the layout."""
    return typed(flat[spec.offset - start : spec.offset - start + spec.nbytes], spec)


def tensors_of(manifest: Manifest, flat: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """All tensors as views of the whole layout (uint8)."""
    for spec in manifest.tensors:
        yield spec.name, view_of(flat, spec)


def bucket_tensors(manifest: Manifest, bucket: Bucket, data: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of one bucket as views of its bytes ``data`` (uint8)."""
    for spec in manifest.tensors[bucket.first : bucket.last]:
        yield spec.name, view_of(data, spec, bucket.start)


def checksum(data: torch.Tensor) -> int:
    """Of the bytes of a contiguous uint8 CPU tensor (see `weight_sync.checksums`)."""
    return block_checksum(data.numpy())


def verify_bucket(manifest: Manifest, index: int, data: torch.Tensor) -> None:
    """Raises WeightTransferError if a tensor of the bucket does not have the bytes that were offered."""
    if not manifest.checksums or data.device.type != "cpu":
        return
    bucket, flat = manifest.buckets[index], data.numpy()
    for number in range(bucket.first, bucket.last):
        spec = manifest.tensors[number]
        begin = spec.offset - bucket.start
        expect_checksum(manifest, number, block_checksum(flat[begin : begin + spec.nbytes]))


def expect_checksum(manifest: Manifest, number: int, found: int) -> None:
    """Raises WeightTransferError if tensor ``number`` was offered with another checksum."""
    if found != manifest.checksums[number]:
        raise WeightTransferError(
            f"version {manifest.version}, tensor {manifest.tensors[number].name}: checksum {found:08x} instead of "
            f"{manifest.checksums[number]:08x}; the bytes were damaged or overwritten, fetch again"
        )
