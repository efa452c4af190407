"""Admission, eviction and budgets, without a model."""

from __future__ import annotations

import numpy as np
from engine_helpers import prompt, request
from hypothesis import given, settings
from hypothesis import strategies as st

from rollout_workers.engines.protocol import KvPolicy
from rollout_workers.engines.torch_engine.scheduler import PREFILL_GAIN, Scheduler, StepPlan
from rollout_workers.engines.torch_engine.slot_table import SlotTable


def scheduler_of(slots: int = 8, prefill_tokens: int = 64) -> Scheduler:
    return Scheduler(SlotTable(slots, 128), prefill_tokens)


def add(scheduler: Scheduler, name: str, length: int, **fields: object) -> None:
    scheduler.enqueue(request(name, session_id=name, prompt=prompt(length), **fields))


def compute(scheduler: Scheduler, plan: StepPlan, version: int = 0) -> None:
    """What the engine does with a plan, with token 7 sampled everywhere."""
    scheduler.computed(plan, version)
    for slot in plan.sample_slots.tolist():
        scheduler.table.tokens[slot, scheduler.table.length[slot]] = 7
        scheduler.table.length[slot] += 1


def test_the_prefill_budget_is_spent_in_order_of_admission() -> None:
    scheduler = scheduler_of(prefill_tokens=30)
    for name, length in (("a", 25), ("b", 40), ("c", 3)):
        add(scheduler, name, length)
    scheduler.admit()
    spent = []
    for _ in range(4):
        plan = scheduler.plan()
        assert plan is not None
        spent.append({chunk.slot: chunk.length for group in plan.chunks for chunk in group})
        compute(scheduler, plan)
    assert spent == [{0: 25, 1: 5}, {1: 30}, {1: 5, 2: 3}, {}]


def test_decoding_goes_on_while_others_prefill() -> None:
    scheduler = scheduler_of(prefill_tokens=10)
    add(scheduler, "a", 2)
    add(scheduler, "b", 60)
    scheduler.admit()
    decodes = []
    for _ in range(4):
        plan = scheduler.plan()
        assert plan is not None
        decodes.append(plan.decodes)
        compute(scheduler, plan)
    assert decodes == [0, 1, 1, 1]


def test_chunks_are_padded_only_with_their_like() -> None:
    scheduler = scheduler_of(slots=8, prefill_tokens=500)
    for name, length in (("a", 100), ("b", 3), ("c", 9), ("d", 70), ("e", 17)):
        add(scheduler, name, length)
    scheduler.admit()
    plan = scheduler.plan()
    assert plan is not None
    assert [[chunk.length for chunk in group] for group in plan.chunks] == [[3, 9], [17], [100, 70]]
    assert len(plan.tokens) == 199
    for group in plan.chunks:
        for chunk in group:
            rows = slice(chunk.row, chunk.row + chunk.length)
            assert (plan.slots[rows] == chunk.slot).all()
            assert plan.positions[rows].tolist() == list(range(chunk.length))
            assert plan.tokens[rows].tolist() == prompt(chunk.length).tolist()


def test_pinned_and_served_requests_take_turns() -> None:
    scheduler = scheduler_of()
    add(scheduler, "a", 2)
    add(scheduler, "b", 2, pinned_version=4)
    add(scheduler, "c", 2, pinned_version=9)
    scheduler.admit()
    pins = []
    for _ in range(5):
        plan = scheduler.plan()
        assert plan is not None
        pins.append(plan.pin)
        compute(scheduler, plan)
    assert pins == [4, 9, -1, 4, 9]


def test_auto_recomputes_short_contexts_at_once_and_long_ones_after_several_updates() -> None:
    scheduler = scheduler_of(prefill_tokens=500)
    add(scheduler, "short", 10, max_tokens=10)
    add(scheduler, "long", 100, max_tokens=5)
    scheduler.admit()
    plan = scheduler.plan()
    assert plan is not None
    compute(scheduler, plan)
    remaining = 4
    assert PREFILL_GAIN * 9 >= 10
    assert PREFILL_GAIN * remaining * 3 < 100 <= PREFILL_GAIN * remaining * 4
    assert scheduler.invalidate(3, KvPolicy.AUTO) == 10
    assert scheduler.table.kv_length[:2].tolist() == [0, 100]
    assert scheduler.invalidate(4, KvPolicy.AUTO) == 100


