"""Which engines exist, which weights they hold and which may serve traffic.

```
            begin_load(v)          loaded(v)           drain
 starting ───────────────► loading ─────────► serving ───────► draining ───► dead
    └───────────── drain / died, from every state ─────────────────┘          ▲
```

A serving member that switches to a newer version stays ``serving`` (``switched``); a member that joins must load the
*current* version: if a newer one was published while it was loading, it loads again. So a rebuilt engine never serves
old weights. A member that drains still samples for the requests it has, so it takes part in updates until it is gone.
A dead member's name may join again, as a new member without weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from weight_sync.errors import TransitionError


class MemberState(StrEnum):
    STARTING = "starting"
    LOADING = "loading"
    SERVING = "serving"
    DRAINING = "draining"
    DEAD = "dead"


@dataclass(frozen=True)
class Member:
    """One engine. ``version`` is what it holds (``serving``, ``draining``) or is loading; None before that."""

    name: str
    state: MemberState = MemberState.STARTING
    version: int | None = None
    incarnation: int = 0
    """How many times an engine of this name has joined before."""


class Membership:
    """The state machine of all engines of a run; decides nothing by time and calls nobody."""

    def __init__(self, current_version: int = 0) -> None:
        self._members: dict[str, Member] = {}
        self._current = current_version

    @property
    def current_version(self) -> int:
        """The newest committed version: what a joining member must load."""
        return self._current

    def join(self, name: str) -> Member:
        """A new engine process, without weights. Refused while a member of that name is alive."""
        known = self._members.get(name)
        if known is not None and known.state is not MemberState.DEAD:
            raise self._refused(known, "join")
        member = Member(name, incarnation=known.incarnation + 1 if known else 0)
        return self._put(member)

    def begin_load(self, name: str) -> int:
        """The member starts to load; returns the version that it must load, which is the current one."""
        self._expect(name, "begin_load", MemberState.STARTING, MemberState.LOADING)
        self._change(name, MemberState.LOADING, self._current)
        return self._current

    def loaded(self, name: str, version: int) -> bool:
        """The member holds ``version``. True: it serves from now on. False: too old by now, ``begin_load`` again."""
        member = self._expect(name, "loaded", MemberState.LOADING)
        if version != member.version:
            raise TransitionError(f"engine {name} reports version {version} but was told to load {member.version}")
        if version < self._current:
            return False
        self._change(name, MemberState.SERVING, version)
        return True

    def advance(self, version: int) -> None:
        """A newer version is about to be committed: whoever loads or joins from now on must hold it."""
        if version < self._current:
            raise TransitionError(f"current version cannot go back from {self._current} to {version}")
        self._current = version

    def switched(self, name: str, version: int) -> None:
        """A serving (or draining) member committed ``version``."""
        member = self._expect(name, "switched", MemberState.SERVING, MemberState.DRAINING)
        if member.version is None:
            raise self._refused(member, "switched")
        if member.version is not None and version < member.version:
            raise TransitionError(f"engine {name} cannot go back from version {member.version} to {version}")
        self._change(name, member.state, version)

    def drain(self, name: str) -> None:
        """No new requests for this member; those in flight end first."""
        member = self._expect(name, "drain", MemberState.STARTING, MemberState.LOADING, MemberState.SERVING)
        held = member.version if member.state is MemberState.SERVING else None  # what it was loading, it does not hold
        self._change(name, MemberState.DRAINING, held)

    def died(self, name: str) -> bool:
        """The member is gone. False if that was known already."""
        member = self._known(name, "died")
        if member.state is MemberState.DEAD:
            return False
        self._change(name, MemberState.DEAD, None)
        return True

    def get(self, name: str) -> Member:
        return self._known(name, "get")

    def serving(self) -> list[str]:
        """Members that may take traffic, in the order of their first joining."""
        return [member.name for member in self._members.values() if member.state is MemberState.SERVING]

    def sampling(self) -> list[str]:
        """Members that hold weights and may still sample tokens, draining ones too: whom an update must reach."""
        states = (MemberState.SERVING, MemberState.DRAINING)
        return [m.name for m in self._members.values() if m.state in states and m.version is not None]

    def knows(self, name: str) -> bool:
        """Whether a member of that name was ever there."""
        return name in self._members

    def alive(self) -> list[str]:
        return [member.name for member in self._members.values() if member.state is not MemberState.DEAD]

    def in_state(self, state: MemberState) -> list[str]:
        return [member.name for member in self._members.values() if member.state is state]

    def oldest_served(self) -> int | None:
        """The oldest version that still samples tokens (draining members do, too); None when nobody serves."""
        versions = [self._members[name].version for name in self.sampling()]
        return min((version for version in versions if version is not None), default=None)

    def _known(self, name: str, event: str) -> Member:
        if name not in self._members:
            raise TransitionError(f"{event}: no engine is called {name!r}; known: {sorted(self._members)}")
        return self._members[name]

    def _expect(self, name: str, event: str, *states: MemberState) -> Member:
        member = self._known(name, event)
        if member.state not in states:
            raise self._refused(member, event)
        return member

    def _change(self, name: str, state: MemberState, version: int | None) -> None:
        self._put(Member(name, state, version, self._members[name].incarnation))

    def _put(self, member: Member) -> Member:
        self._members[member.name] = member
        return member

    @staticmethod
    def _refused(member: Member, event: str) -> TransitionError:
        return TransitionError(
            f"engine {member.name} is {member.state.value} (version {member.version}): {event} refused"
        )
