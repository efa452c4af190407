"""An append-only, checksummed, segment-rotated journal, readable by other processes while it is written.

A journal is a directory of segments ``000000.journal``, ``000001.journal`` and so on. A segment is an eight-byte head
and records: ``marker (4) | crc32 (4) | payload length (4) | kind length (1) | kind | payload``, little-endian, the
checksum over everything after itself. A *position* is ``segment << 40 | offset``.

A crash may tear the tail of the last segment: the tail is cut, never trusted. Damage anywhere else is a
``JournalError`` that names the file and the offset. A bad record is a torn tail exactly when no whole record follows it
in the last segment.
"""

from __future__ import annotations

import logging
import mmap
import os
import struct
import threading
import zlib
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import NamedTuple

from experience.write_behind import WriteBehind

logger = logging.getLogger(__name__)

Buffer = bytes | bytearray | memoryview

_SEGMENT_HEAD = b"MLRJRNL\x01"
_MARKER = b"\xf5\x1eRc"
_HEAD = struct.Struct("<4sIIB")
_CHECKED_FROM = 8
_OFFSET_BITS = 40
_JOINED_BYTES = 4096
"""Payloads below this are copied behind their head; larger ones are written from where they are."""
_BUFFERS_AT_ONCE = 1024
"""The kernel's limit for one gathering write."""
_BEHIND_BYTES = 16 << 20
"""How much of the present segment is written before the disk is asked to have it."""


class JournalError(RuntimeError):
    """A journal that cannot be read or written; names the file and, where it helps, the offset and the remedy."""


class Record(NamedTuple):
    """One record: its kind, its payload (a view of the mapped file, or bytes) and its position."""

    kind: str
    payload: memoryview
    position: int


def _pack_head(kind: str, payload: bytes) -> bytes:
    """All of a record that comes before its payload."""
    name = kind.encode()
    if not 0 < len(name) < 256:
        raise ValueError(f"a record kind has 1 to 255 bytes, got {kind!r}")
    length = len(payload)
    if length >= 1 << 32:
        raise ValueError(f"a record payload has less than 4 GiB, got {length} bytes")
    checked = struct.pack("<IB", length, len(name)) + name
    return b"".join((_MARKER, struct.pack("<I", zlib.crc32(payload, zlib.crc32(checked))), checked))


def _parse(data: memoryview, offset: int) -> tuple[str, memoryview, int] | None:
    """(kind, payload, end) of the whole and sound record at ``offset``, or None."""
    if offset + _HEAD.size > len(data):
        return None
    marker, checksum, length, kind_length = _HEAD.unpack_from(data, offset)
    begin = offset + _HEAD.size + kind_length
    end = begin + length
    if marker != _MARKER or end > len(data) or zlib.crc32(data[offset + _CHECKED_FROM : end]) != checksum:
        return None
    return bytes(data[offset + _HEAD.size : begin]).decode(errors="replace"), data[begin:end], end


def _map(path: Path) -> memoryview:
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size == 0:
            return memoryview(b"")
        return memoryview(mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ))


def _has_sound_record(data: memoryview, offset: int) -> bool:
    """Whether a whole record lies anywhere after ``offset``."""
    content = bytes(data[offset:])
    found = content.find(_MARKER, 1)
    while found >= 0:
        if _parse(data, offset + found) is not None:
            return True
        found = content.find(_MARKER, found + 1)
    return False


def _segment_number(path: Path) -> int:
    try:
        return int(path.stem)
    except ValueError:
        raise JournalError(f"{path} is not a journal segment: its name should be a number") from None


def _write_all(descriptor: int, buffers: list[bytes], offset: int) -> int:
    """Writes all the buffers one after the other from ``offset`` on; returns how many bytes that were."""
    total = sum(len(data) for data in buffers)
    done = os.pwritev(descriptor, buffers, offset)
    if done < total:
        rest = memoryview(b"".join(buffers))
        while done < total:
            done += os.pwrite(descriptor, rest[done:], offset + done)
    return total


