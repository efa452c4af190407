"""Which engine takes a request: session affinity first, then load, with a bound on imbalance."""

from __future__ import annotations

import heapq
from collections.abc import Sequence


class Router:
    """Sticky least-loaded routing. A pure state machine: tell it of members, starts and ends; ask it for a choice.

    A session stays with its engine (whose KV it can reuse) unless that engine is gone or has more than
    ``max_imbalance`` times the mean load plus ``slack`` requests. Ties go to the engine chosen least often so far, then to
    the one that joined first. A choice among n engines takes O(log n).

    >>> router = Router()
    >>> router.add("a"); router.add("b")
    >>> router.choose("s1"), router.choose("s2"), router.choose("s1")
    ('a', 'b', 'a')
    """

    def __init__(self, max_imbalance: float = 1.5, slack: int = 8) -> None:
        self.max_imbalance = max_imbalance
        self.slack = slack
        self._load: dict[str, int] = {}
        self._chosen: dict[str, int] = {}
        self._home: dict[str, str] = {}
        self._joined: dict[str, int] = {}
        self._joins = 0
        self._total = 0
        self._idlest: list[tuple[int, int, int, str]] = []
        """A heap of (load, chosen, joined, engine); entries that are out of date are skipped."""
        self.moved = 0

    @property
    def members(self) -> Sequence[str]:
        return tuple(self._load)

    def load(self, engine: str) -> int:
        return self._load.get(engine, 0)

    def add(self, engine: str) -> None:
        """An engine joins; one that is known already keeps its load."""
        if engine in self._load:
            return
        self._chosen[engine] = min(self._chosen.values(), default=0)
        self._load[engine] = 0
        self._joined[engine] = self._joins
        self._joins += 1
        self._rank(engine)

    def remove(self, engine: str) -> None:
        """An engine is gone, and with it the KV of its sessions."""
        self._total -= self._load.pop(engine, 0)
        self._chosen.pop(engine, None)
        self._joined.pop(engine, None)
        self._home = {session: home for session, home in self._home.items() if home != engine}

    def choose(self, session: str) -> str | None:
        """The engine for the session's next request, counted as started; None when there is none."""
        if not self._load:
            return None
        home = self._home.get(session)
        if home is None or self._overloaded(home):
            chosen = self._least_loaded()
            if home is not None and chosen != home:
                self.moved += 1
            home = chosen
        self._home[session] = home
        self._load[home] += 1
        self._chosen[home] += 1
        self._total += 1
        self._rank(home)
        return home

    def finished(self, engine: str) -> None:
        """A request that was sent to ``engine`` has ended."""
        if engine in self._load:
            self._load[engine] -= 1
            self._total -= 1
            self._rank(engine)

    def home(self, session: str) -> str | None:
        return self._home.get(session)

    def release(self, session: str) -> str | None:
        """Forget a session; returns the engine that holds its KV."""
        return self._home.pop(session, None)

    def _overloaded(self, engine: str) -> bool:
        mean = self._total / len(self._load)
        return self._load[engine] > self.max_imbalance * mean + self.slack

    def _rank(self, engine: str) -> None:
        """Enter the engine's present load into the heap; now and then the heap is built anew without what is out of date."""
        heapq.heappush(self._idlest, (self._load[engine], self._chosen[engine], self._joined[engine], engine))
        if len(self._idlest) > 64 + 8 * len(self._load):
            self._idlest = [(load, self._chosen[name], self._joined[name], name) for name, load in self._load.items()]
            heapq.heapify(self._idlest)

    def _least_loaded(self) -> str:
        while True:
            load, chosen, joined, engine = self._idlest[0]
            if (self._load.get(engine), self._chosen.get(engine), self._joined.get(engine)) == (load, chosen, joined):
                return engine
            heapq.heappop(self._idlest)
