"""What changed between two versions of the weights, bit for bit.

Small learning rates change few of the 16-bit words that engines serve: an update of Adam is about the learning rate, and a
bfloat16 word of a weight w changes when that crosses half a unit in the last place, ``2^-8 |w|``. So a version is the version
before plus the words that differ. Per tensor:

==========  ==================================================================================================
positions   distances between changed words, one byte each; a distance of 255 or more is a run of bytes 255 first
values      how much each word changed as an integer (modulo its width), zigzag, in the fewest bytes that hold all
==========  ==================================================================================================

A tensor that changed too much to gain travels whole. Every encoded version names the version it applies to and, for each tensor,
the checksums before and after, so applying it to anything else is refused. Pure: numpy in, bytes out, no torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import msgspec
import numpy as np
import numpy.typing as npt

from weight_sync.checksums import block_checksum
from weight_sync.errors import WeightTransferError
from weight_sync.plan import ITEM_SIZES, Manifest, TensorSpec

Bytes = npt.NDArray[np.uint8]

ESCAPE = 255
"""A byte of the positions that stands for so many unchanged words and says that more follow."""


class TensorDelta(msgspec.Struct, frozen=True, array_like=True):
    """The change of one tensor: ``count`` words, or the whole tensor in ``values`` when ``count`` is -1."""

    count: int
    width: int
    """Bytes of one entry of ``values``: 1, 2, 4 or 8."""
    positions: bytes
    values: bytes
    before: int = 0
    """Checksum of the tensor that it applies to."""
    after: int = 0
    """Checksum of the tensor that comes out."""


class Delta(msgspec.Struct, frozen=True, kw_only=True):
    """A version as the change of the version ``base``."""

    version: int
    base: int
    tensors: tuple[TensorDelta, ...]


_DECODER = msgspec.msgpack.Decoder(Delta)


def checksums_of(manifest: Manifest, flat: Bytes) -> list[int]:
    """Of each tensor of a flat layout."""
    return [block_checksum(flat[spec.offset : spec.offset + spec.nbytes]) for spec in manifest.tensors]


def encode_delta(
    manifest: Manifest, base: int, old: Bytes, new: Bytes, sums: tuple[Sequence[int], Sequence[int]] | None = None
) -> bytes:
    """``new`` (version ``manifest.version``) as the change of ``old`` (version ``base``); both uint8 [total_bytes].

    ``sums`` are the checksums of the tensors of both, where they are known. Raises WeightTransferError if the layouts have
    another size than the manifest.
    """
    for name, flat in (("old", old), ("new", new)):
        if len(flat) != manifest.total_bytes:
            raise WeightTransferError(f"the {name} weights have {len(flat)} bytes, the manifest {manifest.total_bytes}")
    before, after = sums or (checksums_of(manifest, old), checksums_of(manifest, new))
    tensors = []
    for spec, *both in zip(manifest.tensors, before, after, strict=True):
        change = _encode_tensor(_words(old, spec), _words(new, spec))
        tensors.append(msgspec.structs.replace(change, before=both[0], after=both[1]))
    return msgspec.msgpack.encode(Delta(version=manifest.version, base=base, tensors=tuple(tensors)))


def decode_delta(data: bytes) -> Delta:
    """Raises WeightTransferError for anything but an encoded delta."""
    try:
        return _DECODER.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise WeightTransferError(f"not a change of weights: {error}") from error


def apply_delta(manifest: Manifest, delta: Delta, flat: Bytes, holds: int) -> None:
    """Turn ``flat``, which holds version ``holds``, into ``delta.version`` in place.

    Raises WeightTransferError, and leaves ``flat`` as it was, unless it is exactly what the delta applies to; and when the
    delta itself is damaged, in which case ``flat`` must be thrown away.
    """
    if holds != delta.base:
        raise WeightTransferError(
            f"version {delta.version} is a change of version {delta.base}, and version {holds} is here: ask for a full copy"
        )
    if len(delta.tensors) != len(manifest.tensors) or len(flat) != manifest.total_bytes:
        raise WeightTransferError(f"version {delta.version} is a change of other tensors than its manifest names")
    for spec, change, found in zip(manifest.tensors, delta.tensors, checksums_of(manifest, flat), strict=True):
        if found != change.before:
            raise WeightTransferError(
                f"tensor {spec.name} is here as version {holds}, and not what version {delta.version} was made from "
                f"(checksum {found:08x} instead of {change.before:08x}): ask for a full copy"
            )
    for spec, change in zip(manifest.tensors, delta.tensors, strict=True):
        found = change.before
        if change.count:
            _apply_tensor(spec, change, _words(flat, spec))
            found = block_checksum(flat[spec.offset : spec.offset + spec.nbytes])
        if found != change.after:
            raise _broken(spec, f"came out with checksum {found:08x} instead of {change.after:08x}")


def changed_share(delta: Delta, manifest: Manifest) -> float:
    """Share of the words that the delta changes (whole tensors count entirely)."""
    words = [spec.nbytes // ITEM_SIZES[spec.dtype] for spec in manifest.tensors]
    changed = [n if t.count < 0 else t.count for t, n in zip(delta.tensors, words, strict=True)]
    return sum(changed) / max(1, sum(words))


def _words(flat: Bytes, spec: TensorSpec) -> npt.NDArray[np.unsignedinteger]:
    """The tensor's elements as unsigned integers of their width."""
    return flat[spec.offset : spec.offset + spec.nbytes].view(f"u{ITEM_SIZES[spec.dtype]}")