class JournalReader:
    """Reads a journal; another process may be writing it."""

    def __init__(self, directory: Path | str) -> None:
        self.directory = Path(directory)
        self.cut_bytes = 0
        """Bytes of a torn tail that the last replay left out."""
        self._maps: dict[int, memoryview] = {}

    def segments(self) -> list[Path]:
        """The segment files, oldest first."""
        return sorted(self.directory.glob("*.journal"), key=_segment_number)

    def replay(self) -> Iterator[tuple[str, memoryview]]:
        """(kind, payload) of every record in order, without copying; the payload stays valid while it is referenced."""
        for record in self.records():
            yield record.kind, record.payload

    def records(self) -> Iterator[Record]:
        """Every record in order. Raises ``JournalError`` at damage that is not a torn tail."""
        self.cut_bytes = 0
        segments = self.segments()
        for path in segments:
            data = _map(path)
            end = yield from self._segment_records(path, data)
            if end < len(data):
                self.cut_bytes = self._judge_damage(path, data, end, is_last=path == segments[-1])

    def read(self, position: int) -> Record:
        """The record at a position that ``append`` or ``records`` gave."""
        number, offset = position >> _OFFSET_BITS, position & ((1 << _OFFSET_BITS) - 1)
        path = self.directory / f"{number:06d}.journal"
        data = self._maps.get(number)
        if data is None or offset >= len(data) or _parse(data, offset) is None:
            if not path.exists():
                raise JournalError(f"{path} does not exist; the journal has no position {position}")
            data = self._maps[number] = _map(path)
        parsed = _parse(data, offset)
        if parsed is None:
            raise JournalError(f"{path} holds no sound record at offset {offset}")
        return Record(parsed[0], parsed[1], position)

    def _segment_records(self, path: Path, data: memoryview) -> Generator[Record, None, int]:
        """Yields sound records; returns the offset at which they end."""
        if bytes(data[: len(_SEGMENT_HEAD)]) != _SEGMENT_HEAD:
            return 0
        offset, number = len(_SEGMENT_HEAD), _segment_number(path)
        while (parsed := _parse(data, offset)) is not None:
            yield Record(parsed[0], parsed[1], number << _OFFSET_BITS | offset)
            offset = parsed[2]
        return offset

    def _judge_damage(self, path: Path, data: memoryview, offset: int, *, is_last: bool) -> int:
        """The length of a torn tail at ``offset``; raises ``JournalError`` when it is anything else."""
        if not is_last or _has_sound_record(data, offset):
            raise JournalError(
                f"{path} is damaged at offset {offset}, before its end: restore the file from a copy, or go back to a "
                f"checkpoint whose journal position lies before it"
            )
        return len(data) - offset


