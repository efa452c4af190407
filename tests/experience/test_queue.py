from __future__ import annotations

import pytest
from experience_builders import entry, fill, header, make_queue

from experience.config import OnViolation, QueueConfig, QueueOrder
from experience.entries import Added, EventKind, LeasedGroup
from experience.queue import ExperienceQueue, QueueError
from experience.records import Status


def lease(queue: ExperienceQueue, limit: int, version: int = 0, consumer: str = "learner") -> list[str]:
    return [group.group_id for group in queue.lease(consumer, limit, version, 0.0)]


def train(queue: ExperienceQueue, groups: list[LeasedGroup], step: int) -> None:
    tokens = sum(group.tokens for group in groups)
    queue.ack([group.group_id for group in groups], step=step, trained_tokens=tokens, masked_tokens=0)


def kinds(queue: ExperienceQueue) -> list[tuple[str, str]]:
    return [(event.kind.value, event.reason) for event in queue.events()]


def test_a_group_is_delivered_when_all_its_episodes_have_arrived() -> None:
    queue = make_queue()
    queue.open(header(0, size=2), 0.0)
    assert queue.add(entry("g0", "g0-1"), 0.0) is Added.ACCEPTED
    assert lease(queue, 1) == []
    assert [(i.header.group_id, i.missing) for i in queue.in_flight()] == [("g0", ["g0-0"])]
    assert queue.events() == []
    queue.add(entry("g0", "g0-0"), 0.0)
    assert kinds(queue) == [("ready", "")]
    leased = queue.lease("learner", 1, 0, 0.0)
    assert {e.episode_id for e in leased[0].episodes} == {"g0-0", "g0-1"}
    train(queue, leased, step=0)
    assert kinds(queue) == [("trained", "")]
    assert queue.ledger.snapshot() == {"dispatched": 1, "trained": 1, "dropped": {}, "live": 0}
    assert queue.bytes_used == 0


def test_an_episode_that_arrives_twice_counts_once_at_every_stage() -> None:
    queue = make_queue()
    queue.open(header(0), 0.0)
    episode = entry("g0", "g0-0")
    assert [queue.add(episode, 0.0), queue.add(episode, 0.0)] == [Added.ACCEPTED, Added.DUPLICATE]
    queue.add(entry("g0", "g0-1"), 0.0)
    leased = queue.lease("learner", 1, 0, 0.0)
    assert queue.add(episode, 0.0) is Added.DUPLICATE
    train(queue, leased, step=0)
    assert queue.add(episode, 0.0) is Added.DUPLICATE
    assert queue.ledger.token_snapshot()["generated"] == 2


def test_what_arrives_for_a_dropped_group_is_wasted_once() -> None:
    queue = make_queue()
    queue.open(header(0), 0.0)
    queue.drop("g0", "cancelled")
    assert [e.episodes for e in queue.events()] == [["g0-0", "g0-1"]]
    assert queue.add(entry("g0", "g0-0", [0, 0, 0]), 0.0) is Added.UNKNOWN
    assert queue.add(entry("g0", "g0-0", [0, 0, 0]), 0.0) is Added.DUPLICATE
    queue.ledger.check()
    assert queue.ledger.token_snapshot()["wasted"] == 3
    assert queue.ledger.snapshot()["dropped"] == {"cancelled": 1}


def test_failed_episodes_close_a_group_early_or_drop_it_below_min_size() -> None:
    queue = make_queue(config=QueueConfig(min_size=2))
    queue.open(header(0, size=3), 0.0)
    queue.open(header(1, size=3), 0.0)
    for episode_id in ("g0-0", "g0-1"):
        queue.add(entry("g0", episode_id), 0.0)
    assert queue.fail("g0", "g0-2", "environment", 0.0)
    assert not queue.fail("g0", "g0-2", "environment", 0.0)
    queue.fail("g1", "g1-0", "environment", 0.0)
    queue.events()
    queue.fail("g1", "g1-2", "reward", 0.0)
    event = queue.events()[0]
    assert (event.kind, event.reason, event.episodes) == (EventKind.RETURNED, "reward", ["g1-1"])
    assert lease(queue, 2) == ["g0"]


def test_a_system_error_is_given_up_and_its_tokens_are_wasted() -> None:
    queue = make_queue(config=QueueConfig(min_size=1))
    queue.open(header(0, size=2), 0.0)
    broken = entry("g0", "g0-0", [0, 0], status=Status.SYSTEM_ERROR)
    assert [queue.add(broken, 0.0), queue.add(broken, 0.0)] == [Added.ACCEPTED, Added.DUPLICATE]
    queue.add(entry("g0", "g0-1"), 0.0)
    leased = queue.lease("learner", 1, 0, 0.0)
    assert [e.episode_id for e in leased[0].episodes] == ["g0-1"]
    queue.ledger.check()
    assert queue.ledger.token_snapshot()["wasted"] == 2


