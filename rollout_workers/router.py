"""Which engine takes a request: where its session's KV is, else where its group's prompt is, else where there is least to do.

What counts as load is the *sessions* of an engine, those that wait for a tool included: they come back to the KV they
left. Requests in flight fluctuate within seconds, so they only break ties. (`millrace bench routing` compares the choices.)
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum


class Load(StrEnum):
    """What an engine is loaded with."""

    SESSIONS = "sessions"
    """Sessions that live there, generating or not."""
    REQUESTS = "requests"
    """Requests in flight."""
    TOKENS = "tokens"
    """Tokens of context of its sessions, as of their last request."""


@dataclass(frozen=True)
class RoutingPolicy:
    """The rules of a `Router`; `millrace bench routing` compares policies."""

    sticky: bool = True
    """A session stays where its KV is. Otherwise every request goes to the least loaded engine."""
    prefix_aware: bool = True
    """A new session goes where others of its prefix group are, while that engine is not above ``max_imbalance``."""
    load: Load = Load.SESSIONS
    max_imbalance: float = 1.1
    """A prefix attracts a new session only up to this many times the mean load."""
    leave_above: float = 1.5
    """A session leaves an engine with more than this many times the mean load, and ``slack`` sessions besides."""
    slack: int = 4

    def __post_init__(self) -> None:
        if self.max_imbalance < 1 or self.leave_above < 1 or self.slack < 0:
            raise ValueError(
                f"max_imbalance={self.max_imbalance}, leave_above={self.leave_above}, slack={self.slack}: must be at "
                "least 1, 1 and 0"
            )


@dataclass(slots=True)
class _Engine:
    joined: int
    chosen: int
    requests: int = 0
    sessions: int = 0
    tokens: int = 0
    others_sessions: int = 0
    others_requests: int = 0
    others_tokens: int = 0

    def load(self, measure: Load) -> int:
        if measure is Load.SESSIONS:
            return self.sessions + self.others_sessions
        if measure is Load.REQUESTS:
            return self.requests + self.others_requests
        return self.tokens + self.others_tokens


@dataclass(slots=True)
class _Session:
    engine: str
    tokens: int
    group: str


Rank = tuple[int, int, int, int, str]
"""Load, requests in flight, times chosen, place in order of joining, name."""


class Router:
    """A pure state machine: tell it of members, ends, releases and the load that others cause; ask it for a choice.

    Among equally loaded engines the one with the fewest requests in flight is chosen, then the one chosen least often so
    far, then the one that joined first. A choice among n engines takes O(log n), and O(m) when m of them hold sessions of
    its group.

    >>> router = Router()
    >>> router.add("a"); router.add("b")
    >>> router.choose("s1"), router.choose("s2"), router.choose("s1")
    ('a', 'b', 'a')
    """

    def __init__(self, policy: RoutingPolicy | None = None) -> None:
        self.policy = policy or RoutingPolicy()
        self._engines: dict[str, _Engine] = {}
        self._sessions: dict[str, _Session] = {}
        self._groups: dict[str, dict[str, int]] = {}
        """How many sessions of a prefix group each engine has."""
        self._joins = 0
        self._total = 0
        self._idlest: list[Rank] = []
        """A heap; entries that are out of date are skipped."""
        self.moved = 0
        """Times a session left an engine that was still there."""

    @property
    def members(self) -> Sequence[str]:
        return tuple(self._engines)

    @property
    def sessions(self) -> int:
        """Sessions that have an engine."""
        return len(self._sessions)

    def load(self, engine: str) -> int:
        """What counts as its load, by the policy; that of other clients included."""
        known = self._engines.get(engine)
        return known.load(self.policy.load) if known is not None else 0

    def requests(self, engine: str) -> int:
        """Requests of this router's in flight there."""
        known = self._engines.get(engine)
        return known.requests if known is not None else 0

    def sessions_on(self, engine: str) -> int:
        """Sessions of this router's there."""
        known = self._engines.get(engine)
        return known.sessions if known is not None else 0

    def add(self, engine: str) -> None:
        """An engine joins; one that is known already keeps its load."""
        if engine in self._engines:
            return
        chosen = min((known.chosen for known in self._engines.values()), default=0)
        self._engines[engine] = _Engine(self._joins, chosen)
        self._joins += 1
        self._rank(engine)

    def remove(self, engine: str) -> None:
        """An engine is gone, and with it the KV of its sessions."""
        known = self._engines.get(engine)
        if known is None:
            return
        for name in [name for name, session in self._sessions.items() if session.engine == engine]:
            self._forget(name)
        self._total -= known.load(self.policy.load)
        del self._engines[engine]

    def choose(self, session: str, tokens: int = 0, group: str = "", among: Sequence[str] | None = None) -> str | None:
        """The engine for the session's next request, counted as started; None when there is none.

        ``tokens``: length of the request's context. ``group``: its prefix group, if it has one. ``among``: the engines
        that can take it, if not all can. A session that was moved has left its KV on the former engine (`home` before the
        call), which may drop it.
        """
        if not self._engines or among == []:
            return None
        known = self._sessions.get(session)
        chosen = self._place(tokens, group) if known is None else self._stay_or_leave(known, tokens)
        if among is not None and chosen not in among:
            chosen = known.engine if known is not None and known.engine in among else min(among, key=self._rank_of)
        if known is not None and known.engine != chosen:
            self.moved += 1
            self._forget(session)
            known = None
        if known is None:
            self._settle(session, _Session(chosen, tokens, group))
        else:
            self._change(chosen, tokens=tokens - known.tokens)
            known.tokens = tokens
        self._engines[chosen].chosen += 1
        self._change(chosen, requests=1)
        return chosen

    def finished(self, engine: str) -> None:
        """A request that was sent to ``engine`` has ended; its session stays."""
        if engine in self._engines:
            self._change(engine, requests=-1)

    def home(self, session: str) -> str | None:
        """The engine that holds the session's KV."""
        known = self._sessions.get(session)
        return known.engine if known is not None else None

    def release(self, session: str) -> str | None:
        """The session is over; returns the engine that holds its KV."""
        home = self.home(session)
        if home is not None:
            self._forget(session)
        return home

    def report(self, engine: str, sessions: int, requests: int, tokens: int = 0) -> None:
        """How much of an engine's load is other clients', as of now. Unknown engines are ignored."""
        known = self._engines.get(engine)
        if known is None or (known.others_sessions, known.others_requests, known.others_tokens) == (
            sessions,
            requests,
            tokens,
        ):
            return
        before = known.load(self.policy.load)
        known.others_sessions, known.others_requests, known.others_tokens = sessions, requests, tokens
        self._total += known.load(self.policy.load) - before
        self._rank(engine)

    # Where a session goes

    def _place(self, tokens: int, group: str) -> str:
        """The engine for a new session."""
        least = self._least_loaded()
        if not (self.policy.prefix_aware and group in self._groups):
            return least
        weight = self._weight(tokens)
        mean = (self._total + weight) / len(self._engines)
        most = max((1.0 + self._excess()) * mean, self.load(least) + weight)
        holders = self._groups[group]
        fitting = [name for name in holders if self.load(name) + weight <= most and self._own_fits(name)]
        return max(fitting, key=lambda name: holders[name], default=least)

    def _excess(self) -> float:
        """How far over the mean a prefix may load an engine: half of what is allowed belongs to this worker's own sessions in
        proportion to their share, because what other workers do at the same time is known late."""
        if self.policy.load is not Load.SESSIONS or not self._total:
            return self.policy.max_imbalance - 1.0
        return (self.policy.max_imbalance - 1.0) * (1.0 + len(self._sessions) / self._total) / 2.0

    def _own_fits(self, name: str) -> bool:
        """Whether one more session keeps this router's own sessions within the bound, to the next whole one: if all workers
        filled up the same engine until they know that it is full, it would have far more than the bound allows."""
        if self.policy.load is not Load.SESSIONS:
            return True
        own_mean = (len(self._sessions) + 1) / len(self._engines)
        return self._engines[name].sessions + 1 <= math.ceil(self.policy.max_imbalance * own_mean)

    def _stay_or_leave(self, session: _Session, tokens: int) -> str:
        """The engine for the next request of a session that has one: its own, unless that has too much to do."""
        home, measure = session.engine, self.policy.load
        if not self.policy.sticky:
            return self._least_loaded()
        load, mean = self._engines[home].load(measure), self._total / len(self._engines)
        each = mean / max(1.0, self._mean_sessions()) if measure is Load.TOKENS else 1.0
        if load <= self.policy.leave_above * mean + self.policy.slack * each:
            return home
        least = self._least_loaded()
        return least if self.load(least) + self._weight(tokens) < load else home

    def _weight(self, tokens: int) -> int:
        """What one more session with a request adds to an engine's load."""
        return tokens if self.policy.load is Load.TOKENS else 1

    def _mean_sessions(self) -> float:
        return sum(e.sessions + e.others_sessions for e in self._engines.values()) / len(self._engines)

    # Books

    def _settle(self, name: str, session: _Session) -> None:
        self._sessions[name] = session
        self._change(session.engine, sessions=1, tokens=session.tokens)
        if session.group:
            holders = self._groups.setdefault(session.group, {})
            holders[session.engine] = holders.get(session.engine, 0) + 1

    def _forget(self, name: str) -> None:
        session = self._sessions.pop(name)
        self._change(session.engine, sessions=-1, tokens=-session.tokens)
        if session.group:
            holders = self._groups[session.group]
            holders[session.engine] -= 1
            if not holders[session.engine]:
                del holders[session.engine]
            if not holders:
                del self._groups[session.group]

    def _change(self, name: str, requests: int = 0, sessions: int = 0, tokens: int = 0) -> None:
        engine = self._engines[name]
        before = engine.load(self.policy.load)
        engine.requests += requests
        engine.sessions += sessions
        engine.tokens += tokens
        self._total += engine.load(self.policy.load) - before
        self._rank(name)

    def _rank_of(self, name: str) -> Rank:
        engine = self._engines[name]
        load, requests = engine.load(self.policy.load), engine.requests + engine.others_requests
        return load, requests, engine.chosen, engine.joined, name

    def _rank(self, name: str) -> None:
        """Enter the engine's present load into the heap; now and then the heap is built anew without what is out of date."""
        heapq.heappush(self._idlest, self._rank_of(name))
        if len(self._idlest) > 64 + 8 * len(self._engines):
            self._idlest = [self._rank_of(name) for name in self._engines]
            heapq.heapify(self._idlest)

    def _least_loaded(self) -> str:
        while True:
            entry = self._idlest[0]
            if entry[-1] in self._engines and self._rank_of(entry[-1]) == entry:
                return entry[-1]
            heapq.heappop(self._idlest)