class Journal(JournalReader):
    """A journal open for append, by one process at a time. Opening it cuts a torn tail.

    One thread appends; ``flush`` may run on another one meanwhile, so that appending goes on while the disk is written.
    """

    def __init__(self, directory: Path | str, *, segment_bytes: int = 64 << 20, buffer_bytes: int = 1 << 20) -> None:
        super().__init__(directory)
        self._segment_bytes = segment_bytes
        self._buffer_bytes = buffer_bytes
        self._pending: list[bytes] = []
        self._writing = threading.Lock()
        self._written = 0
        self._end = 0
        self._descriptor = -1
        self._behind = WriteBehind()
        self._left_behind = 0
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._open_last()
        except OSError as error:
            raise self._write_error(error) from error
        self._end = self._written

    @property
    def position(self) -> int:
        """Where the next record goes."""
        return self._number << _OFFSET_BITS | self._end

    @property
    def pending_bytes(self) -> int:
        """What the next flush has to write."""
        return self._end - self._written

    def append(self, kind: str, payload: Buffer) -> int:
        """Adds a record and returns its position.

        Raises ``JournalError`` when the disk is full and the buffer too; the record was not added then.
        """
        if self.pending_bytes >= self._buffer_bytes:
            self.flush()
        payload = payload if isinstance(payload, bytes) else bytes(payload)
        head = _pack_head(kind, payload)
        size = len(head) + len(payload)
        if self._end + size > self._segment_bytes and self.position_in_segment > 0:
            self._rotate()
        position = self.position
        self._pending += (head + payload,) if len(payload) < _JOINED_BYTES else (head, payload)
        self._end += size
        return position

    @property
    def position_in_segment(self) -> int:
        """Bytes of records in the present segment, buffered ones included."""
        return self._end - len(_SEGMENT_HEAD)

    def flush(self, *, sync: bool = False) -> None:
        """Writes what is buffered; with ``sync`` it also survives the end of the machine.

        When the disk is full this raises ``JournalError`` and keeps the buffer: a later flush writes it again from its
        beginning, once there is room. What a failed flush left behind is a torn tail.
        """
        try:
            with self._writing:
                self._write_pending()
                self._leave_behind()
            if sync:
                self._behind.wait()
                os.fsync(self._descriptor)
        except OSError as error:
            raise self._write_error(error) from error

    def read(self, position: int) -> Record:
        """The record at a position that ``append`` or ``records`` gave."""
        self.flush()
        return super().read(position)

    def records(self) -> Iterator[Record]:
        """Every record in order, those just appended included."""
        self.flush()
        return super().records()

    def close(self) -> None:
        """Flushes and closes; a second call does nothing."""
        if self._descriptor >= 0:
            try:
                self.flush(sync=True)
            finally:
                os.close(self._descriptor)
                self._descriptor = -1

    def _write_pending(self) -> None:
        """Writes what was pending at the call; only then is it forgotten."""
        count = len(self._pending)
        done = 0
        for first in range(0, count, _BUFFERS_AT_ONCE):
            done += _write_all(
                self._descriptor, self._pending[first : min(first + _BUFFERS_AT_ONCE, count)], self._written + done
            )
        del self._pending[:count]
        self._written += done

    def _leave_behind(self) -> None:
        if self._written - self._left_behind >= _BEHIND_BYTES and self._behind.idle:
            self._behind.sync(self._descriptor, self._left_behind, self._written)
            self._left_behind = self._written

    def _open_last(self) -> None:
        segments = self.segments()
        if not segments:
            self._create(0)
            return
        path = segments[-1]
        self._number = _segment_number(path)
        end = self._sound_end(path)
        self._descriptor = os.open(path, os.O_WRONLY)
        size = os.fstat(self._descriptor).st_size
        if end < size or size == 0:
            logger.warning("journal %s: a torn tail of %d bytes at offset %d was cut", path, size - end, end)
            os.ftruncate(self._descriptor, end)
        self._written = end
        if end == 0:
            self._written = os.pwrite(self._descriptor, _SEGMENT_HEAD, 0)

    def _sound_end(self, path: Path) -> int:
        """Offset at which the sound records of the last segment end. Raises ``JournalError`` at damage before it."""
        data = _map(path)
        records = self._segment_records(path, data)
        while True:
            try:
                next(records)
            except StopIteration as finished:
                end = int(finished.value)
                break
        if end < len(data):
            self._judge_damage(path, data, end, is_last=True)
        return end

    def _create(self, number: int) -> None:
        path = self.directory / f"{number:06d}.journal"
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        try:
            written = os.pwrite(descriptor, _SEGMENT_HEAD, 0)
        except OSError:
            os.close(descriptor)
            raise
        self._descriptor, self._number, self._written = descriptor, number, written

    def _rotate(self) -> None:
        try:
            with self._writing:
                self._write_pending()
                previous = self._descriptor
                self._create(self._number + 1)
                self._end = self._written
            self._behind.close(previous, self._left_behind)
            self._left_behind = 0
        except OSError as error:
            raise self._write_error(error) from error

    def _write_error(self, error: OSError) -> JournalError:
        return JournalError(
            f"cannot write the journal in {self.directory}: {error.strerror}. Free space there, make it "
            f"writable or choose another run.dir, then resume the run"
        )