def test_a_group_closes_at_its_deadline_with_min_size_episodes() -> None:
    queue = make_queue(config=QueueConfig(min_size=2, close_after_s=10.0))
    queue.open(header(0, size=4), now=5.0)
    queue.add(entry("g0", "g0-0"), 6.0)
    assert queue.next_deadline() is None
    queue.add(entry("g0", "g0-3"), 7.0)
    assert queue.next_deadline() == 15.0
    assert queue.close_due(14.9) == []
    assert queue.close_due(15.0) == ["g0"]
    closed, ready = queue.events()
    assert (closed.kind, closed.episodes, ready.kind) == (EventKind.CLOSED, ["g0-1", "g0-2"], EventKind.READY)
    assert queue.add(entry("g0", "g0-1"), 16.0) is Added.UNKNOWN
    assert queue.add(entry("g0", "g0-1"), 16.0) is Added.DUPLICATE
    queue.ledger.check()


def test_past_its_deadline_a_group_closes_as_soon_as_it_is_large_enough() -> None:
    queue = make_queue(config=QueueConfig(min_size=2, close_after_s=1.0))
    queue.open(header(0, size=3), now=0.0)
    queue.add(entry("g0", "g0-0"), 50.0)
    assert lease(queue, 1) == []
    queue.add(entry("g0", "g0-1"), 51.0)
    assert lease(queue, 1) == ["g0"]


def test_a_released_lease_returns_to_its_place() -> None:
    queue = make_queue(config=QueueConfig(order=QueueOrder.ready_first))
    for index in range(4):
        fill(queue, index)
    assert lease(queue, 2, consumer="first") == ["g0", "g1"]
    assert lease(queue, 1, consumer="second") == ["g2"]
    assert queue.release("first") == ["g0", "g1"]
    assert lease(queue, 4, consumer="third") == ["g0", "g1", "g3"]


def test_only_leased_groups_can_be_acknowledged_and_only_with_their_tokens() -> None:
    queue = make_queue()
    fill(queue, 0)
    with pytest.raises(QueueError, match="g0 cannot be acknowledged: it is ready"):
        queue.ack(["g0"], step=0, trained_tokens=2, masked_tokens=0)
    leased = queue.lease("learner", 1, 0, 0.0)
    with pytest.raises(QueueError, match="5 trained and 0 masked"):
        queue.ack(["g0"], step=0, trained_tokens=5, masked_tokens=0)
    train(queue, leased, step=0)
    train(queue, leased, step=0)
    assert queue.ledger.trained == 1
    with pytest.raises(QueueError, match="not live"):
        queue.ack(["g0"], step=1, trained_tokens=2, masked_tokens=0)


def test_group_ids_and_indices_are_never_used_again() -> None:
    queue = make_queue()
    fill(queue, 3)
    with pytest.raises(QueueError, match="next free one is 4"):
        queue.open(header(3), 0.0)
    assert queue.next_index == 4


@pytest.mark.parametrize(
    ("order", "window", "expected"),
    [
        (QueueOrder.oldest_first, 9, ["g1", "g2", "g4", "g5"]),
        (QueueOrder.ready_first, 9, ["g5", "g4", "g2", "g1"]),
        (QueueOrder.windowed, 3, ["g1", "g2"]),
        (QueueOrder.windowed, 5, ["g1", "g2", "g4"]),
        (QueueOrder.windowed, 1, []),
    ],
)
def test_orders_keep_their_promise(order: QueueOrder, window: int, expected: list[str]) -> None:
    queue = make_queue(config=QueueConfig(order=order, window=window))
    for index in range(6):
        queue.open(header(index), 0.0)
    for index in (5, 4, 2, 1):
        for episode_id in header(index).episode_ids:
            queue.add(entry(f"g{index}", episode_id), 0.0)
    assert lease(queue, 6) == expected


def test_a_producer_waits_while_the_budget_is_spent_and_is_told_when_to_go_on() -> None:
    size = entry("g0", "g0-0").size_bytes
    queue = make_queue(config=QueueConfig(budget_mb=2.5 * size / (1 << 20)))
    fill(queue, 0)
    queue.open(header(1), 0.0)
    queue.events()
    assert queue.add(entry("g1", "g1-0"), 0.0) is Added.FULL
    assert queue.add(entry("g1", "g1-0"), 0.0) is Added.FULL
    assert kinds(queue) == []
    train(queue, queue.lease("learner", 1, 0, 0.0), step=0)
    assert kinds(queue) == [("trained", ""), ("space", "")]
    assert queue.add(entry("g1", "g1-0"), 0.0) is Added.ACCEPTED


