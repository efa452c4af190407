"""Accounts, slots and books: every second is charged once, and what is told is in the file."""

from __future__ import annotations

import itertools
from collections import defaultdict
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experience.accounting import Account, Cause, Span, TimelineWriter, read_timeline, thin
from experience.books import BYTES, Books
from experience.slots import FREE, Doing, Slots
from learner.training_lane import TrainingLane

CAUSES = st.sampled_from(list(Cause))
STEPS = st.lists(st.tuples(CAUSES, st.floats(0.0, 5.0)), min_size=1, max_size=60)


def by_cause(spans: list[Span]) -> dict[Cause, float]:
    seconds: dict[Cause, float] = defaultdict(float)
    for span in spans:
        seconds[span.cause] += span.ended_at - span.began_at
    return dict(seconds)


def run(account: Account, steps: list[tuple[Cause, float]]) -> float:
    now = account.began_at
    for cause, length in steps:
        account.switch(cause, now)
        now += length
    return now


@settings(deadline=None)
@given(STEPS)
def test_seconds_and_spans_add_up_to_the_time(steps: list[tuple[Cause, float]]) -> None:
    account = Account("a", 100.0)
    end = run(account, steps)
    seconds = account.seconds(end)
    assert sum(seconds.values()) == pytest.approx(end - 100.0)
    spans = account.take_spans(end)
    assert by_cause(spans) == pytest.approx({cause: value for cause, value in seconds.items() if value > 0})
    assert all(a.ended_at == b.began_at for a, b in itertools.pairwise(spans))


@settings(deadline=None)
@given(STEPS, st.floats(0.01, 3.0))
def test_thinning_keeps_the_seconds_of_each_cause_and_leaves_no_gap(
    steps: list[tuple[Cause, float]], least_s: float
) -> None:
    account = Account("a", 0.0)
    end = run(account, steps)
    spans = account.take_spans(end)
    thinned = thin(spans, least_s)
    assert by_cause(thinned) == pytest.approx(by_cause(spans))
    assert len(thinned) <= max(len(spans), 1)
    for before, after in itertools.pairwise(thinned):
        assert after.began_at == pytest.approx(before.ended_at)


def test_a_million_short_spans_become_few() -> None:
    spans = [Span("a", (Cause.PREFILL, Cause.DECODE)[i % 2], i / 1000, (i + 1) / 1000) for i in range(10_000)]
    assert len(thin(spans, 0.02)) <= 2 * 10 / 0.1 + 2


def test_the_timeline_of_a_process_that_replaces_another_begins_with_a_failure(tmp_path: Path) -> None:
    first = Books("engine-0", 10.0, tmp_path)
    account = first.account(now=12.0)
    account.switch(Cause.DECODE, 13.0)
    first.write(15.0)
    with (tmp_path / "engine-0.jsonl").open("ab") as file:  # what a kill -9 leaves of a line
        file.write(b'["engine-0","dec')
    second = Books("engine-0", 18.0, tmp_path, replaces=True)
    second.account(now=20.0).switch(Cause.IDLE, 21.0)
    told = second.totals(22.0)
    assert told["engine-0"] == {Cause.FAILURE: 3.0, Cause.STARTUP: 3.0, Cause.IDLE: 1.0}
    spans = read_timeline(tmp_path)
    assert by_cause(spans) == {Cause.STARTUP: 6.0, Cause.DECODE: 2.0, Cause.FAILURE: 3.0, Cause.IDLE: 1.0}
    assert all(before.ended_at == after.began_at for before, after in itertools.pairwise(spans))


def test_what_is_told_is_in_the_file_and_written_now_and_then_only(tmp_path: Path) -> None:
    books = Books("learner-0", 0.0, tmp_path)
    account = books.account(now=0.0)
    writes = set()
    for tick in range(1, 1000):
        account.switch((Cause.TRAIN, Cause.QUEUE_EMPTY)[tick % 2], tick / 100)
        told = books.totals(tick / 100)["learner-0"]
        writes.add((tmp_path / "learner-0.jsonl").stat().st_size)
        written = by_cause(read_timeline(tmp_path)) if tick % 100 == 0 else None
        assert written is None or written == pytest.approx(told)
    assert len(writes) <= 1000 / 100 / 0.4 + 2


