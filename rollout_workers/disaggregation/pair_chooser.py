"""Which engines take a request where prefill and decode run apart: a pair of them, or the decode engine alone. Pure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from rollout_workers.engines.protocol import EngineRole
from rollout_workers.router import Router


@dataclass
class Ticket:
    """Where one request goes. Give it back with `PairChooser.finished`."""

    session: str
    prompt: int
    """Tokens of the prompt."""
    decode: str
    decode_joined: int
    """Which joining of that engine counts this request."""
    prefill: str | None = None
    """The engine that prefills; None: the decode engine does it."""
    queued: int = 0
    """Tokens counted as queued at the prefill engine."""


class PairChooser:
    """Chooses the decode engine as the router does (a session stays where its KV is), and then where the prompt is computed.

    The decode engine holds the session's KV from its turns so far, a prefill engine the prompts that it computed for it.
    What they lack must be computed, or handed over. In tokens computed, the delay that each choice causes is

        at the decode engine      lacks(decode) * (1 + requests that decode there meanwhile)
        at a prefill engine       tokens queued there + lacks(prefill)

    because a prefill holds up whatever decodes beside it. The smaller one is chosen (equal: the prefill engine), among
    prefill engines the one with the least; prompts with at most ``min_tokens`` new tokens always stay. So a first prompt goes
    to a prefill engine. A later turn's new tokens go to the one that prefilled the turn before: it computes the answer in
    between again (as prefill, much cheaper than it was decoded) and hands over only what the decode engine lacks. Where it
    has lost the session, it would have to compute the whole context again: then the decode engine does the new part.

    Engines take either role when the other has nobody: requests never wait for a role.

    >>> chooser = PairChooser(min_tokens=8)
    >>> chooser.add("p", EngineRole.PREFILL); chooser.add("d", EngineRole.DECODE)
    >>> first = chooser.choose("s", 100); first.prefill, first.decode
    ('p', 'd')
    >>> chooser.handed_over(first, complete=True); chooser.finished(first, 120)
    >>> chooser.choose("s", 125).prefill is None
    True
    """

    def __init__(self, min_tokens: int = 32, make_router: Callable[[], Router] = Router) -> None:
        self.min_tokens = min_tokens
        self._router = make_router()
        """Over the engines that decode."""
        self._roles: dict[str, EngineRole] = {}
        self._joined: dict[str, int] = {}
        self._joins = 0
        self._queued: dict[str, int] = {}
        self._chosen: dict[str, int] = {}
        self._held: dict[str, dict[str, int]] = {}
        """session -> engine -> tokens whose KV it should have."""

    @property
    def members(self) -> tuple[str, ...]:
        return tuple(self._roles)

    def role(self, engine: str) -> EngineRole | None:
        return self._roles.get(engine)

    def in_role(self, role: EngineRole) -> list[str]:
        return [engine for engine, has in self._roles.items() if has is role]

    def load(self, engine: str) -> int:
        """Requests chosen to decode on an engine and not finished."""
        return self._router.requests(engine)

    def queued(self, engine: str) -> int:
        """Tokens on their way through a prefill engine."""
        return self._queued.get(engine, 0)

    def add(self, engine: str, role: EngineRole) -> None:
        """An engine joins; one that is known already keeps its load and only changes its role."""
        if engine in self._roles:
            self.set_role(engine, role)
            return
        self._roles[engine] = role
        self._queued[engine] = 0
        self._chosen[engine] = min(self._chosen.values(), default=0)
        self._seat()

    def remove(self, engine: str) -> None:
        """An engine is gone, and with it all KV that it held."""
        self._roles.pop(engine, None)
        self._queued.pop(engine, None)
        self._chosen.pop(engine, None)
        for held in self._held.values():
            held.pop(engine, None)
        self._seat()

    def set_role(self, engine: str, role: EngineRole) -> None:
        """From now on requests go to ``engine`` as its new role says; what it holds, it holds still."""
        if engine in self._roles and self._roles[engine] is not role:
            self._roles[engine] = role
            self._seat()

    def dropped_kv(self, engine: str) -> None:
        """``engine`` has dropped the KV of the sessions between two turns (it took new weights, say)."""
        for held in self._held.values():
            held.pop(engine, None)

    def choose(self, session: str, prompt: int, *, alone: bool = False) -> Ticket | None:
        """Where a request with a prompt of so many tokens goes, counted as started; None when there is no engine.

        ``alone``: the decode engine shall prefill, too.
        """
        decode = self._router.choose(session)
        if decode is None:
            return None
        ticket = Ticket(session, prompt, decode, self._joined[decode])
        held = self._held.setdefault(session, {})
        lacks = prompt - held.get(decode, 0)
        prefills = [] if alone or lacks <= self.min_tokens else self.in_role(EngineRole.PREFILL)
        prefills = [engine for engine in prefills if engine != decode]
        if not prefills:
            return ticket
        costs = {engine: self._queued[engine] + prompt - held.get(engine, 0) for engine in prefills}
        prefill = min(prefills, key=lambda engine: (costs[engine], self._chosen[engine]))
        if costs[prefill] > lacks * self._router.requests(decode):
            return ticket
        ticket.prefill, ticket.queued = prefill, prompt - held.get(prefill, 0)
        self._queued[prefill] += ticket.queued
        self._chosen[prefill] += 1
        return ticket

    def handed_over(self, ticket: Ticket, *, complete: bool) -> None:
        """The prefill engine is done with a request, with or without (``complete``) its KV having arrived."""
        engine = ticket.prefill
        if engine is None:
            return
        self._leave_prefill(ticket)
        if engine in self._roles:
            self._held.setdefault(ticket.session, {})[engine] = ticket.prompt
        if complete and ticket.decode in self._roles:
            self._held.setdefault(ticket.session, {})[ticket.decode] = ticket.prompt

    def finished(self, ticket: Ticket, tokens: int | None = None) -> None:
        """A request is over; its decode engine holds ``tokens`` of the session now (None: nobody knows)."""
        self._leave_prefill(ticket)
        if self._joined.get(ticket.decode) == ticket.decode_joined:
            self._router.finished(ticket.decode)
        if tokens is not None and ticket.decode in self._roles:
            self._held.setdefault(ticket.session, {})[ticket.decode] = tokens

    def release(self, session: str) -> list[str]:
        """Forget a session; returns the engines that may hold KV of it."""
        home = self._router.release(session)
        engines = self._held.pop(session, {})
        if home is not None:
            engines.setdefault(home, 0)
        return [engine for engine in engines if engine in self._roles]

    def _leave_prefill(self, ticket: Ticket) -> None:
        if ticket.prefill in self._queued:
            self._queued[ticket.prefill] -= ticket.queued
        ticket.prefill, ticket.queued = None, 0

    def _seat(self) -> None:
        """Have the router choose among the engines that decode: those of that role, or all when there are none."""
        decoding = [engine for engine, role in self._roles.items() if role is not EngineRole.PREFILL]
        wanted = decoding or list(self._roles)
        for engine in [engine for engine in self._joined if engine not in wanted]:
            del self._joined[engine]
            self._router.remove(engine)
        for engine in wanted:
            if engine not in self._joined:
                self._joins += 1
                self._joined[engine] = self._joins
                self._router.add(engine)
