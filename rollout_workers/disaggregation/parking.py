"""Whose keys and values lie in host memory while their sessions wait between turns. Decides; holds no tensors itself."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

Payload = TypeVar("Payload")


@dataclass
class _Parked(Generic[Payload]):
    payload: Payload
    nbytes: int
    held: bool


class ParkingLot(Generic[Payload]):
    """Payloads by session under a budget of bytes; the one unused longest gives way, held ones never.

    >>> lot = ParkingLot[str](100)
    >>> lot.park("a", "kv of a", 60), lot.park("b", "kv of b", 60), lot.take("a"), lot.take("b")
    (True, True, None, 'kv of b')
    >>> lot.parks, lot.hits, lot.evictions, lot.used
    (2, 1, 1, 0)
    """

    def __init__(self, budget: int) -> None:
        self.budget = budget
        """Bytes; 0 parks nothing."""
        self._parked: OrderedDict[str, _Parked[Payload]] = OrderedDict()
        self.used = 0
        self.parks = 0
        self.hits = 0
        self.evictions = 0

    def __len__(self) -> int:
        return len(self._parked)

    def __contains__(self, session: str) -> bool:
        return session in self._parked

    def fits(self, nbytes: int, instead_of: str = "") -> bool:
        """Whether ``nbytes`` could be parked now (in place of what ``instead_of`` has here)."""
        held = sum(p.nbytes for session, p in self._parked.items() if p.held and session != instead_of)
        return held + nbytes <= self.budget

    def park(self, session: str, payload: Payload, nbytes: int, *, held: bool = False) -> bool:
        """Keep a payload, in place of what the session had; others give way. False: there can be no room for it."""
        if not self.fits(nbytes, instead_of=session):
            return False
        self.drop(session)
        while self.used + nbytes > self.budget:
            oldest = next(name for name, parked in self._parked.items() if not parked.held)
            self.drop(oldest)
            self.evictions += 1
        self._parked[session] = _Parked(payload, nbytes, held)
        self.used += nbytes
        self.parks += 1
        return True

    def look(self, session: str) -> Payload | None:
        """What a session has here; it stays."""
        parked = self._parked.get(session)
        return None if parked is None else parked.payload

    def take(self, session: str) -> Payload | None:
        """What a session has here, which leaves."""
        parked = self._remove(session)
        if parked is None:
            return None
        self.hits += 1
        return parked.payload

    def drop(self, session: str) -> None:
        """Forget what a session has here; unknown sessions are ignored."""
        self._remove(session)

    def hold(self, session: str, held: bool) -> None:
        """Keep a session's payload from giving way, or let it again."""
        parked = self._parked.get(session)
        if parked is not None:
            parked.held = held

    def drop_where(self, stale: Callable[[Payload], bool]) -> None:
        """Forget every payload that is ``stale``."""
        for session in [name for name, parked in self._parked.items() if stale(parked.payload)]:
            self.drop(session)

    def _remove(self, session: str) -> _Parked[Payload] | None:
        parked = self._parked.pop(session, None)
        if parked is not None:
            self.used -= parked.nbytes
        return parked
