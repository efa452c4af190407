from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experience.transport.frames import BUFFER_BYTES, FrameError, FrameReader, Kind, head

BODIES = st.lists(st.one_of(st.binary(max_size=40), st.integers(1, 3).map(lambda n: b"x" * (n * 100_000))), max_size=12)


def stream_of(bodies: list[bytes]) -> bytes:
    return b"".join(head(Kind.ADD, number, len(body)) + body for number, body in enumerate(bodies))


def read(reader: FrameReader, stream: bytes, sizes: list[int]) -> list[tuple[int, int, bytes]]:
    """What the reader makes of the stream when it arrives in pieces of these sizes, over and over."""
    frames: list[tuple[int, int, bytes]] = []
    at = turn = 0
    while at < len(stream):
        room = reader.free()
        count = min(sizes[turn % len(sizes)], len(room), len(stream) - at)
        assert count > 0, "the reader always has room"
        room[:count] = stream[at : at + count]
        room.release()
        frames += reader.received(count)
        at += count
        turn += 1
    return frames


@settings(max_examples=60, deadline=None)
@given(bodies=BODIES, sizes=st.lists(st.integers(500, 400_000), min_size=1, max_size=5))
def test_frames_come_out_as_they_went_in_however_the_stream_is_cut(bodies: list[bytes], sizes: list[int]) -> None:
    frames = read(FrameReader(1 << 20), stream_of(bodies), sizes)
    assert frames == [(Kind.ADD, number, body) for number, body in enumerate(bodies)]


@given(bodies=st.lists(st.binary(max_size=9), min_size=1, max_size=4))
def test_frames_survive_arriving_byte_by_byte(bodies: list[bytes]) -> None:
    assert [body for _, _, body in read(FrameReader(100), stream_of(bodies), [1])] == bodies


def test_a_frame_larger_than_the_buffer_is_read_and_the_buffer_shrinks_again() -> None:
    reader = FrameReader(8 << 20)
    large = b"y" * (3 * BUFFER_BYTES)
    assert [body for _, _, body in read(reader, stream_of([b"a", large, b"b"]), [70_000])] == [b"a", large, b"b"]
    assert len(reader.free()) <= BUFFER_BYTES


def test_a_frame_over_the_bound_is_refused_before_it_is_read() -> None:
    with pytest.raises(FrameError, match="1025 bytes is over the limit of 1024"):
        read(FrameReader(1024), head(Kind.ADD, 1, 1025), [5])