OPERATIONS = st.lists(
    st.tuples(st.sampled_from(["submit", "step", "abort", "release", "update"]), st.integers(0, 9), st.integers(1, 60)),
    max_size=60,
)


@settings(max_examples=150, deadline=None)
@given(OPERATIONS)
def test_random_operations_never_wedge_and_keep_the_invariants(operations: list[tuple[str, int, int]]) -> None:
    scheduler = scheduler_of(slots=6, prefill_tokens=20)
    table = scheduler.table
    for count, (operation, which, size) in enumerate(operations):
        name = f"s{which}"
        slot = table.slot_of.get(name)
        if operation == "submit" and not scheduler.busy(name):
            scheduler.enqueue(request(f"{count}", session_id=name, prompt=prompt(size), max_tokens=4))
        elif operation == "step":
            step(scheduler)
        elif operation == "abort":
            if not scheduler.remove_waiting(lambda r, name=name: r.session_id == name) and slot is not None:
                _ = table.finish(slot) if table.running[slot] else None
        elif operation == "release" and not scheduler.busy(name):
            scheduler.release(name)
        elif operation == "update":
            scheduler.invalidate(count, KvPolicy.AUTO if which % 2 else KvPolicy.RECOMPUTE)
        check(scheduler)
    for _ in range(2000):
        if not scheduler.waiting and not table.running.any():
            break
        step(scheduler)
    assert not scheduler.waiting
    assert not table.running.any()


def step(scheduler: Scheduler) -> None:
    scheduler.admit()
    moves = scheduler.compact()
    if moves is not None:
        scheduler.table.swap(*moves)
        check(scheduler)
    plan = scheduler.plan()
    if plan is None:
        return
    assert plan.prefilled <= scheduler.prefill_tokens
    compute(scheduler, plan)
    for slot in plan.sample_slots.tolist():
        if scheduler.table.length[slot] >= scheduler.table.limit[slot]:
            scheduler.table.finish(slot)


def check(scheduler: Scheduler) -> None:
    table = scheduler.table
    assert (table.kv_length <= table.length).all()
    assert (table.kv_length < table.length)[table.running].all()
    held = set(table.slot_of.values())
    assert all(table.session[slot] == name for name, slot in table.slot_of.items())
    for slot in np.flatnonzero(table.running).tolist():
        running = table.request[slot]
        assert running is not None
        assert table.tokens[slot, : len(running.prompt)].tolist() == running.prompt.tolist()
    assert len(held) == len(table.slot_of)
    assert table.free + len(held) == table.slots
    assert held == set(table.idle) | set(np.flatnonzero(table.running).tolist())
    waiting = [r.session_id for r in scheduler.waiting]
    assert len(set(waiting)) == len(waiting)
    assert all(scheduler.busy(name) for name in waiting)


def test_running_slots_are_moved_together_when_that_pays() -> None:
    scheduler = scheduler_of(slots=8)
    for name in "abcdefgh":
        add(scheduler, name, 3)
    scheduler.admit()
    assert scheduler.compact() is None
    for slot in (0, 1, 3, 4, 6):
        scheduler.table.finish(slot)
    moves = scheduler.compact()
    assert moves is not None
    low, high = moves
    assert (low.tolist(), high.tolist()) == ([0, 1], [5, 7])
    assert scheduler.table.swap(low, high) == 3
    assert np.flatnonzero(scheduler.table.running).tolist() == [0, 1, 2]
    assert {name: scheduler.table.slot_of[name] for name in "afbh"} == {"f": 0, "h": 1, "a": 5, "b": 7}
    assert list(scheduler.table.idle) == [5, 7, 3, 4, 6]
    assert scheduler.compact() is None
