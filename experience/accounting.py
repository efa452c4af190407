"""Where the seconds of an actor went: one cause at a time, so that the causes add up to the wall-clock.

An `Account` is a pure state machine (time is an argument); a `TimelineWriter` keeps its spans in a file of the run, from
which the report, the trace and the benchmarks are made after the run, also after a kill -9.
"""

from __future__ import annotations

from collections import deque
from enum import StrEnum
from pathlib import Path
from typing import NamedTuple

import msgspec


class Cause(StrEnum):
    """What a second was spent on. The first three are work, the others are the bubbles."""

    PREFILL = "prefill"
    DECODE = "decode"
    TRAIN = "train"
    ENVIRONMENT = "environment"
    """Waiting for environments (for an environment actor: working)."""
    REWARD = "reward"
    QUEUE_FULL = "queue_full"
    QUEUE_EMPTY = "queue_empty"
    """The learner has no finished group, while episodes could still be started."""
    WEIGHT_STALL = "weight_stall"
    STRAGGLER = "straggler"
    """Everything that may start has started, and a few slow episodes are waited for."""
    PACING = "pacing"
    """An engine has nothing to do because no further group may start before the learner's next version."""
    OTHER_PHASE = "other_phase"
    """Prefill and decode are split: an engine of one phase has nothing to do while requests are in the other."""
    STARTUP = "startup"
    SAVE = "save"
    FAILURE = "failure"
    """Lost to a failure, until the replacement started."""
    IDLE = "idle"
    """No work; an account knows no more. The run's attribution splits it among the causes above."""


SPANS_KEPT = 1 << 16
"""Spans that an account keeps for `Account.take_spans`; the oldest go when nobody takes them."""

WORK = frozenset({Cause.PREFILL, Cause.DECODE, Cause.TRAIN})


class Span(NamedTuple):
    """``lane`` did ``cause`` from ``began_at`` to ``ended_at`` (Unix seconds)."""

    lane: str
    cause: Cause
    began_at: float
    ended_at: float


class Account:
    """The seconds of one lane (an actor, or one accelerator of it) by cause.

    >>> account = Account("engine-0.0", 10.0)
    >>> account.switch(Cause.DECODE, 12.0); account.switch(Cause.DECODE, 13.0); account.switch(Cause.IDLE, 15.0)
    >>> account.seconds(16.0)
    {<Cause.STARTUP: 'startup'>: 2.0, <Cause.DECODE: 'decode'>: 3.0, <Cause.IDLE: 'idle'>: 1.0}
    >>> [(span.cause.value, span.began_at, span.ended_at) for span in account.take_spans()]
    [('startup', 10.0, 12.0), ('decode', 12.0, 15.0)]
    """

    def __init__(self, lane: str, now: float, cause: Cause = Cause.STARTUP) -> None:
        self.lane = lane
        self.cause = cause
        self.began_at = now
        self._since = now
        self._charged_to = now
        self._seconds: dict[Cause, float] = {}
        self._spans: deque[Span] = deque(maxlen=SPANS_KEPT)

    def switch(self, cause: Cause, now: float) -> None:
        """From ``now`` on seconds belong to ``cause``. Time never runs backwards: an earlier ``now`` counts as the last."""
        self._charge(now)
        if cause is self.cause:
            return
        if self._charged_to > self._since:
            self._spans.append(Span(self.lane, self.cause, self._since, self._charged_to))
        self.cause, self._since = cause, self._charged_to

    def seconds(self, now: float) -> dict[Cause, float]:
        """Seconds by cause up to ``now``; they add up to the time since the account was opened."""
        self._charge(now)
        return dict(self._seconds)

    def take_spans(self, now: float | None = None) -> list[Span]:
        """The finished spans since the last call; with ``now`` the present one is cut there and included."""
        if now is not None:
            self._charge(now)
            if self._charged_to > self._since:
                self._spans.append(Span(self.lane, self.cause, self._since, self._charged_to))
                self._since = self._charged_to
        spans = list(self._spans)
        self._spans.clear()
        return spans

    def _charge(self, now: float) -> None:
        if now > self._charged_to:
            self._seconds[self.cause] = self._seconds.get(self.cause, 0.0) + now - self._charged_to
            self._charged_to = now


def thin(spans: list[Span], least_s: float) -> list[Span]:
    """Spans of one lane, in order and without gaps, with runs of short ones merged: fewer spans, the same seconds by cause.

    Within a run of spans shorter than ``least_s`` (cut after five times that) the spans of one cause are laid end to end.
    """
    kept: list[Span] = []
    run: list[Span] = []
    for span in spans:
        short = span.ended_at - span.began_at < least_s
        if run and (not short or run[-1].ended_at - run[0].began_at >= 5 * least_s or run[0].lane != span.lane):
            kept += _merged(run)
            run = []
        if short:
            run.append(span)
        elif kept and kept[-1][:2] == span[:2] and kept[-1].ended_at == span.began_at:
            kept[-1] = kept[-1]._replace(ended_at=span.ended_at)
        else:
            kept.append(span)
    return kept + _merged(run)


def _merged(run: list[Span]) -> list[Span]:
    seconds: dict[Cause, float] = {}
    for span in run:
        seconds[span.cause] = seconds.get(span.cause, 0.0) + span.ended_at - span.began_at
    merged, at = [], run[0].began_at if run else 0.0
    for cause, length in seconds.items():
        merged.append(Span(run[0].lane, cause, at, at + length))
        at += length
    return merged


class TimelineWriter:
    """Appends the spans of an actor to ``directory/<actor>.jsonl``, one JSON array a line.

    A process that is killed loses what was not written since its last `write`; what is there stays readable, also when
    the next life of the actor goes on in the same file.
    """

    def __init__(self, directory: Path, actor: str) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.path = directory / f"{actor}.jsonl"
        self._file = self.path.open("ab", buffering=0)
        if self._is_torn():
            self._file.write(b"\n")
        self.size = self._file.tell()
        """Bytes of the file."""

    def write(self, spans: list[Span]) -> None:
        if spans:
            rounded = [(span.lane, span.cause, round(span.began_at, 6), round(span.ended_at, 6)) for span in spans]
            self.size += self._file.write(b"".join(msgspec.json.encode(span) + b"\n" for span in rounded)) or 0

    def close(self) -> None:
        self._file.close()

    def _is_torn(self) -> bool:
        with self.path.open("rb") as file:
            end = file.seek(0, 2)
            if end == 0:
                return False
            file.seek(end - 1)
            return file.read(1) != b"\n"


def read_timeline(directory: Path) -> list[Span]:
    """All spans of a run's actors in order of their beginning; a line that was cut off is left out."""
    spans: list[Span] = []
    for path in sorted(directory.glob("*.jsonl")):
        spans += read_spans(path)
    return sorted(spans, key=lambda span: (span.began_at, span.lane))


def read_spans(path: Path) -> list[Span]:
    """The spans of one actor's file in the order in which they were written; a line that was cut off is left out."""
    spans = []
    for line in path.read_bytes().splitlines():
        try:
            spans.append(msgspec.json.decode(line, type=Span))
        except msgspec.DecodeError:  # torn by a kill -9
            continue
    return spans
