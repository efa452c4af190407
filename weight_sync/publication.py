"""Two-phase publication of a policy version, as a state machine.

```
 idle ─offer(v)─► announce ─► expire ─► stage ─────────────► commit ───────────► idle
                  (who is     (drop      (bytes move, every   (swap at a token    (v is
                   taking      what can   member; engines      boundary: one       current)
                   part)       no longer  keep stepping)       after the other
                               be used)                        when rolling)
```

At most one publication is in flight. A version offered meanwhile waits; a still newer one takes its place
(``superseded`` counts those). Members may die in any phase: the publication goes on with the rest, also with nobody
left, because the learner has moved on and whoever joins must load the newest version.

The caller asks :meth:`Publication.actions` what to do, does it, and reports back. Each action is handed out once.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

from weight_sync.errors import TransitionError


class Phase(StrEnum):
    IDLE = "idle"
    ANNOUNCE = "announce"
    EXPIRE = "expire"
    STAGE = "stage"
    COMMIT = "commit"


@dataclass(frozen=True)
class Action:
    """One thing to do now. ``members`` is empty for ``announce`` and ``expire``.

    ``announce``: fix who takes part, answer with ``announced(members)``. ``expire``: drop groups that the version makes
    too old, answer with ``expired()``. ``stage``: move the bytes to these members (one transfer), answer with
    ``staged(member)`` each, or ``transfer_failed()``. ``commit``: tell these members to swap, answer ``committed``.
    """

    kind: Phase
    version: int
    members: tuple[str, ...] = ()


class Publication:
    """Drives one publication after another. ``rolling``: members commit one at a time, in order."""

    def __init__(self, *, current_version: int = 0, rolling: bool = True, max_transfers: int = 3) -> None:
        self.phase = Phase.IDLE
        self.current = current_version
        """The newest version whose commit has begun: what a joining engine must load."""
        self.version: int | None = None
        """The version in flight."""
        self.waiting: int | None = None
        """The version that follows it."""
        self.superseded = 0
        self.completed = 0
        self._rolling = rolling
        self._max_transfers = max_transfers
        self._transfers = 0
        self._members: list[str] = []
        self._staged: set[str] = set()
        self._committed: set[str] = set()
        self._actions: list[Action] = []
        self._committing: set[str] = set()

    @property
    def members(self) -> tuple[str, ...]:
        """Who still takes part in the publication in flight."""
        return tuple(self._members)

    @property
    def awaited(self) -> tuple[str, ...]:
        """Members that have not staged yet, or (in the commit phase) not committed."""
        done = self._committed if self.phase is Phase.COMMIT else self._staged
        return tuple(member for member in self._members if member not in done)

    def offer(self, version: int) -> None:
        """The learner has a newer version. Raises TransitionError if it is not newer than all before."""
        newest = max(v for v in (self.current, self.version, self.waiting) if v is not None)
        if version <= newest:
            raise TransitionError(f"offer of version {version} refused: version {newest} was offered before")
        if self.phase is Phase.IDLE:
            self._begin(version)
            return
        self.superseded += self.waiting is not None
        self.waiting = version

    def actions(self) -> list[Action]:
        """What to do now; empty while answers are outstanding. Handing an action out removes it."""
        alive = [self._without_dead(action) for action in self._actions]
        self._actions = []
        return [action for action in alive if action.members or action.kind in (Phase.ANNOUNCE, Phase.EXPIRE)]

    def announced(self, members: Iterable[str]) -> None:
        """These members take part."""
        self._require(Phase.ANNOUNCE, "announced")
        self._members = list(dict.fromkeys(members))
        self._enter(Phase.EXPIRE)

    def expired(self) -> None:
        """Queue and engines have dropped what the version makes unusable."""
        self._require(Phase.EXPIRE, "expired")
        self.phase = Phase.STAGE
        self._transfer()

    def staged(self, member: str) -> None:
        """The member holds the whole version in its shadow copy. Ignored for one that has been declared dead."""
        self._require(Phase.STAGE, "staged")
        if member in self._members:
            self._staged.add(member)
        self._settle()

    def transfer_failed(self, reason: str) -> None:
        """The transfer broke: members that have not staged get another one, up to ``max_transfers`` in all.

        Raises TransitionError when that number is used up: the caller must declare the members that are left dead.
        """
        self._require(Phase.STAGE, f"transfer_failed ({reason})")
        if self._transfers >= self._max_transfers:
            left = [m for m in self._members if m not in self._staged]
            raise TransitionError(
                f"version {self.version} could not be moved to {left} in {self._transfers} transfers (last: {reason}): "
                "replace these engines"
            )
        self._transfer()

    def committed(self, member: str) -> None:
        """The member serves the version now. Ignored for one that has been declared dead."""
        self._require(Phase.COMMIT, "committed")
        if member not in self._members:
            return
        if member not in self._committing:
            raise TransitionError(f"engine {member} committed version {self.version} without being told to")
        self._committed.add(member)
        self._settle()

    def died(self, member: str) -> bool:
        """A member is gone; the publication goes on without it. False if it took no part."""
        if member not in self._members:
            return False
        self._members.remove(member)
        self._settle()
        return True

    def _without_dead(self, action: Action) -> Action:
        return Action(action.kind, action.version, tuple(m for m in action.members if m in self._members))

    def _begin(self, version: int) -> None:
        self.version, self._transfers = version, 0
        self._members, self._staged, self._committed, self._committing = [], set(), set(), set()
        self._enter(Phase.ANNOUNCE)

    def _enter(self, phase: Phase) -> None:
        self.phase = phase
        self._actions.append(Action(phase, self._in_flight()))

    def _transfer(self) -> None:
        self._transfers += 1
        missing = tuple(m for m in self._members if m not in self._staged)
        self._actions = [action for action in self._actions if action.kind is not Phase.STAGE]
        if missing:
            self._actions.append(Action(Phase.STAGE, self._in_flight(), missing))
        self._settle()

    def _settle(self) -> None:
        """Go on as far as nobody's answer is missing."""
        if self.phase is Phase.STAGE and self._staged.issuperset(self._members):
            self.phase = Phase.COMMIT
            self.current = self._in_flight()
            self._actions = []
        if self.phase is Phase.COMMIT:
            self._next_commits()

    def _next_commits(self) -> None:
        left = [m for m in self._members if m not in self._committed]
        if not left:
            self._finish()
            return
        fresh = tuple(m for m in (left[:1] if self._rolling else left) if m not in self._committing)
        if fresh:
            self._committing.update(fresh)
            self._actions.append(Action(Phase.COMMIT, self._in_flight(), fresh))

    def _finish(self) -> None:
        self.phase, self.version = Phase.IDLE, None
        self._members, self._actions = [], []
        self.completed += 1
        if self.waiting is not None:
            version, self.waiting = self.waiting, None
            self._begin(version)

    def _in_flight(self) -> int:
        if self.version is None:
            raise TransitionError("no publication is in flight")
        return self.version

    def _require(self, phase: Phase, event: str) -> None:
        if self.phase is not phase:
            raise TransitionError(
                f"{event} refused: the publication of version {self.version} is in phase {self.phase.value}"
            )