def test_the_budget_never_starves_a_consumer_that_waits() -> None:
    queue = make_queue(config=QueueConfig(budget_mb=1e-6))
    fill(queue, 0)
    queue.open(header(1), 0.0)
    assert not queue.may_add(1)
    assert lease(queue, 2) == ["g0"]
    for episode_id in header(1).episode_ids:
        assert queue.add(entry("g1", episode_id), 0.0) is Added.ACCEPTED
    assert lease(queue, 1) == ["g1"]


def test_mask_tokens_drops_only_what_no_token_of_can_train() -> None:
    queue = make_queue(max_lag=2)
    fill(queue, 0, versions=[0, 0])
    fill(queue, 1, versions=[0, 3])
    fill(queue, 2, versions=[])
    assert lease(queue, 3, version=3) == ["g1"]
    assert queue.ledger.snapshot()["dropped"] == {"empty": 1, "stale": 1}


def test_drop_group_drops_with_any_stale_token_even_in_flight() -> None:
    queue = make_queue(max_lag=2, on_violation=OnViolation.drop_group)
    fill(queue, 0, versions=[0, 3])
    for index in (1, 2, 3):
        queue.open(header(index), 0.0)
    queue.add(entry("g1", "g1-0", [0]), 0.0)
    queue.report("g2", 0)
    queue.report("g2", 1)
    assert queue.expire(2) == []
    assert queue.expire(3) == ["g0", "g1", "g2"]
    assert [i.header.group_id for i in queue.in_flight()] == ["g3"]


def test_expire_leaves_delivered_groups_alone() -> None:
    queue = make_queue(max_lag=0)
    fill(queue, 0)
    leased = queue.lease("learner", 1, 0, 0.0)
    assert queue.expire(5) == []
    train(queue, leased, step=0)


def test_wait_holds_the_step_back_for_the_group_that_is_due() -> None:
    queue = make_queue(2, target_lag=1.0, max_lag=1, on_violation=OnViolation.wait)
    for index in range(4):
        queue.open(header(index), 0.0)
    for index in (1, 2, 3):
        for episode_id in header(index).episode_ids:
            queue.add(entry(f"g{index}", episode_id, [0]), 0.0)
    train(queue, queue.lease("learner", 2, 0, 0.0), step=0)
    for index in (4, 5):
        fill(queue, index, versions=[1], floor=1)
    assert lease(queue, 2, version=1) == ["g3"]
    for episode_id in header(0).episode_ids:
        queue.add(entry("g0", episode_id, [0]), 0.0)
    assert lease(queue, 1, version=1) == ["g0"]
    assert lease(queue, 2, version=2) == ["g4", "g5"]


def test_wait_takes_a_group_whose_deadline_passed_all_the_same() -> None:
    queue = make_queue(2, target_lag=0.0, max_lag=0, on_violation=OnViolation.wait)
    fill(queue, 0, versions=[0, 5])
    fill(queue, 1, versions=[5], floor=5)
    assert lease(queue, 2, version=5) == ["g0", "g1"]


def test_surplus_finished_groups_stay_queued() -> None:
    queue = make_queue()
    for index in range(5):
        fill(queue, index)
    train(queue, queue.lease("learner", 2, 0, 0.0), step=0)
    assert queue.ready_groups == 3
    assert lease(queue, 2, version=1) == ["g2", "g3"]


def test_staleness_outranks_the_window() -> None:
    """After a return to an earlier checkpoint a later group may be due before the head of the window."""
    config = QueueConfig(order=QueueOrder.windowed, window=1)
    queue = make_queue(1, target_lag=1.0, max_lag=1, on_violation=OnViolation.wait, config=config)
    fill(queue, 0, versions=[1], floor=1)
    queue.open(header(1, version_floor=0), 0.0)
    assert lease(queue, 1, version=1) == []
    for episode_id in header(1).episode_ids:
        queue.add(entry("g1", episode_id, [0]), 0.0)
    assert lease(queue, 1, version=1) == ["g1"]
    assert lease(queue, 1, version=2) == ["g0"]


def test_the_budget_holds_again_once_the_consumer_has_what_it_needs() -> None:
    size = entry("g0", "g0-0").size_bytes
    queue = make_queue(config=QueueConfig(budget_mb=4.5 * size / (1 << 20)))
    for index in range(2):
        fill(queue, index)
    leased = queue.lease("learner", 3, 0, 0.0)
    assert queue.may_add(size)
    train(queue, leased[:1], step=0)
    assert queue.may_add(2 * size)
    assert not queue.may_add(3 * size)
