"""The staleness contract: pacing, the per-token guard, and what happens to what became too old.

Three separate knobs. *Pacing* (``target_lag``) decides how far dispatching runs ahead, hence where the lag settles. The
*guard* (``max_lag``, ``loss_mask``) decides which tokens may carry loss; the learner applies it whatever the policy. A
*policy* decides what happens to groups that hold, or will hold, tokens that are too old.

A learner at version ``v`` runs step ``v``: it consumes ``groups_per_update`` groups and publishes version ``v + 1``.
The lag of a token at consumption is ``v`` minus the version that sampled it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

from experience.config import OnViolation, StalenessConfig
from experience.records import NOT_SAMPLED, Trajectory

STALE = "stale"
"""Reason of a drop: too old to carry loss."""
EMPTY = "empty"
"""Reason of a drop: no episode of the group holds a sampled token."""


def loss_mask(trajectory: Trajectory, version: int, max_lag: int) -> npt.NDArray[np.bool_]:
    """Which tokens may carry loss at learner ``version``: bool [T], trainable and at most ``max_lag`` versions old."""
    versions = trajectory.versions
    mask: npt.NDArray[np.bool_] = trajectory.trainable & (versions > NOT_SAMPLED) & (version - versions <= max_lag)
    return mask


@dataclass(frozen=True)
class Pacing:
    """How many groups may be started: ``dispatched - returned < (version + 1 + target_lag) * groups_per_update``.

    ``dispatched`` counts every group ever started, ``returned`` those that were dropped; ``version`` is the oldest
    version that the engines serve.

    >>> Pacing(groups_per_update=16, target_lag=1.0).room(dispatched=30, returned=0, version=0)
    2
    """

    groups_per_update: int
    target_lag: float

    def limit(self, version: int) -> int:
        """The most groups, not counting returned ones, that may have been started while engines serve ``version``."""
        return math.ceil((version + 1 + self.target_lag) * self.groups_per_update)

    def room(self, dispatched: int, returned: int, version: int) -> int:
        """How many groups may be started now."""
        return max(0, self.limit(version) - (dispatched - returned))

    def may_dispatch(self, dispatched: int, returned: int, version: int) -> bool:
        """Whether one more group may be started now."""
        return self.room(dispatched, returned, version) > 0


class GroupAge(Protocol):
    """What a policy knows of a group that is in flight or finished."""

    @property
    def group_id(self) -> str: ...
    @property
    def index(self) -> int: ...
    @property
    def version_floor(self) -> int:
        """No token of the group is older."""
        ...

    @property
    def oldest(self) -> int | None:
        """Oldest version of the sampled tokens known so far; None when none is known."""
        ...

    @property
    def newest(self) -> int | None:
        """Newest version of the sampled tokens known so far; None when none is known."""
        ...

    @property
    def finished(self) -> bool:
        """No further episode will arrive: ``oldest`` and ``newest`` are final."""
        ...


@dataclass(frozen=True)
class Progress:
    """Where dispatching stands: groups ever dispatched, groups returned, the oldest version that engines serve."""

    dispatched: int
    returned: int
    version: int


@dataclass(frozen=True)
class QueueView:
    """What a policy sees of the queue at learner ``version``."""

    version: int
    live: Sequence[GroupAge]
    """Groups in flight or finished, not delivered, in dispatch order."""
    taken: int = 0
    """Groups already delivered for step ``version``."""
    limit: int = 0
    """How many groups the consumer asks for."""


@dataclass
class Selection:
    """What to deliver, in order, and what to drop with its reason."""

    take: list[GroupAge] = field(default_factory=list)
    drop: list[tuple[GroupAge, str]] = field(default_factory=list)


class StalenessPolicy(Protocol):
    """Decides what starts, what is delivered and what is given up. Write another by implementing these three."""

    def admit(self, now: Progress) -> int:
        """How many groups may be started."""
        ...

    def select(self, ready: Sequence[GroupAge], queue: QueueView) -> Selection:
        """At most ``queue.limit`` of the ``ready`` groups (in order of preference), and those to drop."""
        ...

    def expire(self, queue: QueueView) -> list[tuple[GroupAge, str]]:
        """Groups, in flight ones included, that are certain to be useless from learner ``queue.version`` on."""
        ...


@dataclass(frozen=True)
class _Guarded:
    """What the three policies share: pacing, and a verdict on a finished group."""

    pacing: Pacing
    max_lag: int

    def admit(self, now: Progress) -> int:
        """How many groups may be started, by the pacing formula."""
        return self.pacing.room(now.dispatched, now.returned, now.version)

    def verdict(self, group: GroupAge, version: int) -> str | None:
        """Reason to drop a finished group at learner ``version``, or None."""
        if group.newest is None:
            return EMPTY
        return STALE if version - group.newest > self.max_lag else None

    def select(self, ready: Sequence[GroupAge], queue: QueueView) -> Selection:
        """Ready groups in the order given, those with a reason against them dropped."""
        selection = Selection()
        for group in ready:
            if len(selection.take) >= queue.limit:
                break
            reason = self.verdict(group, queue.version)
            if reason is None:
                selection.take.append(group)
            else:
                selection.drop.append((group, reason))
        return selection

    def expire(self, queue: QueueView) -> list[tuple[GroupAge, str]]:
        """Finished groups with a reason against them."""
        judged = ((group, self.verdict(group, queue.version)) for group in queue.live if group.finished)
        return [(group, reason) for group, reason in judged if reason is not None]


@dataclass(frozen=True)
class MaskTokens(_Guarded):
    """A finished group is taken as it is; tokens that are too old carry no loss.

    Bound: no token with lag over ``max_lag`` carries loss (the learner's ``loss_mask``). A group none of whose tokens
    may carry loss is dropped as ``stale``. Nothing in flight ever expires, because its next token is young.
    """


@dataclass(frozen=True)
class DropGroup(_Guarded):
    """A group with any sampled token that is too old is dropped.

    Bound: no delivered group holds a token with lag over ``max_lag``. Groups in flight are dropped once a token of
    theirs is known to be too old; the version floor alone proves nothing, since the first token may be younger.
    """

    def verdict(self, group: GroupAge, version: int) -> str | None:
        """Reason to drop a group at learner ``version``, or None."""
        if group.oldest is None:
            return EMPTY if group.finished else None
        return STALE if version - group.oldest > self.max_lag else None

    def expire(self, queue: QueueView) -> list[tuple[GroupAge, str]]:
        """Groups, in flight or finished, known to hold a token that is too old."""
        judged = ((group, self.verdict(group, queue.version)) for group in queue.live)
        return [(group, reason) for group, reason in judged if reason is not None]


@dataclass(frozen=True)
class Wait(_Guarded):
    """No step goes ahead that would make a live group too old; the learner waits for that group instead.

    Write G for ``groups_per_update``, M for ``max_lag``. A live group has a *deadline*, the last learner version at
    which all its tokens are at most M old: its oldest sampled version (in flight: its version floor) + M. At version v
    with r deliveries left in the step, C(d) = r + (d - v) G groups can be delivered up to version d. A group is taken
    only if afterwards N(d) <= C(d) for every d, where N(d) counts live groups with deadline <= d. Taking one with
    deadline e lowers C everywhere and N from e on, so it is allowed exactly when no d < e has N(d) = C(d).

    Bound: no delivered group holds a token with lag over M, if ``target_lag`` <= M. Proof, by keeping N(d) <= C(d):
    when a group is started at engine version f, pacing gives started - returned <= ceil((f + 1 + target_lag) G) <= (f +
    M + 1) G, and of these v G + (G - r) were delivered, so the live ones are at most r + (f + M - v) G = C(e) with e =
    f + M its deadline; hence N(d) <= C(d) for d >= e, and no other d is touched. Finishing only moves deadlines later,
    a drop lowers N, and selection keeps the condition by construction. With N(v) <= r, every group due now is delivered
    in this step.

    Progress: whenever nothing may be taken, some d has N(d) >= C(d) >= 1; the groups counted are in flight, and the
    first of them to finish may be taken. A deadline that has passed all the same (settings changed, or an engine served
    an older version than announced) counts as due now, and the token mask keeps the strict bound: nothing wedges.
    """

    def deadline(self, group: GroupAge, version: int) -> int:
        """The last learner version at which no token of the group is too old, but not before ``version``."""
        oldest = group.oldest if group.finished and group.oldest is not None else group.version_floor
        return max(version, oldest + self.max_lag)

    def select(self, ready: Sequence[GroupAge], queue: QueueView) -> Selection:
        """Ready groups in the order given, as far as every other live group stays in time."""
        selection = super().select(ready, QueueView(queue.version, queue.live, queue.taken, limit=len(ready)))
        dropped = {group.group_id for group, _ in selection.drop}
        deadlines = {g.group_id: self.deadline(g, queue.version) for g in queue.live if g.group_id not in dropped}
        due = Counter(deadlines.values())
        capacity = max(0, self.pacing.groups_per_update - queue.taken)
        candidates, selection.take = selection.take, []
        while len(selection.take) < min(queue.limit, capacity):
            horizon = self._horizon(due, queue.version, capacity - len(selection.take))
            chosen = next((g for g in candidates if deadlines[g.group_id] <= horizon), None)
            if chosen is None:
                break
            candidates.remove(chosen)
            due[deadlines[chosen.group_id]] -= 1
            selection.take.append(chosen)
        return selection

    def _horizon(self, due: Counter[int], version: int, remaining: int) -> float:
        """The smallest d at which live groups fill all deliveries left up to d; infinite when there is none."""
        count = 0
        for deadline in sorted(due):
            count += due[deadline]
            if count >= remaining + (deadline - version) * self.pacing.groups_per_update:
                return deadline
        return math.inf


def make_policy(config: StalenessConfig, groups_per_update: int) -> MaskTokens | DropGroup | Wait:
    """The policy that a configuration asks for."""
    pacing = Pacing(groups_per_update, config.target_lag)
    kinds: dict[OnViolation, type[MaskTokens] | type[DropGroup] | type[Wait]] = {
        OnViolation.mask_tokens: MaskTokens,
        OnViolation.drop_group: DropGroup,
        OnViolation.wait: Wait,
    }
    return kinds[config.on_violation](pacing, config.max_lag)
