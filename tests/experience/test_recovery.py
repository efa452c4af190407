from __future__ import annotations

import random
from pathlib import Path

import pytest
from experience_builders import entry, fill, header, make_queue
from hypothesis import given, settings
from hypothesis import strategies as st

from experience.config import OnViolation, QueueConfig, QueueOrder, StalenessConfig
from experience.entries import Added, LeasedGroup
from experience.journal import Journal, JournalError
from experience.queue import ExperienceQueue, QueueError
from experience.records import Status
from experience.staleness import make_policy

CONFIG = QueueConfig(min_size=1, order=QueueOrder.ready_first)


def recover(directory: Path, committed_step: int) -> ExperienceQueue:
    policy = make_policy(StalenessConfig(target_lag=1.0, max_lag=2), groups_per_update=2)
    return ExperienceQueue.recover(CONFIG, policy, Journal(directory, segment_bytes=4096), committed_step, 0.0)


def start(directory: Path) -> ExperienceQueue:
    return make_queue(config=CONFIG, journal=Journal(directory, segment_bytes=4096))


def step(queue: ExperienceQueue, version: int, limit: int = 2) -> list[LeasedGroup]:
    leased = queue.lease("learner", limit, version, 0.0)
    tokens = sum(group.tokens for group in leased)
    queue.ack([group.group_id for group in leased], step=version, trained_tokens=tokens, masked_tokens=0)
    return leased


def ids(groups: list[LeasedGroup]) -> list[str]:
    return [group.group_id for group in groups]


def test_groups_trained_after_the_checkpoint_are_delivered_again_in_the_same_steps(tmp_path: Path) -> None:
    queue = start(tmp_path)
    for index in (0, 1, 2, 3, 4, 5, 6):
        fill(queue, index, size=3, versions=[index])
    trained = [step(queue, version) for version in range(3)]
    queue.flush()
    again = recover(tmp_path, committed_step=0)
    again.ledger.check()
    assert again.ledger.snapshot() == {"dispatched": 7, "trained": 2, "dropped": {}, "live": 5}
    fill(again, 7, versions=[3])
    assert ids(again.lease("learner", 1, 1, 0.0)) == ids(trained[1])[:1]
    assert again.lease("learner", 1, 1, 0.0) == trained[1][1:]
    tokens = sum(group.tokens for group in trained[1])
    again.ack(ids(trained[1]), step=1, trained_tokens=tokens, masked_tokens=0)
    assert step(again, 2) == trained[2]
    assert ids(step(again, 3)) == ["g6", "g7"]


def test_a_second_recovery_follows_the_second_attempt(tmp_path: Path) -> None:
    queue = start(tmp_path)
    for index in range(6):
        fill(queue, index)
    for version in range(3):
        step(queue, version)
    queue.flush()
    second = recover(tmp_path, committed_step=0)
    assert ids(step(second, 1)) == ["g2", "g3"]
    fill(second, 6, versions=[2])
    second.flush()
    third = recover(tmp_path, committed_step=1)
    assert third.ledger.trained == 4
    assert ids(step(third, 2)) == ["g4", "g5"]
    assert ids(step(third, 3)) == ["g6"]
    third.flush()
    assert recover(tmp_path, committed_step=-1).ledger.trained == 0


def test_what_was_in_flight_is_listed_to_be_run_again(tmp_path: Path) -> None:
    queue = start(tmp_path)
    fill(queue, 0, versions=[3], floor=3)
    queue.open(header(1, size=3, version_floor=3), 0.0)
    queue.add(entry("g1", "g1-1", [3]), 0.0)
    queue.fail("g1", "g1-2", "environment", 0.0)
    queue.flush()
    again = recover(tmp_path, committed_step=-1)
    assert [(i.header, i.missing) for i in again.in_flight()] == [(header(1, 3, 3), ["g1-0"])]
    assert again.next_index == 2
    assert again.add(entry("g1", "g1-1", [3]), 0.0) is Added.DUPLICATE
    again.add(entry("g1", "g1-0", [0]), 0.0)
    assert ids(again.lease("learner", 5, 0, 0.0)) == ["g0", "g1"]


def test_a_live_queue_goes_back_when_only_the_learner_was_lost(tmp_path: Path) -> None:
    queue = start(tmp_path)
    for index in range(5):
        fill(queue, index)
    step(queue, 0)
    queue.commit(0)
    trained = step(queue, 1)
    held = queue.bytes_used
    queue.lease("learner", 2, 2, 0.0)
    assert queue.revert(0) == ids(trained)
    queue.ledger.check()
    assert queue.bytes_used == held + sum(e.size_bytes for group in trained for e in group.episodes)
    assert step(queue, 1) == trained
    assert ids(step(queue, 2)) == ["g4"]


def test_steps_trained_again_are_not_mixed(tmp_path: Path) -> None:
    queue = start(tmp_path)
    for index in range(4):
        fill(queue, index)
    step(queue, 0)
    step(queue, 1)
    queue.revert(-1)
    fill(queue, 4)
    assert ids(queue.lease("learner", 3, 0, 0.0)) == ["g0", "g1"]
    assert ids(queue.lease("learner", 1, 0, 0.0)) == ["g4"]


