from __future__ import annotations

import struct
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pytest
from experience_builders import entry, header, trajectory
from hypothesis import given, settings
from hypothesis import strategies as st

from experience import wire
from experience.entries import EpisodeEntry, LeasedGroup
from experience.records import Group, Task, Trajectory, Turn
from experience.wire import WireFormatError


class Grid(msgspec.Struct):
    flat: npt.NDArray[np.float32]
    square: np.ndarray[tuple[int, int], np.dtype[np.int64]]
    free: np.ndarray
    anything: Any = None


SAMPLE = wire.encode_trajectory(trajectory("g0", "g0-0", [0, 1, 2]))
DTYPES = ["bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "float16", "float32", "float64"]


def raw_array(code: int, shape: tuple[int, ...], payload: bytes) -> bytes:
    """A trajectory message whose ``tokens`` are a hand-made array extension."""
    extension = msgspec.msgpack.Ext(1, struct.pack(f"<BB{len(shape)}I", code, len(shape), *shape) + payload)
    return SAMPLE[:4] + msgspec.msgpack.encode({"free": extension})


class OnlyFree(msgspec.Struct):
    free: np.ndarray


@given(
    versions=st.lists(st.integers(-1, 1000), max_size=50),
    reward=st.none() | st.floats(allow_nan=False, width=32),
    parts=st.dictionaries(st.text(max_size=5), st.floats(allow_nan=False), max_size=3),
    text=st.text(max_size=20),
)
def test_a_trajectory_survives_the_wire(
    versions: list[int], reward: float | None, parts: dict[str, float], text: str
) -> None:
    record = trajectory("g0", "g0-0", versions)
    record.reward, record.reward_parts, record.domain = reward, parts, text
    record.turns = [Turn(start=0, end=2, role="prompt", began_at=0.5)]
    decoded = wire.decode_trajectory(wire.encode_trajectory(record))
    for field in ("tokens", "trainable", "logprobs", "versions"):
        sent, received = getattr(record, field), getattr(decoded, field)
        assert received.dtype == sent.dtype
        assert np.array_equal(sent, received)
    plain = ("trajectory_id", "reward", "reward_parts", "domain", "turns", "status")
    assert [getattr(decoded, name) for name in plain] == [getattr(record, name) for name in plain]


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_allowed_dtype_and_shape_survives(dtype: str) -> None:
    for shape in ((0,), (5,), (2, 3), (2, 0, 3), ()):
        array = np.ones(shape, dtype)
        received = wire.decode(wire.encode([array]), list[Any])[0]
        assert received.dtype == array.dtype
        assert received.shape == array.shape
        assert np.array_equal(received, array)


def test_decoding_copies_nothing_and_arrays_are_read_only() -> None:
    decoded = wire.decode_trajectory(SAMPLE)
    assert np.shares_memory(decoded.tokens, np.frombuffer(SAMPLE, np.uint8))
    with pytest.raises(ValueError, match="read-only"):
        decoded.tokens[0] = 1


def test_arrays_of_other_layouts_are_sent_by_value() -> None:
    grid = Grid(
        flat=np.arange(10, dtype=np.float32)[::2],
        square=np.arange(6).reshape(2, 3).T,
        free=np.arange(12, dtype=np.int16).reshape(2, 3, 2)[:, ::-1],
        anything=[np.float32(1.5), np.int64(3), np.bool_(True)],
    )
    decoded = wire.decode(wire.encode(grid), Grid)
    assert np.array_equal(decoded.flat, grid.flat)
    assert np.array_equal(decoded.square, grid.square)
    assert np.array_equal(decoded.free, grid.free)
    assert decoded.anything == [1.5, 3, True]


@pytest.mark.parametrize(
    ("changed", "complaint"),
    [
        ({"flat": np.zeros(3, np.float64)}, "dtype float32, got float64"),
        ({"flat": np.zeros((1, 3), np.float32)}, "1 dimension"),
        ({"square": np.zeros(3, np.int64)}, "2 dimension"),
        ({"flat": [1.0, 2.0]}, "expected an array, got list"),
    ],
)
def test_an_array_of_another_kind_than_annotated_is_refused(changed: dict[str, Any], complaint: str) -> None:
    fields = {"flat": np.zeros(3, np.float32), "square": np.zeros((2, 2), np.int64), "free": np.zeros(1), **changed}
    with pytest.raises(WireFormatError, match=complaint):
        wire.decode(wire.encode(fields), Grid)


def test_arrays_of_different_lengths_are_refused() -> None:
    record = trajectory("g0", "g0-0", [0])
    record.logprobs = np.zeros(9, np.float32)
    with pytest.raises(WireFormatError, match="must have one length"):
        wire.decode_trajectory(wire.encode_trajectory(record))


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (raw_array(3, (4,), b"\0" * 12), "needs 16 bytes"),
        (raw_array(3, (1 << 31, 1 << 31), b""), "needs"),
        (raw_array(99, (1,), b"\0"), "dtype code 99"),
        (raw_array(5, (1,) * 9, b"\0"), "9 dimensions"),
        (raw_array(0, (2,), b"\0\7"), "other than 0 and 1"),
        (SAMPLE[:4] + msgspec.msgpack.encode({"free": msgspec.msgpack.Ext(1, b"\3\2\0")}), "inside its shape"),
        (SAMPLE[:4] + msgspec.msgpack.encode({"free": msgspec.msgpack.Ext(1, b"\3")}), "no header"),
        (SAMPLE[:4] + msgspec.msgpack.encode({"free": msgspec.msgpack.Ext(7, b"abc")}), "extension type 7"),
    ],
)
def test_a_malformed_array_is_refused_by_name(data: bytes, complaint: str) -> None:
    with pytest.raises(WireFormatError, match=complaint):
        wire.decode(data, OnlyFree)