def test_a_long_timeline_becomes_coarser(tmp_path: Path) -> None:
    books = Books("engine-0", 0.0, tmp_path)
    account = books.account(now=0.0)
    assert books._writer is not None
    sizes = []
    for second in range(1, 9):
        for tick in range(50):
            account.switch((Cause.DECODE, Cause.IDLE)[tick % 2], second - 1 + tick / 50)
        books._writer.size = BYTES * 8  # as if much had been written
        before = books._writer.size
        books.write(float(second))
        sizes.append(books._writer.size - before)
    assert sizes[-1] < sizes[0] / 5
    assert sum(books.totals(8.0)["engine-0"].values()) == pytest.approx(8.0)


def test_a_timeline_written_by_two_lives_is_read_without_the_torn_line(tmp_path: Path) -> None:
    TimelineWriter(tmp_path, "a").write([Span("a", Cause.IDLE, 0.0, 1.0)])
    with (tmp_path / "a.jsonl").open("ab") as file:
        file.write(b'["a","idle",1.0,')
    TimelineWriter(tmp_path, "a").write([Span("a", Cause.TRAIN, 2.0, 3.0)])
    assert [span.cause for span in read_timeline(tmp_path)] == [Cause.IDLE, Cause.TRAIN]


EVENTS = st.lists(
    st.tuples(
        st.sampled_from(["begin", "move", "end"]), st.integers(0, 5), st.sampled_from(list(Doing)), st.floats(0, 2)
    ),
    max_size=60,
)


@settings(deadline=None)
@given(EVENTS)
def test_slot_seconds_add_up_and_so_do_the_workers_own(events: list[tuple[str, int, Doing, float]]) -> None:
    slots, now, live = Slots("worker-0", 6, 0.0), 0.0, set()
    for kind, number, doing, wait in events:
        now += wait
        if kind == "begin" and number not in live:
            live.add(number)
            slots.begin(str(number), "g", now)
        elif kind == "move":
            slots.move(str(number), doing, now)
        elif kind == "end":
            live.discard(number)
            slots.end(str(number), now)
    now += 1.0
    told = slots.slot_seconds(now)
    assert sum(told.get(name, 0.0) for name in (*Doing, FREE)) == pytest.approx(6 * now)
    assert sum(slots.seconds(now).values()) == pytest.approx(now)
    spans = slots.take_spans(now)
    assert by_cause(spans) == pytest.approx({c: s for c, s in slots.seconds(now).items() if s > 0})


def test_what_has_lasted_longest_comes_first_and_asked_groups_before_others() -> None:
    slots = Slots("worker-0", 4, 0.0)
    slots.begin("old", "g0", 0.0)
    slots.begin("young", "g1", 3.0)
    slots.begin("middle", "g1", 1.0)
    slots.move("old", Doing.REWARD, 4.0)
    assert [wait.episode_id for wait in slots.waits(set(), 3)] == ["middle", "young", "old"]
    assert [(wait.episode_id, wait.doing) for wait in slots.waits({"g0"}, 1)] == [("old", Doing.REWARD)]


def test_a_lane_that_is_shared_out_in_another_way_goes_on(tmp_path: Path) -> None:
    """As a synthetic learner's: training, which is modelled, is laid over what its actor does."""
    books = Books("learner-0", 0.0, tmp_path)
    account = books.account(now=1.0)
    books.write(3.0)
    account.switch(Cause.QUEUE_EMPTY, 4.0)
    training = iter([[(6.0, 9.0)], [(12.0, 13.0)]])
    books.adopt(TrainingLane(account, training.__next__), account.began_at)
    books.write(8.0)
    books.write(14.0)
    seconds = {Cause.STARTUP: 4.0, Cause.QUEUE_EMPTY: 6.0, Cause.TRAIN: 4.0}
    assert books.totals(14.0)["learner-0"] == pytest.approx(seconds)
    spans = read_timeline(tmp_path)
    assert by_cause(spans) == pytest.approx(seconds)
    assert all(before.ended_at == after.began_at for before, after in itertools.pairwise(spans))
