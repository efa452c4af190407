"""Weights through a file system: each version is a directory of safetensors files, one a bucket, under Hugging Face names.

Slower than the other transports and the least demanding: learner and engines need nothing in common but the directory.
A version appears under its name only when it is complete. The newest ones stay, so that an engine which is still reading
one is not disturbed by the next.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import socket
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from weight_sync.errors import WeightTransferError
from weight_sync.plan import Manifest, PlanBuilder
from weight_sync.tensors import NamedTensors, checksum, dtype_name, each_once, expect_checksum
from weight_sync.transports.protocol import DiskOffer, OnTensor, StandingSender, decode_offer, encode_offer

logger = logging.getLogger(__name__)

KEPT = 2
"""Versions that stay in the directory."""
FILE = "model.safetensors"
"""The file of a version that fits into one bucket."""
PART = "model-{number:05d}-of-{count:05d}.safetensors"
INDEX = "model.safetensors.index.json"


def file_names(count: int) -> list[str]:
    """As Hugging Face names the files of a model in ``count`` parts."""
    return [FILE] if count == 1 else [PART.format(number=number, count=count) for number in range(1, count + 1)]


class DiskSender(StandingSender):
    """Writes each version below ``directory``; ``send`` has nothing left to do."""

    kind = "disk"

    def __init__(self, *, directory: str | Path, bucket_bytes: int = 64 << 20) -> None:
        self._directory = Path(directory).absolute()
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise WeightTransferError(f"weights.directory={directory} cannot be made: {error}") from error
        self._identity = uuid.uuid4().hex[:8]
        self._bucket_bytes = bucket_bytes
        self._written: list[Path] = []
        self._serial = 0
        self._prepared: DiskOffer | None = None

    def prepare(self, version: int, named: NamedTensors, members: Sequence[str] = ()) -> bytes:
        from safetensors import SafetensorError

        self._serial += 1
        target = self._directory / f"version-{version:06d}-{self._identity}-{self._serial}"
        unfinished = target.with_name(target.name + ".partial")
        try:
            unfinished.mkdir()
            manifest = self._write(version, named, unfinished)
            os.rename(unfinished, target)
        except (OSError, ValueError, SafetensorError) as error:
            raise WeightTransferError(f"version {version} cannot be written to {self._directory}: {error}") from error
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
        self._written.append(target)
        self._prepared = DiskOffer(manifest=manifest, path=str(target), node=socket.gethostname())
        self._forget(KEPT)
        return encode_offer(self._prepared)

    def _write(self, version: int, named: NamedTensors, directory: Path) -> Manifest:
        """One file a bucket, written as soon as the bucket is full."""
        builder, sums = PlanBuilder(version, self._bucket_bytes), []
        contents: dict[str, Any] = {}
        files = 0
        for name, tensor in each_once(named):
            before = builder.bucket
            builder.add(name, tuple(tensor.shape), dtype_name(tensor))
            if builder.bucket != before:
                _save(contents, directory / f"part-{files}")
                contents, files = {}, files + 1
            contents[name] = tensor.to("cpu").contiguous()
            sums.append(checksum(contents[name].view(-1).view(torch.uint8)))
        _save(contents, directory / f"part-{files}")
        manifest = builder.manifest(sums)
        names = file_names(max(1, len(manifest.buckets)))
        for number, file in enumerate(names):
            os.rename(directory / f"part-{number}", directory / file)
        if len(names) > 1:
            _write_index(manifest, names, directory)
        return manifest

    def close(self) -> None:
        """Removes what this sender has written."""
        self._forget(0)
        self._prepared = None

    def _forget(self, keep: int) -> None:
        while len(self._written) > keep:
            shutil.rmtree(self._written.pop(0), ignore_errors=True)


class DiskReceiver:
    """Reads a version's file; ``on_tensor`` sees tensors that are mapped from it."""

    def fetch(self, offer: bytes, on_tensor: OnTensor) -> int:
        decoded = decode_offer(offer)
        if not isinstance(decoded, DiskOffer):
            raise WeightTransferError("a disk receiver got the offer of another transport")
        try:
            self._read(decoded, on_tensor)
        except OSError as error:
            where = "" if decoded.node == socket.gethostname() else f" (written on node {decoded.node})"
            raise WeightTransferError(f"version {decoded.manifest.version} cannot be read: {error}{where}") from error
        return decoded.manifest.version

    def _read(self, offer: DiskOffer, on_tensor: OnTensor) -> None:
        from safetensors import SafetensorError, safe_open

        manifest = offer.manifest
        for bucket, file in zip(manifest.buckets, file_names(len(manifest.buckets)), strict=True):
            path = Path(offer.path) / file
            try:
                with safe_open(str(path), framework="pt") as stored:
                    for number in range(bucket.first, bucket.last):
                        tensor = stored.get_tensor(manifest.tensors[number].name)
                        _expect(path, manifest, number, tensor)
                        on_tensor(manifest.tensors[number].name, tensor)
            except SafetensorError as error:
                raise WeightTransferError(f"{path} is damaged or not the offered version: {error}") from error

    def close(self) -> None:
        """Nothing is held between two versions."""


def _expect(path: Path, manifest: Manifest, number: int, tensor: torch.Tensor) -> None:
    spec = manifest.tensors[number]
    found = (tuple(tensor.shape), dtype_name(tensor))
    if found != (tuple(spec.shape), spec.dtype):
        raise WeightTransferError(f"{path}: {spec.name} is {found}, offered was {(spec.shape, spec.dtype)}")
    if manifest.checksums:
        expect_checksum(manifest, number, checksum(tensor.view(-1).view(torch.uint8)))


def _save(contents: dict[str, Any], path: Path) -> None:
    from safetensors.torch import save_file

    save_file(contents, path, metadata={"format": "pt"})


def _write_index(manifest: Manifest, names: Sequence[str], directory: Path) -> None:
    """Where each tensor is, as Hugging Face writes it."""
    places = {
        manifest.tensors[number].name: file
        for bucket, file in zip(manifest.buckets, names, strict=True)
        for number in range(bucket.first, bucket.last)
    }
    index = {"metadata": {"total_size": sum(spec.nbytes for spec in manifest.tensors)}, "weight_map": places}
    (directory / INDEX).write_text(json.dumps(index, indent=2))
