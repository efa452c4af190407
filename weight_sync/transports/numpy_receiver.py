"""A receiver that hands over numpy arrays, for engines without torch in their process."""

from __future__ import annotations

from typing import Any

import numpy as np

from weight_sync.checksums import block_checksum
from weight_sync.errors import WeightTransferError
from weight_sync.plan import Bucket, Manifest, TensorSpec
from weight_sync.transports.delta import HeldVersion
from weight_sync.transports.protocol import DeltaOffer, OnTensor, SharedMemoryOffer, decode_offer
from weight_sync.transports.weight_file import HEADER_BYTES, WeightFiles, expect


class NumpyReceiver:
    """Fetches offers of any transport; only those of `collective` load torch. ``member``: this engine's name in them."""

    def __init__(self, member: str) -> None:
        self._member = member
        self._files = WeightFiles()
        self._held: dict[str, HeldVersion] = {}
        self._other: Any = None

    def fetch(self, offer: bytes, on_tensor: OnTensor) -> int:
        """As `WeightReceiver.fetch`; the arrays are views that are valid during the call."""
        decoded = decode_offer(offer)
        if isinstance(decoded, DeltaOffer):
            if decoded.chain not in self._held:
                self._held = {decoded.chain: HeldVersion()}
            held = self._held[decoded.chain]
            held.bring(decoded, self._fetch, _as_bytes)
            for spec, data in held.tensors():
                on_tensor(spec.name, _array(spec, data.data))
            return decoded.manifest.version
        return self._fetch(offer, on_tensor)

    def _fetch(self, offer: bytes, on_tensor: OnTensor) -> int:
        decoded = decode_offer(offer)
        if not isinstance(decoded, SharedMemoryOffer):
            return self._fetch_other(offer, on_tensor)
        mapped = self._files.map(decoded)
        manifest = decoded.manifest
        expect(mapped, decoded)
        for bucket in manifest.buckets:
            data = memoryview(mapped)[HEADER_BYTES + bucket.start : HEADER_BYTES + bucket.end]
            _hand_over(manifest, bucket, data, on_tensor)
        expect(mapped, decoded)
        return manifest.version

    def _fetch_other(self, offer: bytes, on_tensor: OnTensor) -> int:
        from weight_sync.transports.select import AnyReceiver

        if self._other is None:
            self._other = AnyReceiver(self._member)
        version: int = self._other.fetch(offer, lambda name, tensor: on_tensor(name, tensor.numpy()))
        return version

    def close(self) -> None:
        self._files.clear()
        self._held.clear()
        if self._other is not None:
            self._other.close()


def _hand_over(manifest: Manifest, bucket: Bucket, data: memoryview, on_tensor: OnTensor) -> None:
    for number in range(bucket.first, bucket.last):
        spec = manifest.tensors[number]
        begin = spec.offset - bucket.start
        if manifest.checksums:
            found = block_checksum(np.frombuffer(data[begin : begin + spec.nbytes], np.uint8))
            if found != manifest.checksums[number]:
                raise WeightTransferError(
                    f"version {manifest.version}, tensor {spec.name}: checksum {found:08x} instead of "
                    f"{manifest.checksums[number]:08x}; the bytes were damaged or overwritten, fetch again"
                )
        on_tensor(spec.name, _array(spec, data[begin : begin + spec.nbytes]))


def _array(spec: TensorSpec, data: memoryview) -> np.ndarray[Any, Any]:
    try:
        return np.frombuffer(data, dtype=np.dtype(spec.dtype)).reshape(spec.shape)
    except TypeError:
        raise WeightTransferError(f"tensor {spec.name} has dtype {spec.dtype}, which numpy does not know") from None


def _as_bytes(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)