def _encode_tensor(old: npt.NDArray[np.unsignedinteger], new: npt.NDArray[np.unsignedinteger]) -> TensorDelta:
    changed = np.flatnonzero(old != new)
    if not len(changed):
        return TensorDelta(0, 1, b"", b"")
    signed = (new[changed] - old[changed]).view(f"i{old.itemsize}")
    zigzag = ((signed << 1) ^ (signed >> (8 * old.itemsize - 1))).view(old.dtype)
    width = next(n for n in (1, 2, 4, 8) if int(zigzag.max()) < 1 << (8 * n))
    positions = _encode_distances(np.diff(changed, prepend=-1) - 1)
    if len(positions) + width * len(changed) >= new.nbytes:
        return TensorDelta(-1, new.itemsize, b"", new.tobytes())
    return TensorDelta(len(changed), width, positions.tobytes(), zigzag.astype(f"u{width}").tobytes())


def _apply_tensor(spec: TensorSpec, change: TensorDelta, words: npt.NDArray[np.unsignedinteger]) -> None:
    if change.count < 0:
        if len(change.values) != words.nbytes:
            raise _broken(spec, f"has {len(change.values)} bytes instead of {words.nbytes}")
        words[:] = np.frombuffer(change.values, dtype=words.dtype)
        return
    if change.width not in (1, 2, 4, 8) or len(change.values) != change.width * change.count:
        raise _broken(spec, "has values of another size than it says")
    where = np.cumsum(_decode_distances(np.frombuffer(change.positions, np.uint8)) + 1) - 1
    if len(where) != change.count or (len(where) and where[-1] >= len(words)):
        raise _broken(spec, "changes words that the tensor does not have")
    zigzag = np.frombuffer(change.values, f"u{change.width}").astype(words.dtype)
    one = words.dtype.type(1)
    words[where] += (zigzag >> one) ^ (~(zigzag & one) + one)


def _encode_distances(distances: npt.NDArray[np.int64]) -> Bytes:
    """Each distance as ``distance // ESCAPE`` bytes ``ESCAPE`` and one byte with the rest."""
    runs = distances // ESCAPE
    result = np.full(int(runs.sum()) + len(distances), ESCAPE, dtype=np.uint8)
    result[np.cumsum(runs + 1) - 1] = distances - runs * ESCAPE
    return result


def _decode_distances(encoded: Bytes) -> npt.NDArray[np.int64]:
    ends = np.flatnonzero(encoded != ESCAPE)
    runs: npt.NDArray[np.int64] = np.diff(ends, prepend=-1) - 1
    return runs * ESCAPE + encoded[ends].astype(np.int64)


def _broken(spec: TensorSpec, what: str) -> WeightTransferError:
    return WeightTransferError(f"the change of tensor {spec.name} {what}: it is damaged, ask for a full copy")


class DeltaChain:
    """The sender's side: which versions travel whole and which as changes. Keeps no weights of its own but the last ones given.

    Every ``snapshot_every``-th version is whole, so that an error (there should be none) lives no longer than that.
    """

    def __init__(self, snapshot_every: int) -> None:
        if snapshot_every < 1:
            raise ValueError(f"weights.delta_snapshot_every={snapshot_every} must be at least 1")
        self._every = snapshot_every
        self._last: tuple[Manifest, Bytes, Sequence[int]] | None = None
        self._since_snapshot = 0

    def take(self, manifest: Manifest, flat: Bytes) -> bytes | None:
        """The encoded change that leads to this version; None when it must travel whole. Keeps ``flat``."""
        sums = manifest.checksums or checksums_of(manifest, flat)
        encoded = None
        if self._last is not None and self._since_snapshot + 1 < self._every:
            before, old, old_sums = self._last
            if before.tensors == manifest.tensors:
                encoded = encode_delta(manifest, before.version, old, flat, (old_sums, sums))
        self._since_snapshot = self._since_snapshot + 1 if encoded is not None else 0
        self._last = manifest, flat, sums
        return encoded

    def versions(self) -> Iterator[int]:
        """The version that the next change applies to, if there is one."""
        if self._last is not None:
            yield self._last[0].version
