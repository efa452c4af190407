"""Which tensors a model directory holds, and whether an offered version has the same."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path

from weight_sync.base_weights import NOT_WEIGHTS, BaseWeights
from weight_sync.errors import WeightTransferError
from weight_sync.plan import Manifest

Shapes = dict[str, tuple[int, ...]]

MAX_HEADER_BYTES = 100 << 20
HEAD = "lm_head.weight"


def checkpoint_shapes(directory: str | Path) -> Shapes | None:
    """Name and shape of every tensor in the safetensors files of a Hugging Face directory; None if it has none.

    Only the headers are read. Raises WeightTransferError for a file that is no safetensors file.
    """
    folder = Path(directory)
    # A directory may hold the same weights a second time, in one file and under other names.
    files = sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("*.safetensors"))
    shapes: Shapes = {}
    for file in files:
        shapes |= _shapes(file)
    return shapes or None


def tied(directory: str | Path) -> bool:
    """Whether the model's output head is its embedding (``tie_word_embeddings`` of its ``config.json``)."""
    try:
        config = json.loads((Path(directory) / "config.json").read_text())
    except (OSError, ValueError):
        return False
    text = config.get("text_config") or {}
    return bool(text.get("tie_word_embeddings", config.get("tie_word_embeddings", False)))


def takes_fp8(expected: Mapping[str, tuple[int, ...]] | None) -> bool:
    """Whether the model's own matrices are in blocks of 8 bits, with a scale for each."""
    return expected is not None and any(name.endswith(".weight_scale_inv") for name in expected)


def arriving(
    manifest: Manifest, expected: Mapping[str, tuple[int, ...]] | None, base: BaseWeights | None = None
) -> Manifest:
    """What a model with these tensors is handed of an offered version; ``base`` is what adapters are merged into.

    Raises WeightTransferError for an adapter that does not fit.
    """
    from weight_sync.adapters import is_adapter, merged_manifest

    if is_adapter(spec.name for spec in manifest.tensors):
        return merged_manifest(manifest, base)
    if takes_fp8(expected):
        return manifest
    from weight_sync.wire_dtypes import plain_manifest

    return plain_manifest(manifest)


def misfit(manifest: Manifest, expected: Mapping[str, tuple[int, ...]], head_is_tied: bool) -> str | None:
    """Why an offered version does not fit a model with these tensors, or None."""
    optional = {HEAD} if head_is_tied else set()
    offered = {spec.name: tuple(spec.shape) for spec in manifest.tensors}
    wanted = {name for name in expected if not name.endswith(NOT_WEIGHTS)}
    unknown = sorted(set(offered) - set(expected) - optional)
    if unknown:
        return f"version {manifest.version}: the model has no {_some(unknown)}"
    missing = sorted(wanted - set(offered) - optional)
    if missing:
        return f"version {manifest.version}: {_some(missing)} missing"
    for name, shape in offered.items():
        if name in expected and shape != tuple(expected[name]):
            return f"version {manifest.version}: {name} has shape {shape}, the model's is {tuple(expected[name])}"
    return None


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _shapes(file: Path) -> Iterable[tuple[str, tuple[int, ...]]]:
    try:
        with file.open("rb") as stream:
            (size,) = struct.unpack("<Q", stream.read(8))
            if size > MAX_HEADER_BYTES:
                raise ValueError(f"a header of {size} bytes")
            header = json.loads(stream.read(size))
        return [(name, tuple(entry["shape"])) for name, entry in header.items() if name != "__metadata__"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise WeightTransferError(f"{file} is no readable safetensors file: {error}") from error
