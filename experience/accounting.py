"""Where the seconds of an actor went: one cause at a time, so that the causes add up to the wall-clock.

An `Account` is a pure state machine (time is an argument); a `TimelineWriter` keeps its spans in a file of the run, from
which the report, the trace and the benchmarks are made after the run, also after a kill -9.
"""

from __future__ import annotations

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
    STARTUP = "startup"
    SAVE = "save"
    FAILURE = "failure"
    """Lost to a failure, until the replacement started."""
    IDLE = "idle"
    """No work; an account knows no more. The run's attribution splits it among the causes above."""


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
        self._since = now
        self._charged_to = now
        self._seconds: dict[Cause, float] = {}
        self._spans: list[Span] = []

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
        spans, self._spans = self._spans, []
        return spans

    def _charge(self, now: float) -> None:
        if now > self._charged_to:
            self._seconds[self.cause] = self._seconds.get(self.cause, 0.0) + now - self._charged_to
            self._charged_to = now


class TimelineWriter:
    """Appends the spans of an actor to ``directory/<actor>.jsonl``, one JSON array a line.

    A process that is killed loses what was not written since its last `write`; what is there stays readable.
    """

    def __init__(self, directory: Path, actor: str) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._file = (directory / f"{actor}.jsonl").open("ab", buffering=0)

    def write(self, spans: list[Span]) -> None:
        if spans:
            rounded = [(span.lane, span.cause, round(span.began_at, 6), round(span.ended_at, 6)) for span in spans]
            self._file.write(b"".join(msgspec.json.encode(span) + b"\n" for span in rounded))

    def close(self) -> None:
        self._file.close()


def read_timeline(directory: Path) -> list[Span]:
    """All spans of a run's actors in order of their beginning; a last line that was cut off is left out."""
    spans = []
    for path in sorted(directory.glob("*.jsonl")):
        for line in path.read_bytes().splitlines():
            try:
                spans.append(msgspec.json.decode(line, type=Span))
            except msgspec.DecodeError:  # torn by a kill -9
                continue
    return sorted(spans, key=lambda span: (span.began_at, span.lane))
