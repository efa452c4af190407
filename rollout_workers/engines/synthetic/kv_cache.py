"""Whose KV an accelerator holds: reservations of running requests, and idle sessions until their room is needed."""

from __future__ import annotations

from collections import OrderedDict


class KvCache:
    """Tokens of KV by session. A running request reserves its whole sequence; idle sessions leave, least recent first.

    >>> kv = KvCache(100)
    >>> kv.take("a", 30, 20), kv.take("b", 60, 10)
    (0, None)
    >>> kv.put_back("a", 50); kv.take("b", 60, 10), kv.evicted_tokens
    (0, 50)

    Sessions of a prefix group begin alike: as far as the shortest first prompt among those that are here, one that comes new
    finds its prompt computed.

    >>> kv = KvCache(1000)
    >>> kv.take("a", 30, 20, "g"), kv.take("b", 30, 20, "g"), kv.take("c", 30, 20, "h")
    (0, 30, 0)
    """

    def __init__(self, capacity: float) -> None:
        self.capacity = capacity
        self._idle: OrderedDict[str, int] = OrderedDict()
        self._idle_tokens = 0
        self._reserved: dict[str, int] = {}
        self._reserved_tokens = 0
        self._released: set[str] = set()
        self._group_of: dict[str, str] = {}
        self._members: dict[str, set[str]] = {}
        """The sessions of each prefix group that have KV here."""
        self._prefix: dict[str, int] = {}
        """How many tokens the sessions of a group have in common."""
        self.evicted_tokens = 0
        self.evicted_sessions = 0

    @property
    def used(self) -> int:
        """Tokens held, running and idle."""
        return self._reserved_tokens + self._idle_tokens

    @property
    def reserved_tokens(self) -> int:
        """Tokens that running requests hold or will need."""
        return self._reserved_tokens

    @property
    def idle_tokens(self) -> int:
        """Tokens of sessions between two requests."""
        return self._idle_tokens

    def held(self, session: str) -> int:
        """Tokens of an idle session that are here; 0 of any other."""
        return self._idle.get(session, 0)

    @property
    def sessions(self) -> int:
        """Sessions with KV here, running and idle."""
        return len(self._idle) + len(self._reserved)

    def take(self, session: str, prompt: int, output: int, group: str = "") -> int | None:
        """Reserve room for a request, evicting idle sessions. Returns the prompt tokens cached, of the session or of its
        prefix ``group``; None: no room yet.

        A session that runs already gets no second reservation: None until the first has ended.
        """
        needed = prompt + output
        if session in self._reserved or self._reserved_tokens + needed > self.capacity:
            return None
        shared = self._shared(session, prompt, group)
        held = self._remove(session)
        while self.used + needed > self.capacity:
            oldest = next(iter(self._idle))
            self.evicted_tokens += self._forget(oldest)
            self.evicted_sessions += 1
        self._reserved[session] = needed
        self._reserved_tokens += needed
        return min(max(held, shared), prompt)

    def put_back(self, session: str, tokens: int) -> None:
        """The session's request has ended: ``tokens`` of KV stay, idle, unless the session was released meanwhile."""
        self._reserved_tokens -= self._reserved.pop(session)
        if session in self._released:
            self._released.remove(session)
            self._leave_group(session)
            return
        self._idle[session] = tokens
        self._idle_tokens += tokens

    def release(self, session: str) -> None:
        """The session will not come back."""
        if session in self._reserved:
            self._released.add(session)
        else:
            self._forget(session)

    def forget_idle(self) -> None:
        """Idle sessions lose their KV: it belongs to other weights."""
        for session in list(self._idle):
            self._forget(session)

    def forget_prefixes(self) -> None:
        """What sessions have in common belongs to other weights: nobody new begins with it."""
        self._prefix.clear()

    def _shared(self, session: str, prompt: int, group: str) -> int:
        """The tokens that others of the group have of a session's prompt; enters the session into the group."""
        if not group or session in self._group_of:
            return 0
        shared = self._prefix.get(group, 0)
        self._prefix[group] = min(shared, prompt) if shared else prompt
        self._group_of[session] = group
        self._members.setdefault(group, set()).add(session)
        return shared

    def _leave_group(self, session: str) -> None:
        group = self._group_of.pop(session, None)
        if group is not None:
            members = self._members[group]
            members.discard(session)
            if not members:
                del self._members[group]
                self._prefix.pop(group, None)

    def _forget(self, session: str) -> int:
        """The session's KV is gone; returns how many tokens that were."""
        self._leave_group(session)
        return self._remove(session)

    def _remove(self, session: str) -> int:
        """The session is not idle any more; returns its tokens."""
        tokens = self._idle.pop(session, 0)
        self._idle_tokens -= tokens
        return tokens
