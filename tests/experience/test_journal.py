from __future__ import annotations

import os
import resource
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experience.journal import Journal, JournalError, JournalReader


def write(directory: Path, payloads: list[bytes], segment_bytes: int = 1 << 20) -> list[int]:
    journal = Journal(directory, segment_bytes=segment_bytes)
    positions = [journal.append("add", payload) for payload in payloads]
    journal.close()
    return positions


def payloads_of(journal: JournalReader) -> list[bytes]:
    return [bytes(payload) for _, payload in journal.replay()]


@contextmanager
def full_disk(at_bytes: int) -> Iterator[None]:
    """No file of this process may grow beyond ``at_bytes``."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (at_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, ignored)


@settings(max_examples=30)
@given(records=st.lists(st.tuples(st.text(min_size=1, max_size=8), st.binary(max_size=200)), max_size=30))
def test_what_is_appended_is_replayed_in_order(
    records: list[tuple[str, bytes]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    journal = Journal(tmp_path_factory.mktemp("journal"), segment_bytes=500)
    positions = [journal.append(kind, payload) for kind, payload in records]
    assert [(kind, bytes(payload)) for kind, payload in journal.replay()] == records
    assert [bytes(journal.read(position).payload) for position in positions] == [payload for _, payload in records]
    assert [record.position for record in journal.records()] == positions
    journal.close()


def test_segments_rotate_and_stay_within_their_size(tmp_path: Path) -> None:
    write(tmp_path, [bytes([i]) * 100 for i in range(50)], segment_bytes=1000)
    sizes = [path.stat().st_size for path in JournalReader(tmp_path).segments()]
    assert len(sizes) > 5
    assert max(sizes) <= 1000
    assert payloads_of(JournalReader(tmp_path)) == [bytes([i]) * 100 for i in range(50)]


def test_a_record_larger_than_a_segment_gets_one_of_its_own(tmp_path: Path) -> None:
    write(tmp_path, [b"a", b"b" * 5000, b"c"], segment_bytes=100)
    assert payloads_of(JournalReader(tmp_path)) == [b"a", b"b" * 5000, b"c"]


def test_an_existing_journal_is_continued(tmp_path: Path) -> None:
    write(tmp_path, [b"first"])
    write(tmp_path, [b"second"])
    assert payloads_of(JournalReader(tmp_path)) == [b"first", b"second"]


@pytest.mark.parametrize("cut", range(1, 32))
def test_a_torn_tail_is_cut_and_never_trusted(tmp_path: Path, cut: int) -> None:
    write(tmp_path, [b"one", b"two", b"three" * 4])
    path = JournalReader(tmp_path).segments()[0]
    path.write_bytes(path.read_bytes()[:-cut])
    reader = JournalReader(tmp_path)
    assert payloads_of(reader) == [b"one", b"two"]
    assert reader.cut_bytes == (13 + 3 + 20) - cut
    write(tmp_path, [b"four"])
    assert payloads_of(JournalReader(tmp_path)) == [b"one", b"two", b"four"]


@pytest.mark.parametrize("tail", [b"\0" * 100, b"\xf5\x1eRc" + b"garbage" * 9, b"x"])
def test_a_tail_of_rubbish_is_cut(tmp_path: Path, tail: bytes) -> None:
    write(tmp_path, [b"one"])
    path = JournalReader(tmp_path).segments()[0]
    path.write_bytes(path.read_bytes() + tail)
    write(tmp_path, [b"two"])
    assert payloads_of(JournalReader(tmp_path)) == [b"one", b"two"]


def test_an_empty_last_segment_is_completed(tmp_path: Path) -> None:
    write(tmp_path, [b"one"])
    (tmp_path / "000001.journal").touch()
    write(tmp_path, [b"two"])
    assert payloads_of(JournalReader(tmp_path)) == [b"one", b"two"]


@settings(max_examples=60)
@given(data=st.data())
def test_a_flipped_bit_before_the_last_record_is_an_error_with_file_and_offset(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    directory = tmp_path_factory.mktemp("journal")
    positions = write(directory, [b"payload %d" % i for i in range(5)])
    damaged = data.draw(st.integers(0, 3))
    offset = data.draw(st.integers(positions[damaged], positions[damaged + 1] - 1))
    path = JournalReader(directory).segments()[0]
    content = bytearray(path.read_bytes())
    content[offset] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    with pytest.raises(JournalError, match=rf"000000\.journal is damaged at offset {positions[damaged]}"):
        payloads_of(JournalReader(directory))
    with pytest.raises(JournalError, match="damaged"):
        Journal(directory)
    with pytest.raises(JournalError, match=f"offset {positions[damaged]}"):
        JournalReader(directory).read(positions[damaged])


def test_a_torn_record_in_an_earlier_segment_is_an_error(tmp_path: Path) -> None:
    write(tmp_path, [b"x" * 100] * 20, segment_bytes=500)
    path = JournalReader(tmp_path).segments()[1]
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(JournalError, match="000001"):
        payloads_of(JournalReader(tmp_path))


def test_a_reader_follows_a_writer(tmp_path: Path) -> None:
    journal, reader = Journal(tmp_path, segment_bytes=300), JournalReader(tmp_path)
    for i in range(20):
        position = journal.append("add", b"%d" % i)
        assert len(payloads_of(reader)) <= i
        journal.flush()
        assert payloads_of(reader)[-1] == b"%d" % i
        assert bytes(reader.read(position).payload) == b"%d" % i
    journal.close()


def test_a_payload_outlives_the_reader(tmp_path: Path) -> None:
    write(tmp_path, [b"kept"])
    payload = next(iter(JournalReader(tmp_path).replay()))[1]
    assert payload.readonly
    assert bytes(payload) == b"kept"


def test_a_full_disk_is_named_and_writing_goes_on_when_there_is_room(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.append("add", b"before")
    journal.flush()
    with full_disk(at_bytes=4096):
        journal.append("add", b"x" * 10_000)
        with pytest.raises(JournalError, match=f"cannot write the journal in {tmp_path}.*Free space"):
            journal.flush()
        assert payloads_of(JournalReader(tmp_path)) == [b"before"]
    journal.append("add", b"after")
    journal.close()
    assert payloads_of(JournalReader(tmp_path)) == [b"before", b"x" * 10_000, b"after"]


def test_a_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(JournalError, match="file"):
        Journal(tmp_path / "file" / "journal")


def test_reading_at_a_wrong_position_is_an_error(tmp_path: Path) -> None:
    positions = write(tmp_path, [b"one"])
    with pytest.raises(JournalError, match="no sound record"):
        JournalReader(tmp_path).read(positions[0] + 1)
    with pytest.raises(JournalError, match="does not exist"):
        JournalReader(tmp_path).read(7 << 40)


def test_a_kind_must_fit_its_field(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="kind"):
        Journal(tmp_path).append("", b"")


def test_appending_goes_on_while_another_thread_flushes(tmp_path: Path) -> None:
    """Rotation included: what was appended is there, in order and once."""
    journal, done = Journal(tmp_path, segment_bytes=1 << 16, buffer_bytes=1 << 14), threading.Event()

    def flush() -> None:
        while not done.is_set():
            journal.flush()

    flushing = threading.Thread(target=flush)
    flushing.start()
    sizes = [(i * 7919) % 9000 for i in range(3000)]
    positions = [journal.append("add", i.to_bytes(4, "little") + b"x" * size) for i, size in enumerate(sizes)]
    done.set()
    flushing.join(20)
    assert not flushing.is_alive()
    journal.close()
    found = payloads_of(JournalReader(tmp_path))
    assert [(int.from_bytes(data[:4], "little"), len(data) - 4) for data in found] == list(enumerate(sizes))
    assert [record.position for record in JournalReader(tmp_path).records()] == positions


def test_a_write_that_stops_half_way_is_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwritev
    monkeypatch.setattr(os, "pwritev", lambda descriptor, buffers, offset: real(descriptor, [buffers[0][:3]], offset))
    monkeypatch.setattr(os, "pwrite", lambda descriptor, data, offset: real(descriptor, [bytes(data[:1000])], offset))
    journal = Journal(tmp_path)
    for _ in range(3):
        journal.append("add", b"p" * 5000)
    journal.flush()
    assert payloads_of(JournalReader(tmp_path)) == [b"p" * 5000] * 3


def test_more_buffers_than_one_call_writes(tmp_path: Path) -> None:
    journal = Journal(tmp_path, buffer_bytes=1 << 30)
    for i in range(1500):
        journal.append("add", i.to_bytes(4, "little") * 1100)
    journal.flush()
    assert [data[:4] for data in payloads_of(JournalReader(tmp_path))] == [i.to_bytes(4, "little") for i in range(1500)]


def test_pages_given_back_are_read_again_from_the_disk(tmp_path: Path) -> None:
    journal = Journal(tmp_path, segment_bytes=1 << 30)
    payload = os.urandom(1 << 20)
    positions = []
    for _ in range(40):
        positions.append(journal.append("add", payload))
        journal.flush()
    assert all(journal.read(position).payload == payload for position in positions)
    journal.close()
    assert len(payloads_of(JournalReader(tmp_path))) == 40


def test_a_segment_that_cannot_reach_the_disk_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(descriptor: int) -> None:
        raise OSError(5, "Input/output error")

    journal = Journal(tmp_path, segment_bytes=1000)
    monkeypatch.setattr(os, "fdatasync", fails)
    for _ in range(2):
        journal.append("add", b"x" * 900)
    with pytest.raises(JournalError, match=r"cannot write the journal.*Input/output error"):
        journal.flush(sync=True)


def test_a_record_that_the_full_buffer_refuses_is_not_added(tmp_path: Path) -> None:
    journal = Journal(tmp_path, buffer_bytes=100)
    journal.append("add", b"x" * 200)
    with full_disk(at_bytes=64), pytest.raises(JournalError, match="Free space"):
        journal.append("add", b"refused")
    journal.append("add", b"refused")
    journal.close()
    assert payloads_of(JournalReader(tmp_path)) == [b"x" * 200, b"refused"]
