"""Which engine takes a request: session affinity first, then load, with a bound on imbalance."""

from __future__ import annotations

from collections.abc import Sequence


class Router:
    """Sticky least-loaded routing. A pure state machine: tell it of members, starts and ends; ask it for a choice.

    A session stays with its engine (whose KV it can reuse) unless that engine is gone or has more than
    ``max_imbalance`` times the mean load plus ``slack`` requests. Ties go to the engine chosen least often so far.

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
        self.moved = 0

    @property
    def members(self) -> Sequence[str]:
        return tuple(self._load)

    def load(self, engine: str) -> int:
        return self._load.get(engine, 0)

    def add(self, engine: str) -> None:
        """An engine joins; one that is known already keeps its load."""
        self._load.setdefault(engine, 0)
        self._chosen.setdefault(engine, min(self._chosen.values(), default=0))

    def remove(self, engine: str) -> None:
        """An engine is gone, and with it the KV of its sessions."""
        self._load.pop(engine, None)
        self._chosen.pop(engine, None)
        self._home = {session: home for session, home in self._home.items() if home != engine}

    def choose(self, session: str) -> str | None:
        """The engine for the session's next request, counted as started; None when there is none."""
        if not self._load:
            return None
        home = self._home.get(session)
        if home is None or self._overloaded(home):
            chosen = min(self._load, key=lambda engine: (self._load[engine], self._chosen[engine]))
            if home is not None and chosen != home:
                self.moved += 1
            home = chosen
        self._home[session] = home
        self._load[home] += 1
        self._chosen[home] += 1
        return home

    def finished(self, engine: str) -> None:
        """A request that was sent to ``engine`` has ended."""
        if engine in self._load:
            self._load[engine] -= 1

    def home(self, session: str) -> str | None:
        return self._home.get(session)

    def release(self, session: str) -> str | None:
        """Forget a session; returns the engine that holds its KV."""
        return self._home.pop(session, None)

    def _overloaded(self, engine: str) -> bool:
        mean = sum(self._load.values()) / len(self._load)
        return self._load[engine] > self.max_imbalance * mean + self.slack
