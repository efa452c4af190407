"""The accounts of one process: opened by whoever runs in it, asked for by the controller, kept in a file of the run.

`open_books` is called once, when an actor's process begins; `process_books` gives them to whatever runs there, as logging
does. Without `open_books` (in tests, or outside a run) they keep totals only.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Protocol

from experience.accounting import Account, Cause, Span, TimelineWriter, read_spans, thin

FINEST_S = 0.02
"""Spans shorter than this are merged with their neighbours."""

BYTES = 4 << 20
"""How much a timeline may grow before its spans become twice as coarse (so its size grows with the logarithm of time)."""

BYTES_PER_LANE = 1 << 18
WRITE_EVERY = 20
"""A timeline is written no more often than every that many finest spans."""

_ZERO = time.time() - time.monotonic()


def clock() -> float:
    """Unix seconds that never jump while the process lives."""
    return _ZERO + time.monotonic()


class Lane(Protocol):
    """What books can keep: an `Account`, or something that shares its seconds out in another way."""

    lane: str

    def seconds(self, now: float) -> dict[Cause, float]: ...

    def take_spans(self, now: float | None = None) -> list[Span]: ...


class Books:
    """Lanes by name. ``now`` is when the process began; the lanes' seconds add up to the time since then.

    ``directory`` is where the timeline goes (None: nowhere). With ``replaces`` the process stands in for one that died:
    from the end of that one's last span the seconds are a failure's.
    """

    def __init__(self, actor: str, now: float, directory: Path | None = None, replaces: bool = False) -> None:
        self.actor = actor
        self._began_at = now
        self._writer = TimelineWriter(directory, actor) if directory is not None else None
        self._died_at: dict[str, float] = {}
        if self._writer is not None and replaces:
            self._died_at = {span.lane: span.ended_at for span in read_spans(self._writer.path)}
        self._lanes: dict[str, Lane] = {}
        self._before: dict[str, dict[Cause, float]] = {}
        """Seconds of a lane before it was opened."""
        self._pending: dict[str, list[Span]] = {}
        self._least_s = FINEST_S
        self._size_limit = BYTES
        self._written_at = now
        self._totals: dict[str, dict[Cause, float]] = {}

    def account(self, lane: str | None = None, now: float | None = None) -> Account:
        """Open an account; it begins with start-up. ``lane``: a name, the actor's own by default."""
        account = Account(lane or self.actor, clock() if now is None else now)
        self.adopt(account, account.began_at)
        return account

    def adopt(self, lane: Lane, since: float) -> None:
        """Keep ``lane``, which counts from ``since`` on; the time before that is start-up (and failure).

        In place of one of the same name it goes on from that one's last write.
        """
        if lane.lane in self._lanes:
            self._before[lane.lane] = self._totals.get(lane.lane, self._before[lane.lane])
            self._lanes[lane.lane] = lane
            return
        spans = []
        died_at = self._died_at.pop(lane.lane, self._began_at)
        if died_at < self._began_at:
            spans.append(Span(lane.lane, Cause.FAILURE, died_at, self._began_at))
        if since > self._began_at:
            spans.append(Span(lane.lane, Cause.STARTUP, self._began_at, since))
        self._lanes[lane.lane] = lane
        self._pending[lane.lane] = spans
        self._before[lane.lane] = {span.cause: span.ended_at - span.began_at for span in spans}

    def totals(self, now: float) -> dict[str, dict[Cause, float]]:
        """Seconds by lane and cause as of the last write, which this does when it is due: what is told is in the file too."""
        if now - self._written_at >= WRITE_EVERY * self._least_s or not self._totals:
            self.write(now)
        return dict(self._totals)

    def write(self, now: float) -> None:
        """Append every lane's spans up to ``now`` to the timeline."""
        self._written_at = now
        for name, lane in self._lanes.items():
            spans = self._pending.pop(name, []) + lane.take_spans(now)
            seconds = dict(self._before[name])
            for cause, value in lane.seconds(now).items():
                seconds[cause] = seconds.get(cause, 0.0) + value
            self._totals[name] = seconds
            if self._writer is not None:
                self._writer.write(thin(spans, self._least_s))
        if self._writer is not None and self._writer.size > self._size_limit:
            self._least_s *= 2
            self._size_limit += BYTES + BYTES_PER_LANE * len(self._lanes)

    def close(self, now: float) -> None:
        """Write what is left."""
        self.write(now)
        if self._writer is not None:
            self._writer.close()
            self._writer = None


_books = Books("process", clock())


def open_books(actor: str, directory: Path, replaces: bool) -> Books:
    """Begin the books of this process; see `Books`."""
    global _books
    _books = Books(actor, clock(), directory, replaces)
    return _books


def process_books() -> Books:
    """The books of this process."""
    return _books
