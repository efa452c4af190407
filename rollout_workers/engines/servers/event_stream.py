"""Server-sent events out of bytes that arrive in any cut."""

from __future__ import annotations

from rollout_workers.engines.servers.adapter import ServerAnswerError

MAX_EVENT_BYTES = 32 << 20
"""An event longer than this is no answer to a generate call."""

DONE = b"[DONE]"


class EventStream:
    """Splits a stream into the payloads of its ``data:`` lines.

    Comments and other fields are passed over. The stream is bounded: what is kept between two calls is at most one
    event.
    """

    def __init__(self, max_event_bytes: int = MAX_EVENT_BYTES) -> None:
        self._rest = bytearray()
        self._max = max_event_bytes
        self.done = False
        """Whether ``data: [DONE]`` has been seen."""

    def feed(self, data: bytes) -> list[bytes]:
        """The payloads that ``data`` completes. Raises ServerAnswerError for anything but events."""
        self._rest += data
        if b"\n" not in data and len(self._rest) <= self._max:
            return []
        *lines, rest = bytes(self._rest).split(b"\n")
        self._rest = bytearray(rest)
        if len(rest) > self._max or any(len(line) > self._max for line in lines):
            raise ServerAnswerError(f"an event of more than {self._max} bytes in the answer")
        payloads = (self._payload(line) for line in lines)
        return [payload for payload in payloads if payload is not None]

    def finish(self) -> list[bytes]:
        """The payload of a last line without its end, if there is one."""
        rest, self._rest = bytes(self._rest), bytearray()
        payload = self._payload(rest)
        return [] if payload is None else [payload]

    def _payload(self, line: bytes) -> bytes | None:
        line = line.strip()
        if not line or line.startswith((b":", b"event:", b"id:", b"retry:")):
            return None
        if not line.startswith(b"data:"):
            raise ServerAnswerError(f"no event of a stream: {shown(line)}")
        if self.done:
            raise ServerAnswerError(f"an event after the end of the stream: {shown(line)}")
        payload = line[len(b"data:") :].strip()
        if payload == DONE:
            self.done = True
            return None
        return payload


def shown(data: bytes, limit: int = 120) -> str:
    """The beginning of an answer, for an error message."""
    text = repr(data[:limit])[1:]
    return text if len(data) <= limit else f"{text} (of {len(data)} bytes)"
