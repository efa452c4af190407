"""Requests and answers over TCP: four bytes of length, msgpack, and for a read the bytes themselves.

Bounded: a request or an answer that is longer than it may be, or is none, is a WeightTransferError.
"""

from __future__ import annotations

import socket
import struct
from typing import TypeVar

import msgspec

from weight_sync.errors import WeightTransferError

MAX_FRAME = 64 << 20
_LENGTH = struct.Struct("<I")
Frame = TypeVar("Frame")


class Request(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """``read``: bytes ``start:end`` of the publication ``key``. ``stage``: hold ``offer``, and say where it lies."""

    kind: str
    key: str = ""
    start: int = 0
    end: int = 0
    offer: bytes = b""


class Answer(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """``error``: why not. ``nbytes`` bytes follow a read. ``shared``: the offer of the file in shared memory."""

    error: str = ""
    nbytes: int = 0
    shared: bytes = b""


def send_frame(connection: socket.socket, frame: Request | Answer) -> None:
    data = msgspec.msgpack.encode(frame)
    connection.sendall(_LENGTH.pack(len(data)) + data)


def receive_frame(connection: socket.socket, kind: type[Frame]) -> Frame | None:
    """None when the other side has closed the connection. Raises WeightTransferError, OSError."""
    head = bytearray(_LENGTH.size)
    if not _fill(connection, memoryview(head), may_end=True):
        return None
    (size,) = _LENGTH.unpack(head)
    if size > MAX_FRAME:
        raise WeightTransferError(f"a frame of {size} bytes is longer than {MAX_FRAME}")
    body = bytearray(size)
    _fill(connection, memoryview(body))
    try:
        return msgspec.msgpack.decode(body, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise WeightTransferError(f"not a {kind.__name__.lower()}: {error}") from error


def receive_bytes(connection: socket.socket, target: memoryview) -> None:
    """Fill ``target``. Raises WeightTransferError if the other side ends before."""
    _fill(connection, target)


def _fill(connection: socket.socket, target: memoryview, *, may_end: bool = False) -> bool:
    filled = 0
    while filled < len(target):
        count = connection.recv_into(target[filled:])
        if not count:
            if may_end and not filled:
                return False
            raise WeightTransferError(f"the other side closed the connection after {filled} of {len(target)} bytes")
        filled += count
    return True


def connect(address: tuple[str, int], timeout_s: float, what: str) -> socket.socket:
    """Raises WeightTransferError, saying who ``what`` was, if nobody answers there."""
    try:
        connection = socket.create_connection(address, timeout=timeout_s)
    except OSError as error:
        raise WeightTransferError(f"{what} at {address[0]}:{address[1]} cannot be reached: {error}") from error
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def ask(connection: socket.socket, request: Request) -> Answer:
    """Raises WeightTransferError with the other side's reason if it refuses, or is gone."""
    try:
        send_frame(connection, request)
        answer = receive_frame(connection, Answer)
    except OSError as error:
        raise WeightTransferError(f"the connection broke: {error}") from error
    if answer is None:
        raise WeightTransferError("the other side closed the connection instead of answering")
    if answer.error:
        raise WeightTransferError(answer.error)
    return answer


def read(connection: socket.socket, key: str, start: int, target: memoryview) -> None:
    """Fill ``target`` with the bytes of publication ``key`` from ``start``. Raises WeightTransferError."""
    answer = ask(connection, Request(kind="read", key=key, start=start, end=start + len(target)))
    if answer.nbytes != len(target):
        raise WeightTransferError(f"{answer.nbytes} bytes were announced instead of {len(target)}")
    try:
        receive_bytes(connection, target)
    except OSError as error:
        raise WeightTransferError(f"the connection broke: {error}") from error
