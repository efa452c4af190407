"""How many engines a run shall have: what a person asked for, and which engines come and go for it. Pure."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

KEY = "engines"
MOST = 1024
"""More engines than this at once are a slip of the pen."""


class ScaleError(Exception):
    """What was asked for cannot be done; the message is for the person who asked, and nothing has been changed."""


@dataclass(frozen=True)
class Change:
    """``amount`` engines more (or fewer) than now, or, if ``absolute``, so many in all."""

    amount: int
    absolute: bool

    def target(self, present: int) -> int:
        """How many engines there shall be."""
        return self.amount if self.absolute else present + self.amount


@dataclass(frozen=True)
class ScalePlan:
    """Indices of the engines to start and to take out."""

    before: int
    after: int
    add: tuple[int, ...] = ()
    remove: tuple[int, ...] = ()


def parse_change(text: str) -> Change:
    """``engines=+2``, ``engines=-1`` or ``engines=3``. Raises ScaleError saying what it may be.

    >>> parse_change("engines=+1"), parse_change("engines=3").target(1)
    (Change(amount=1, absolute=False), 3)
    """
    key, equals, value = text.partition("=")
    if key.strip() != KEY:
        raise ScaleError(
            f"{text!r}: only {KEY} can be scaled while a run is under way; give {KEY}=+1, {KEY}=-1 or {KEY}=3"
        )
    match = re.fullmatch(r"\s*([+-]?)(\d{1,9})\s*", value)
    if not equals or match is None:
        raise ScaleError(f"{text!r}: give {KEY}=+1, {KEY}=-1 or {KEY}=3")
    sign, number = match[1], int(match[2])
    return Change(-number if sign == "-" else number, absolute=not sign)


def plan_scale(change: Change, serving: Sequence[int], others: Sequence[int], next_index: int) -> ScalePlan:
    """Which engines come or go.

    ``serving`` are the indices of the engines in service, ``others`` those of engines that start or are being replaced.
    New engines get indices that were never used. Those that joined last leave first: an evaluation under way may need
    the others, which hold its version. Raises ScaleError if fewer than one would serve.
    """
    before = len(serving) + len(others)
    after = change.target(before)
    if after < 1:
        raise ScaleError(f"{_asked(change)}: a run needs at least 1 engine, and it has {before}")
    if after > MOST:
        raise ScaleError(f"{_asked(change)}: that makes {after} engines; {MOST} are the most")
    if after >= before:
        return ScalePlan(before, after, add=tuple(range(next_index, next_index + after - before)))
    leaving = before - after
    if leaving >= len(serving):
        raise ScaleError(
            f"{_asked(change)}: only {len(serving)} of the {before} engines serve at this moment, so none would be left; "
            "try again when the others are there"
        )
    return ScalePlan(before, after, remove=tuple(sorted(serving)[-leaving:]))


def _asked(change: Change) -> str:
    return f"{KEY}={change.amount}" if change.absolute else f"{KEY}={change.amount:+d}"
