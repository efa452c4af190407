"""Weights through a file system: each version is a directory with one safetensors file, under Hugging Face names.

Slower than the other transports and the least demanding: learner and engines need nothing in common but the directory.
A version appears under its name only when it is complete. The newest ones stay, so that an engine which is still reading
one is not disturbed by the next.
"""

from __future__ import annotations

import logging
import os
import shutil
import socket
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from weight_sync.errors import WeightTransferError
from weight_sync.tensors import NamedTensors, plan_tensors, unique_tensors
from weight_sync.transports.protocol import DiskOffer, OnTensor, decode_offer, encode_offer

logger = logging.getLogger(__name__)

KEPT = 2
"""Versions that stay in the directory."""
FILE = "model.safetensors"


class DiskSender:
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
        from safetensors.torch import save_file

        tensors = unique_tensors(named)
        manifest = plan_tensors(version, tensors, self._bucket_bytes)
        self._serial += 1
        target = self._directory / f"version-{version:06d}-{self._identity}-{self._serial}"
        unfinished = target.with_name(target.name + ".partial")
        try:
            unfinished.mkdir()
            contents = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors}
            save_file(contents, unfinished / FILE, metadata={"format": "pt"})
            os.rename(unfinished, target)
        except (OSError, ValueError, RuntimeError) as error:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise WeightTransferError(f"version {version} cannot be written to {self._directory}: {error}") from error
        self._written.append(target)
        self._prepared = DiskOffer(manifest=manifest, path=str(target), node=socket.gethostname())
        self._forget(KEPT)
        return encode_offer(self._prepared)

    def offer(self, members: Sequence[str] = ()) -> bytes:
        if self._prepared is None:
            raise WeightTransferError("no version has been prepared yet: call prepare first")
        return encode_offer(self._prepared)

    def send(self) -> None:
        if self._prepared is None:
            raise WeightTransferError("no version has been prepared yet: call prepare first")

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

        path = Path(offer.path) / FILE
        try:
            with safe_open(str(path), framework="pt") as file:
                for spec in offer.manifest.tensors:
                    tensor: Any = file.get_tensor(spec.name)
                    found = (tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
                    if found != (tuple(spec.shape), spec.dtype):
                        raise WeightTransferError(
                            f"{path}: {spec.name} is {found}, offered was {(spec.shape, spec.dtype)}"
                        )
                    on_tensor(spec.name, tensor)
        except SafetensorError as error:
            raise WeightTransferError(f"{path} is damaged or not the offered version: {error}") from error

    def close(self) -> None:
        """Nothing is held between two versions."""