def test_another_schema_and_foreign_bytes_are_refused() -> None:
    with pytest.raises(WireFormatError, match="another schema"):
        wire.decode_trajectory(SAMPLE[:3] + b"\x63" + SAMPLE[4:])
    with pytest.raises(WireFormatError, match="not a message"):
        wire.decode_trajectory(b'{"tokens": []}')


def test_an_oversized_message_is_refused_unread() -> None:
    with pytest.raises(WireFormatError, match="over the limit of 100"):
        wire.decode_trajectory(SAMPLE, max_bytes=100)


def test_another_type_is_refused() -> None:
    with pytest.raises(WireFormatError, match="Task"):
        wire.decode(SAMPLE, Task)
    with pytest.raises(WireFormatError):
        wire.decode(SAMPLE, list[Task])


@pytest.mark.parametrize("wanted", [Trajectory, dict[str, Any], Task])
def test_hostile_lengths_and_depths_are_refused(wanted: type[Any]) -> None:
    for body in (b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff", b"\x91" * 100_000):
        with pytest.raises(WireFormatError):
            wire.decode(SAMPLE[:4] + body, wanted)
        with pytest.raises(WireFormatError):
            wire.decode(SAMPLE[:4] + b"\x81\xa7payload" + body, wanted)


def test_values_without_a_wire_format_are_named_when_encoding() -> None:
    with pytest.raises(TypeError, match="complex128"):
        wire.encode(np.zeros(1, np.complex128))
    with pytest.raises(TypeError, match="object"):
        wire.encode([object()])


@pytest.mark.parametrize("cut", range(0, len(SAMPLE), 3))
def test_every_truncation_is_refused(cut: int) -> None:
    with pytest.raises(WireFormatError):
        wire.decode_trajectory(SAMPLE[:cut])


def decodes_or_refuses(data: bytes, wanted: type[Any]) -> None:
    try:
        value = wire.decode(data, wanted)
    except WireFormatError:
        return
    assert isinstance(value, wanted)


@settings(max_examples=500)
@given(flips=st.lists(st.tuples(st.integers(0, len(SAMPLE) - 1), st.integers(1, 255)), min_size=1, max_size=6))
def test_flipped_bits_raise_nothing_but_a_wire_format_error(flips: list[tuple[int, int]]) -> None:
    data = bytearray(SAMPLE)
    for position, mask in flips:
        data[position] ^= mask
    decodes_or_refuses(bytes(data), Trajectory)


@settings(max_examples=500)
@given(body=st.binary(max_size=300), wanted=st.sampled_from([Trajectory, Group, Task, EpisodeEntry, dict, list]))
def test_random_bytes_raise_nothing_but_a_wire_format_error(body: bytes, wanted: type[Any]) -> None:
    decodes_or_refuses(body, wanted)
    decodes_or_refuses(SAMPLE[:4] + body, wanted)


def test_a_group_packed_from_messages_is_the_group_encoded() -> None:
    records = [trajectory("g0", f"g0-{i}", [i, i + 1]) for i in range(3)]
    packed = wire.pack_group(header(0, 3), [wire.encode_trajectory(record) for record in records])
    assert packed == wire.encode_group(Group(header=header(0, 3), trajectories=records))
    group = wire.decode_group(packed)
    assert group.sampled_tokens == 6
    assert group.header == header(0, 3)


@pytest.mark.parametrize("count", [0, 1, 15, 16, 70_000])
def test_a_group_in_pieces_is_the_group_packed(count: int) -> None:
    record = wire.encode_trajectory(trajectory("g0", "g0-0", [1]))
    pieces = wire.group_parts(header(0, 3), [record] * count)
    packed = wire.pack_group(header(0, 3), [record] * count)
    assert [len(piece) for piece in pieces[1:]] == [len(record) - 4] * count
    assert wire.encode(wire.decode_group(b"".join(pieces))) == wire.encode(wire.decode_group(packed))
    assert len(pieces) == count + 1


def test_a_leased_group_encodes_for_the_learner() -> None:
    leased = LeasedGroup(header=header(0), episodes=[entry("g0", "g0-0"), entry("g0", "g0-1", [3])], version=3)
    assert [t.oldest_version for t in wire.decode_group(leased.encode()).trajectories] == [0, 3]


def test_a_list_of_records_crosses_in_one_message() -> None:
    entries = [entry("g0", f"g0-{i}", [i]) for i in range(4)]
    assert wire.decode(wire.encode(entries), list[EpisodeEntry]) == entries