def test_what_runs_again_may_be_as_old_as_the_checkpoint(tmp_path: Path) -> None:
    staleness = StalenessConfig(target_lag=0.0, max_lag=0, on_violation=OnViolation.wait)
    policy = make_policy(staleness, groups_per_update=1)
    queue = ExperienceQueue(CONFIG, policy, journal=Journal(tmp_path))
    queue.open(header(0, version_floor=3), 0.0)
    fill(queue, 1, versions=[1], floor=3)
    queue.flush()
    again = ExperienceQueue.recover(CONFIG, policy, Journal(tmp_path), -1, 0.0)
    assert again.lease("learner", 1, 0, 0.0) == []
    for episode_id in header(0).episode_ids:
        again.add(entry("g0", episode_id, [0]), 0.0)
    assert ids(again.lease("learner", 1, 0, 0.0)) == ["g0"]


def test_going_back_beyond_the_last_commit_is_refused(tmp_path: Path) -> None:
    queue = start(tmp_path)
    for index in range(4):
        fill(queue, index)
    step(queue, 0)
    step(queue, 1)
    queue.commit(1)
    with pytest.raises(QueueError, match="cannot go back to step 0: step 1 is committed"):
        queue.revert(0)
    queue.flush()
    with pytest.raises(QueueError, match="step 0 is committed"):
        recover(tmp_path, committed_step=0).revert(-1)


def test_going_back_without_a_journal_is_refused() -> None:
    with pytest.raises(QueueError, match=r"queue\.journal=true"):
        make_queue().revert(0)


def test_a_journal_that_ends_before_the_checkpoint_is_refused(tmp_path: Path) -> None:
    queue = start(tmp_path)
    fill(queue, 0)
    step(queue, 0)
    queue.flush()
    with pytest.raises(QueueError, match="ends at step 0, before the checkpoint of step 3"):
        recover(tmp_path, committed_step=3)


def test_a_record_that_contradicts_the_others_is_named(tmp_path: Path) -> None:
    queue = start(tmp_path)
    fill(queue, 0)
    queue.flush()
    journal = Journal(tmp_path)
    journal.append("add", b"not an entry")
    journal.close()
    with pytest.raises(JournalError, match="'add' at position"):
        recover(tmp_path, committed_step=-1)


def random_operations(queue: ExperienceQueue, seed: int, count: int) -> int:
    """Drives the queue at random; returns the last step that was trained."""
    choose = random.Random(seed)
    version, index = 0, 0
    for _ in range(count):
        action = choose.randrange(7)
        in_flight = queue.in_flight()
        if action == 0 and queue.admit(version) > 0:
            queue.open(header(index, choose.randint(1, 3), version), 0.0)
            index += 1
        elif action in (1, 2, 3) and in_flight:
            group = choose.choice(in_flight)
            status = choose.choice([Status.FINISHED] * 5 + [Status.SYSTEM_ERROR])
            versions = [choose.randint(group.header.version_floor, version) for _ in range(choose.randint(0, 3))]
            queue.add(entry(group.header.group_id, choose.choice(group.missing), versions, status=status), 0.0)
        elif action == 4 and in_flight:
            group = choose.choice(in_flight)
            queue.fail(group.header.group_id, choose.choice(group.missing), "environment", 0.0)
        elif action == 5 and choose.random() < 0.2 and index:
            queue.drop(f"g{choose.randrange(index)}", "cancelled")
        elif action == 6 and queue.ready_groups >= 2 and step(queue, version, limit=2):
            version += 1
            queue.expire(version)
    return version - 1


def drain(queue: ExperienceQueue, version: int) -> list[list[LeasedGroup]]:
    """Finishes what is in flight, then trains everything; what each step got."""
    for group in queue.in_flight():
        for episode_id in group.missing:
            queue.add(entry(group.header.group_id, episode_id, [max(version, 0)]), 0.0)
    steps = []
    while leased := step(queue, version):
        steps.append(leased)
        version += 1
    return steps


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 100_000), count=st.integers(0, 120))
def test_recovering_equals_continuing(seed: int, count: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    directory = tmp_path_factory.mktemp("journal")
    queue = start(directory)
    last_step = random_operations(queue, seed, count)
    queue.flush()
    again = recover(directory, last_step)
    again.ledger.check()
    assert again.ledger.snapshot() == queue.ledger.snapshot()
    assert again.ledger.token_snapshot() == queue.ledger.token_snapshot()
    assert again.ledger.length_distance() == queue.ledger.length_distance()
    assert again.in_flight() == queue.in_flight()
    assert again.bytes_used == queue.bytes_used
    assert drain(again, last_step + 1) == drain(queue, last_step + 1)
    assert again.ledger.snapshot() == queue.ledger.snapshot()


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 100_000), back=st.integers(0, 5))
def test_going_back_trains_the_same_steps_again(seed: int, back: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    directory = tmp_path_factory.mktemp("journal")
    queue = start(directory)
    last_step = random_operations(queue, seed, 150)
    committed = max(-1, last_step - back)
    queue.flush()
    again = recover(directory, committed)
    again.ledger.check()
    assert again.ledger.trained == queue.ledger.trained - sum(
        len(ack.groups) for ack in queue._state.uncommitted if ack.step > committed
    )
    for version in range(committed + 1, last_step + 1):
        expected = [g.group_id for ack in queue._state.uncommitted if ack.step == version for g in ack.groups]
        assert ids(step(again, version)) == expected
    assert again.ledger.snapshot() == queue.ledger.snapshot()
    assert again.ledger.token_snapshot() == queue.ledger.token_snapshot()
