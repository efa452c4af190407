"""The wire and journal format: msgpack with a schema version and typed array extensions.

A message is a four-byte envelope (three bytes of magic, one of schema version) and one msgpack value. A numpy array is
an extension whose payload is ``dtype code (1) | dimensions (1) | shape (dimensions x uint32, little-endian) | raw
bytes``. Decoding copies no array: arrays are read-only views of the message, which they keep alive. Whatever is wrong
with the input (malformed, truncated, oversized, another schema, another type) raises ``WireFormatError`` and nothing
else.
"""

from __future__ import annotations

import math
import struct
import typing
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, TypeVar, cast

import msgspec
import numpy as np
import numpy.typing as npt

from experience.records import Group, GroupHeader, Trajectory

MAGIC = b"MLR"
SCHEMA_VERSION = 1
DEFAULT_MAX_BYTES = 1 << 30
"""Largest message that is decoded unless the caller says otherwise: 1 GiB."""

_ENVELOPE = MAGIC + bytes([SCHEMA_VERSION])
_ARRAY_EXTENSION = 1
_MAX_DIMENSIONS = 8
_DTYPES = ("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "float16", "float32", "float64")
_DTYPE_OF_CODE = {code: np.dtype(name).newbyteorder("<") for code, name in enumerate(_DTYPES)}
_CODE_OF_DTYPE = {dtype: code for code, dtype in _DTYPE_OF_CODE.items()}

Buffer = bytes | bytearray | memoryview
T = TypeVar("T")


class WireFormatError(ValueError):
    """A message that cannot be decoded; says what is wrong with it."""


def _pack_array(array: npt.NDArray[Any]) -> msgspec.msgpack.Ext:
    code = _CODE_OF_DTYPE.get(array.dtype)
    if code is None:
        raise TypeError(f"an array of dtype {array.dtype} has no wire format; allowed are {', '.join(_DTYPES)}")
    if array.ndim > _MAX_DIMENSIONS:
        raise TypeError(
            f"an array of {array.ndim} dimensions has no wire format; at most {_MAX_DIMENSIONS} are allowed"
        )
    head = struct.pack(f"<BB{array.ndim}I", code, array.ndim, *array.shape)
    return msgspec.msgpack.Ext(_ARRAY_EXTENSION, head + array.tobytes())


def _encode_hook(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return _pack_array(value)
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"a value of type {type(value).__qualname__} has no wire format")


def _unpack_array(code: int, payload: memoryview) -> Any:
    if code != _ARRAY_EXTENSION:
        raise WireFormatError(f"extension type {code} is unknown; only arrays (type {_ARRAY_EXTENSION}) are allowed")
    if len(payload) < 2:
        raise WireFormatError(f"an array extension of {len(payload)} bytes has no header")
    dtype, dimensions = _DTYPE_OF_CODE.get(payload[0]), payload[1]
    if dtype is None or dimensions > _MAX_DIMENSIONS:
        raise WireFormatError(f"array header with dtype code {payload[0]} and {dimensions} dimensions is not allowed")
    start = 2 + 4 * dimensions
    if len(payload) < start:
        raise WireFormatError(f"an array extension of {len(payload)} bytes ends inside its shape")
    shape = struct.unpack_from(f"<{dimensions}I", payload, 2)
    expected = math.prod(shape) * dtype.itemsize
    if len(payload) - start != expected:
        raise WireFormatError(
            f"array of shape {shape} and dtype {dtype} needs {expected} bytes, the message holds {len(payload) - start}"
        )
    array = np.frombuffer(payload, dtype=dtype, offset=start) if expected else np.empty(shape, dtype)
    if dtype.kind == "b" and expected and int(array.view(np.uint8).max()) > 1:
        raise WireFormatError("a bool array holds bytes other than 0 and 1")
    array = array.reshape(shape)
    array.flags.writeable = False
    return array


@lru_cache(maxsize=256)
def _array_type(wanted: Any) -> tuple[int | None, np.dtype[Any] | None] | None:
    """(dimensions, dtype) that an array annotation asks for, each None where it is free; None for another type.

    ``NDArray[x]`` means one-dimensional; an array of two dimensions is annotated ``np.ndarray[tuple[int, int], ...]``.
    """
    if wanted is np.ndarray:
        return None, None
    if typing.get_origin(wanted) is not np.ndarray:
        return None
    shape, dtype = typing.get_args(wanted)
    axes = typing.get_args(shape)
    scalar = next((a for a in typing.get_args(dtype) if isinstance(a, type) and issubclass(a, np.generic)), None)
    dimensions = 1 if not axes or Ellipsis in axes else len(axes)
    return dimensions, None if scalar is None or scalar is np.generic else np.dtype(scalar)


def _decode_hook(wanted: Any, value: Any) -> Any:
    expected = _array_type(wanted)
    if expected is None:
        raise WireFormatError(f"a field of type {wanted} has no wire format")
    if not isinstance(value, np.ndarray):
        raise WireFormatError(f"expected an array, got {type(value).__name__}")
    dimensions, dtype = expected
    if dimensions is not None and value.ndim != dimensions:
        raise WireFormatError(f"expected an array of {dimensions} dimension(s), got shape {value.shape}")
    if dtype is not None and value.dtype != dtype:
        raise WireFormatError(f"expected an array of dtype {dtype}, got {value.dtype}")
    return value


_encoder = msgspec.msgpack.Encoder(enc_hook=_encode_hook)


@lru_cache(maxsize=256)
def _decoder(wanted: Any) -> msgspec.msgpack.Decoder[Any]:
    return msgspec.msgpack.Decoder(wanted, dec_hook=_decode_hook, ext_hook=_unpack_array)


def encode(value: Any) -> bytes:
    """Any Struct, or list or dict of them, as a message. A value without a wire format raises ``TypeError``."""
    return _ENVELOPE + _encoder.encode(value)


def decode(data: Buffer, wanted: type[T], *, max_bytes: int = DEFAULT_MAX_BYTES) -> T:
    """The ``wanted`` value in a message, its arrays read-only views of ``data``; raises ``WireFormatError``."""
    view = memoryview(data)
    if view.nbytes > max_bytes:
        raise WireFormatError(f"message of {view.nbytes} bytes is over the limit of {max_bytes}")
    if bytes(view[:4]) != _ENVELOPE:
        raise WireFormatError(
            f"message begins with {bytes(view[:4])!r} instead of {_ENVELOPE!r}: not a message, or another schema"
        )
    key: Any = wanted
    decoder = _decoder(key)
    try:
        return cast(T, decoder.decode(view[4:]))
    except WireFormatError:
        raise
    except (ValueError, TypeError, OverflowError, RecursionError, MemoryError) as error:
        raise WireFormatError(f"cannot decode {getattr(wanted, '__name__', wanted)}: {error}") from error


def encode_trajectory(trajectory: Trajectory) -> bytes:
    """One trajectory as a message."""
    return encode(trajectory)


def decode_trajectory(data: Buffer, *, max_bytes: int = DEFAULT_MAX_BYTES) -> Trajectory:
    """The trajectory in a message; its arrays are read-only views of ``data``. Raises ``WireFormatError``."""
    return decode(data, Trajectory, max_bytes=max_bytes)


def encode_group(group: Group) -> bytes:
    """One group with its trajectories as a message."""
    return encode(group)


def pack_group(header: GroupHeader, trajectories: Sequence[Buffer]) -> bytes:
    """The message ``encode_group`` would make, from trajectories that are messages already: none is decoded."""
    bodies = [msgspec.Raw(memoryview(data)[4:]) for data in trajectories]
    return _ENVELOPE + _encoder.encode({"header": header, "trajectories": bodies})


def group_parts(header: GroupHeader, trajectories: Sequence[Buffer]) -> list[Buffer]:
    """What ``pack_group`` makes, in pieces that lie one after the other: no trajectory is copied."""
    count = len(trajectories)
    array = bytes([0x90 | count]) if count < 16 else struct.pack(">BI", 0xDD, count)
    names = _encoder.encode("header"), _encoder.encode("trajectories")
    first = b"".join((_ENVELOPE, b"\x82", names[0], _encoder.encode(header), names[1], array))
    return [first, *(memoryview(data)[4:] for data in trajectories)]


def decode_group(data: Buffer, *, max_bytes: int = DEFAULT_MAX_BYTES) -> Group:
    """The group in a message; its arrays are read-only views of ``data``. Raises ``WireFormatError``."""
    return decode(data, Group, max_bytes=max_bytes)
