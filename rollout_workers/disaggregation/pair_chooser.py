"""Which engines take a request where prefill and decode run apart: a pair of them, or the decode engine alone. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rollout_workers.engines.protocol import EngineRole
from rollout_workers.router import Router, RoutingPolicy


@dataclass
class Ticket:
    """Where one request goes."""

    prompt: int
    """Tokens of the prompt."""
    decode: str
    decode_joined: int
    """Which joining of that engine counts this request."""
    prefill: str | None = None
    """The engine that prefills; None: the decode engine does it, or it is done."""
    queued: int = 0
    """Tokens counted as queued at the prefill engine."""


class PairChooser(Router):
    """A router over the decode engines that also says where a prompt is computed.

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
    >>> chooser.choose("s", 100), chooser.decode_of("s")
    ('p', 'd')
    >>> chooser.handed_over("s", complete=True); chooser.ended("s", 120)
    >>> chooser.choose("s", 125)
    'd'
    """

    def __init__(self, min_tokens: int = 32, policy: RoutingPolicy | None = None) -> None:
        super().__init__(policy)
        self.min_tokens = min_tokens
        self._roles: dict[str, EngineRole] = {}
        self._seats: dict[str, int] = {}
        """Engines among which requests to decode are divided, by when they were last seated."""
        self._seated = 0
        self._queued: dict[str, int] = {}
        self._prefills: dict[str, int] = {}
        """Prompts sent to an engine so far."""
        self._held: dict[str, dict[str, int]] = {}
        """session -> engine -> tokens whose KV it should have."""
        self._tickets: dict[str, Ticket] = {}
        """By session: a session has one request at a time."""
        self._alone: set[str] = set()
        """Sessions whose present request the decode engine shall prefill."""

    @property
    def members(self) -> Sequence[str]:
        return tuple(self._roles)

    def role(self, engine: str) -> EngineRole | None:
        return self._roles.get(engine)

    def in_role(self, role: EngineRole) -> list[str]:
        return [engine for engine, has in self._roles.items() if has is role]

    @property
    def decoders(self) -> Sequence[str]:
        """Engines among which requests to decode are divided."""
        return tuple(self._seats)

    def queued(self, engine: str) -> int:
        """Tokens on their way through a prefill engine."""
        return self._queued.get(engine, 0)

    def decode_of(self, session: str) -> str | None:
        """The engine that decodes the session's present request."""
        ticket = self._tickets.get(session)
        return ticket.decode if ticket is not None else None

    def add(self, engine: str, role: EngineRole | None = None) -> None:
        """An engine joins (without a role it does both); one that is known already keeps its load and, without one, its role."""
        if engine in self._roles:
            if role is not None:
                self.set_role(engine, role)
            return
        self._roles[engine] = role or EngineRole.MIXED
        self._queued[engine] = 0
        self._prefills[engine] = min(self._prefills.values(), default=0)
        self._seat()

    def remove(self, engine: str) -> None:
        """An engine is gone, and with it all KV that it held."""
        self._roles.pop(engine, None)
        self._queued.pop(engine, None)
        self._prefills.pop(engine, None)
        for held in self._held.values():
            held.pop(engine, None)
        for ticket in self._tickets.values():
            if ticket.prefill == engine:  # an engine that joins again under the name does not owe these
                ticket.prefill, ticket.queued = None, 0
        self._seat()

    def set_role(self, engine: str, role: EngineRole) -> None:
        """From now on requests go to ``engine`` as its new role says; what it holds, it holds still."""
        if engine in self._roles and self._roles[engine] is not role:
            self._roles[engine] = role
            self._seat()

    def choose(self, session: str, tokens: int = 0, group: str = "", among: Sequence[str] | None = None) -> str | None:
        """The engine that a request with a prompt of ``tokens`` goes to first, counted as started; None when there is none.

        If it is not `decode_of` the session, it prefills and hands over to that one. An earlier request of the session
        counts as over. Of ``among`` (None: all) at least one should decode.
        """
        self._close(session)
        decoders = None if among is None else [engine for engine in among if engine in self._seats]
        decode = super().choose(session, tokens, group, decoders)
        if decode is None:
            return None
        ticket = self._tickets[session] = Ticket(tokens, decode, self._seats[decode])
        held = self._held.setdefault(session, {})
        lacks = tokens - held.get(decode, 0)
        if lacks <= self.min_tokens or session in self._alone:
            return decode
        lacking = {
            engine: max(0, tokens - held.get(engine, 0))  # a prompt may be shorter than what is held
            for engine in self.in_role(EngineRole.PREFILL)
            if engine != decode and (among is None or engine in among)
        }
        if not lacking:
            return decode
        prefill = min(lacking, key=lambda engine: (self._queued[engine] + lacking[engine], self._prefills[engine]))
        if self._queued[prefill] + lacking[prefill] > lacks * self.requests(decode):
            return decode
        ticket.prefill, ticket.queued = prefill, lacking[prefill]
        held.setdefault(prefill, 0)  # it will have something of the session, however the request ends
        self._queued[prefill] += ticket.queued
        self._prefills[prefill] += 1
        return prefill

    def handed_over(self, session: str, *, complete: bool) -> None:
        """The prefill engine is done with the session's request, with or without (``complete``) its KV being across."""
        ticket = self._tickets.get(session)
        if ticket is None or ticket.prefill is None:
            return
        held = self._held.setdefault(session, {})
        if ticket.prefill in self._roles:
            held[ticket.prefill] = ticket.prompt
        if complete and ticket.decode in self._roles:
            held[ticket.decode] = ticket.prompt
        self._leave_prefill(ticket)

    def stay_alone(self, session: str) -> None:
        """The session's present request shall not be handed over (again)."""
        self._alone.add(session)

    def finished(self, engine: str) -> None:
        """Which request it was is not said here: `ended` counts."""

    def ended(self, session: str, tokens: int | None = None) -> None:
        """The session's request is over; its decode engine holds ``tokens`` of it now (None: nobody knows)."""
        ticket = self._tickets.get(session)
        self._close(session)
        self._alone.discard(session)
        if (
            ticket is not None
            and tokens is not None
            and ticket.decode in self._roles
            and self.home(session) is not None
        ):
            self._held.setdefault(session, {})[ticket.decode] = tokens

    def forget_held(self, session: str, engine: str) -> None:
        """The engine was told to drop what it holds of the session."""
        self._held.get(session, {}).pop(engine, None)

    def dropped_kv(self, engine: str) -> None:
        """The engine has dropped the KV of all sessions between two turns (it took new weights, say)."""
        for held in self._held.values():
            held.pop(engine, None)

    def release_all(self, session: str) -> list[str]:
        """The session is over; returns the engines that may hold KV of it."""
        self._close(session)
        self._alone.discard(session)
        home = self.release(session)
        engines = self._held.pop(session, {})
        if home is not None:
            engines.setdefault(home, 0)
        return [engine for engine in engines if engine in self._roles]

    def _close(self, session: str) -> None:
        """The session's request does not count any more."""
        ticket = self._tickets.pop(session, None)
        if ticket is None:
            return
        self._leave_prefill(ticket)
        if self._seats.get(ticket.decode) == ticket.decode_joined:
            super().finished(ticket.decode)

    def _leave_prefill(self, ticket: Ticket) -> None:
        if ticket.prefill in self._queued:
            self._queued[ticket.prefill] -= ticket.queued
        ticket.prefill, ticket.queued = None, 0

    def _seat(self) -> None:
        """Choose among the engines of the role to decode, or among all when there are none."""
        decoding = [engine for engine, role in self._roles.items() if role is not EngineRole.PREFILL]
        wanted = decoding or list(self._roles)
        for engine in [engine for engine in self._seats if engine not in wanted]:
            del self._seats[engine]
            super().remove(engine)
        for engine in wanted:
            if engine not in self._seats:
                self._seated += 1
                self._seats[engine] = self._seated
                super().add(engine)
