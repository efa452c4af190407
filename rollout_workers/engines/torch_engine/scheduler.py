"""What an engine computes next: admission, eviction and the token budget of a step. No torch, no clock.

| | consumes | produces | waits for | unblocked by |
|---|---|---|---|---|
| ``admit`` | the waiting queue | running slots | a slot that is free or idle | ``finish``, ``release`` |
| ``plan`` | running slots | one step: all decodes, then prefill chunks | nothing | |
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from rollout_workers.engines.protocol import GenerateRequest, KvPolicy
from rollout_workers.engines.torch_engine.prefix_sharing import Prefix, sibling_prefix
from rollout_workers.engines.torch_engine.slot_table import SERVED, IntArray, SlotTable

PREFILL_GAIN = 8
"""Tokens that prefill in about the time in which one decodes: the exchange rate of ``KvPolicy.AUTO``."""

COMPACTION_OVERHEAD = 2
"""Fixed cost of exchanging slots, in slots attended over four steps."""


@dataclass(frozen=True)
class Chunk:
    """Tokens ``start : start + length`` of a slot, computed in one step from row ``row`` of the step on."""

    slot: int
    start: int
    length: int
    row: int


@dataclass(frozen=True)
class StepPlan:
    """One forward pass over T tokens: first ``decodes`` single tokens (ascending slots), then the prefill chunks."""

    pin: int
    slots: IntArray
    """Slot of each token, int64 [T]."""
    positions: IntArray
    """Position of each token within its sequence, int64 [T]."""
    tokens: npt.NDArray[np.int32]
    """Token ids, int32 [T]."""
    decodes: int
    chunks: tuple[tuple[Chunk, ...], ...]
    """Prefill chunks in groups of similar length, in the order of their rows."""
    sample_rows: IntArray
    """Rows whose logits are sampled: the last known token of a sequence."""

    @cached_property
    def sample_slots(self) -> IntArray:
        return self.slots[self.sample_rows]

    @property
    def prefilled(self) -> int:
        return len(self.tokens) - self.decodes


class Scheduler:
    """First come, first served over the slots of one engine; every decision depends on the calls made, nothing else.

    Invariants: a session has at most one request (waiting or running); a request waits only while no slot is free or
    idle, or while a running one computes the prefix that they share; a running slot has at least one token to compute;
    a slot that is lent to another process neither runs nor moves.
    """

    def __init__(self, table: SlotTable, prefill_tokens: int, share_prefixes: bool = True) -> None:
        self.table = table
        self.prefill_tokens = prefill_tokens
        self.share_prefixes = share_prefixes
        self.shared_tokens = 0
        """Prompt tokens whose KV was copied from another session."""
        self._version = 0
        self.waiting: deque[GenerateRequest] = deque()
        self.evicted = 0
        self._admitted = 0
        self._last_pin = SERVED
        self._waiting_sessions: set[str] = set()
        self.on_evicted: Callable[[int, str], None] = _nobody_parks
        """Called with a slot whose idle session is about to lose it, and the session that gets it."""
        self.on_seated: Callable[[int], None] = _nothing
        """Called with a slot that was just given to a session."""
        self.on_shared: Callable[[int, int, int], None] = _nothing_shared
        """Called with a slot, another one and a length: the KV of the first one's tokens belongs into the other too."""

    def busy(self, session_id: str) -> bool:
        """Whether a request of the session waits or runs."""
        slot = self.table.slot_of.get(session_id)
        return session_id in self._waiting_sessions or (slot is not None and bool(self.table.running[slot]))

    def enqueue(self, request: GenerateRequest) -> None:
        self.waiting.append(request)
        self._waiting_sessions.add(request.session_id)

    def remove_waiting(self, unwanted: Callable[[GenerateRequest], bool]) -> list[GenerateRequest]:
        """Take the matching requests out of the waiting queue, in order."""
        removed = [request for request in self.waiting if unwanted(request)]
        if removed:
            self.waiting = deque(request for request in self.waiting if not unwanted(request))
            self._waiting_sessions.difference_update(request.session_id for request in removed)
        return removed

    def admit(self) -> list[int]:
        """Start waiting requests, oldest first, while they can have a slot; returns the slots started.

        A request whose siblings compute what it begins with lets others go first.
        """
        started: list[int] = []
        held: list[GenerateRequest] = []
        while self.waiting:
            request = self.waiting[0]
            prefix = sibling_prefix(self.table, request, self._version) if self.share_prefixes else Prefix()
            if prefix.worth_waiting:
                held.append(self.waiting.popleft())
                continue
            slot = self._start(request, prefix)
            if slot is None:
                break
            self.waiting.popleft()
            started.append(slot)
        self.waiting.extendleft(reversed(held))
        return started

    def _start(self, request: GenerateRequest, prefix: Prefix) -> int | None:
        """Give a request its slot and the KV that a sibling has for it; None while there is no slot."""
        table, session_id = self.table, request.session_id
        source = table.slot_of.get(prefix.source)
        slot = self.seat(session_id, spare=source)
        if slot is None:
            return None
        cached = table.start(slot, request, self._admitted)
        if source is not None and prefix.ready > cached and table.session[source] == prefix.source:
            self.on_shared(source, slot, prefix.ready)
            table.adopt(slot, source, prefix.ready)
            self.shared_tokens += prefix.ready
        self._waiting_sessions.discard(session_id)
        self._admitted += 1
        return slot

    def share(self, slot: int, request: GenerateRequest) -> int:
        """Copy into a slot that waits for KV what siblings have of it; returns how many tokens have theirs now."""
        table, have = self.table, int(self.table.kv_length[slot])
        prefix = sibling_prefix(table, request, self._version) if self.share_prefixes else Prefix()
        source = table.slot_of.get(prefix.source)
        if source is None or prefix.ready <= have:
            return have
        self.on_shared(source, slot, prefix.ready)
        self.shared_tokens += prefix.ready
        table.kv_length[slot], table.kv_oldest[slot] = prefix.ready, table.kv_oldest[source]
        table.received[slot] += prefix.ready - have
        return prefix.ready

    def seat(self, session_id: str, spare: int | None = None) -> int | None:
        """The slot of a session, which gets one if it has none, or one that is lent; None while all are in use. ``spare``
        is the last to be taken from its session."""
        slot = self.table.slot_of.get(session_id)
        if slot is not None and self.table.lent[slot]:
            self.table.drop(slot)
            slot = None
        if slot is None:
            if not self.table.free and not self._evict(session_id, spare):
                return None
            slot = self.table.take(session_id)
            self.on_seated(slot)
        return slot

    def _evict(self, coming: str, spare: int | None = None) -> bool:
        """Free for session ``coming`` the idle slot that was unused longest, one whose session has a request waiting only if all have."""
        table = self.table
        idle = [slot for slot in table.idle if slot != spare] or list(table.idle)
        victim = next((slot for slot in idle if table.session[slot] not in self._waiting_sessions), None)
        victim = next(iter(idle), None) if victim is None else victim
        if victim is None:
            return False
        self.on_evicted(victim, coming)
        table.drop(victim)
        self.evicted += 1
        return True

    def compact(self) -> tuple[IntArray, IntArray] | None:
        """The slots to exchange so that the running ones come first, or None if that is not worth it.

        Decoding attends over all slots up to the last running one, so a hole costs as much as a running slot, in
        every step. An exchange costs about four such slots, once (twice two slots are read and written), and
        ``COMPACTION_OVERHEAD`` is its fixed part. With an outlook of four steps it is worth it when

            exchanged + COMPACTION_OVERHEAD <= holes

        Slots that are lent stay where they are.
        """
        running = self.table.running.nonzero()[0]
        if not len(running):
            return None
        seats = np.flatnonzero(~self.table.lent)[: len(running)]
        holes = int(running[-1] - seats[-1])
        if holes <= COMPACTION_OVERHEAD:
            return None
        high = running[running > seats[-1]]
        if len(high) + COMPACTION_OVERHEAD > holes:
            return None
        return seats[~self.table.running[seats]], high

    def plan(self) -> StepPlan | None:
        """The next step, or None when nothing runs. Requests on different weights take turns, one step each."""
        running = self.table.running.nonzero()[0]
        if not len(running):
            return None
        pins = self.table.pin[running]
        if pins.max() != SERVED:
            choices = np.unique(pins)
            later = choices[choices > self._last_pin]
            self._last_pin = int(later[0] if len(later) else choices[0])
            running = running[pins == self._last_pin]
        else:
            self._last_pin = SERVED
        return self._plan_rows(running)

    def _plan_rows(self, running: IntArray) -> StepPlan:
        table = self.table
        pending = table.length[running] - table.kv_length[running]
        decodes = running[pending == 1]
        prefills = running[pending > 1]
        groups = self._chunks(prefills[np.argsort(table.order[prefills])], len(decodes)) if len(prefills) else ()
        slots, positions, rows = decodes, table.kv_length[decodes], np.arange(len(decodes))
        if groups:
            chunks = [chunk for group in groups for chunk in group]
            slots = np.concatenate([slots, *(np.full(c.length, c.slot) for c in chunks)])
            positions = np.concatenate([positions, *(np.arange(c.start, c.start + c.length) for c in chunks)])
            ends = [c.row + c.length - 1 for c in chunks if c.start + c.length == table.length[c.slot]]
            rows = np.concatenate([rows, np.array(ends, np.int64)])
        tokens = table.tokens[slots, positions]
        return StepPlan(self._last_pin, slots, positions, tokens, len(decodes), groups, rows)

    def _chunks(self, slots: IntArray, row: int) -> tuple[tuple[Chunk, ...], ...]:
        """Split the step's prefill budget over ``slots`` in order; group what is padded together by powers of two."""
        budget = self.prefill_tokens
        buckets: dict[int, list[tuple[int, int, int]]] = {}
        for slot in slots.tolist():
            start = int(self.table.kv_length[slot])
            length = min(int(self.table.length[slot]) - start, budget)
            if length == 0:
                break
            budget -= length
            buckets.setdefault(max(length - 1, 15).bit_length(), []).append((slot, start, length))
        groups = []
        for _, members in sorted(buckets.items()):
            group = []
            for slot, start, length in members:
                group.append(Chunk(slot, start, length, row))
                row += length
            groups.append(tuple(group))
        return tuple(groups)

    def computed(self, plan: StepPlan, version: int) -> None:
        """Record that the step's tokens have their KV, computed with the weights of ``version``."""
        table = self.table
        if plan.pin == SERVED:
            self._version = version
        if plan.positions.min() == 0:
            table.kv_oldest[plan.slots[plan.positions == 0]] = version
        table.kv_length[plan.slots[: plan.decodes]] += 1
        for group in plan.chunks:
            for chunk in group:
                table.kv_length[chunk.slot] = chunk.start + chunk.length

    def invalidate(self, new_version: int, policy: KvPolicy) -> int:
        """Drop the KV that a weight update makes stale; returns how many tokens running requests compute again.

        Idle sessions compute theirs again with their next turn. ``auto`` decides by cost for each slot: recomputing
        the context takes about ``context / PREFILL_GAIN`` decode steps' time; it is worth it when that is at most the
        tokens that the request may still sample from the stale KV, times the updates that the KV has missed:

            recompute  <=>  context <= PREFILL_GAIN * (limit - length) * (new_version - kv_oldest)

        so that short contexts follow the policy at once and long ones after several updates or never.
        """
        table = self.table
        self._version = new_version
        stale = (table.pin == SERVED) & (table.kv_length > 0)
        if policy is KvPolicy.KEEP:
            return 0
        if policy is KvPolicy.AUTO:
            stale &= worth_recomputing(table.kv_length, table.limit - table.length, new_version - table.kv_oldest)
        again = int(table.kv_length[stale & table.running].sum())
        table.kv_length[stale] = 0
        return again

    def drop_all_kv(self) -> int:
        """Forget all KV (``PauseMode.KEEP_REQUESTS``); returns how many tokens running requests compute again."""
        again = int(self.table.kv_length[self.table.running].sum())
        self.table.kv_length[:] = 0
        return again

    def release(self, session_id: str) -> None:
        """Free the slot of an idle session; unknown sessions are ignored."""
        slot = self.table.slot_of.get(session_id)
        if slot is not None:
            self.table.drop(slot)


def worth_recomputing(
    context: IntArray | int, remaining: IntArray | int, missed: IntArray | int
) -> npt.NDArray[np.bool_]:
    """The rule of ``KvPolicy.AUTO``, see `Scheduler.invalidate`; of one sequence or of many."""
    return np.asarray(context <= PREFILL_GAIN * np.maximum(remaining, 1) * np.maximum(missed, 1))


def _nothing(slot: int) -> None:
    """For when nobody parks."""


def _nobody_parks(slot: int, coming: str) -> None:
    """For when nobody parks."""


def _nothing_shared(source: int, slot: int, length: int) -> None:
    """For a table without a cache."""
