"""Groups without signal are dropped and replaced: nothing is lost, nothing waits for ever."""

from __future__ import annotations

from pathlib import Path

from experience_builders import entry, header, make_queue
from hypothesis import given
from hypothesis import strategies as st

from experience.config import QueueConfig
from experience.journal import Journal
from experience.queue import ExperienceQueue
from experience.staleness import make_policy

REFILLING = QueueConfig(require_signal=True)


def finish(queue: ExperienceQueue, index: int, rewards: list[float | None]) -> list[tuple[str, str]]:
    """Opens group ``index`` and adds an episode for each reward; what happened, as kind and reason."""
    group = header(index, len(rewards))
    queue.open(group, 0.0)
    for episode_id, reward in zip(group.episode_ids, rewards, strict=True):
        queue.add(entry(group.group_id, episode_id, reward=reward), 0.0)
    return [(event.kind.value, event.reason) for event in queue.events()]


def test_a_group_whose_rewards_are_equal_is_returned_when_it_is_complete() -> None:
    queue = make_queue(config=REFILLING)
    assert finish(queue, 0, [1.0, 1.0]) == [("returned", "no_signal")]
    assert finish(queue, 1, [0.0, 1.0]) == [("ready", "")]
    assert finish(queue, 2, [None, 1.0]) == [("returned", "no_signal")]
    assert finish(queue, 3, [0.5]) == [("returned", "no_signal")]
    assert queue.ledger.snapshot() == {"dispatched": 4, "trained": 0, "dropped": {"no_signal": 3}, "live": 1}


def test_without_the_setting_they_are_delivered() -> None:
    assert finish(make_queue(), 0, [1.0, 1.0]) == [("ready", "")]


def test_a_group_closed_at_its_deadline_is_judged_by_what_it_has() -> None:
    queue = make_queue(config=QueueConfig(require_signal=True, close_after_s=5.0))
    group = header(0, 3)
    queue.open(group, 0.0)
    for episode_id in group.episode_ids[:2]:
        queue.add(entry("g0", episode_id, reward=0.0), 1.0)
    queue.close_due(6.0)
    returned = queue.events()
    assert [(event.kind.value, event.reason, event.episodes) for event in returned] == [
        ("returned", "no_signal", ["g0-2"])
    ]


def test_its_slot_is_free_again() -> None:
    queue = make_queue(groups_per_update=2, target_lag=0.0, config=REFILLING)
    assert queue.admit(0) == 2
    finish(queue, 0, [1.0, 1.0])
    finish(queue, 1, [0.0, 1.0])
    assert queue.admit(0) == 1


@given(st.lists(st.booleans(), min_size=1, max_size=40))
def test_refilling_ends_with_as_many_groups_as_the_step_needs(signals: list[bool]) -> None:
    """Whatever comes without signal: a dispatcher that follows `admit` fills the step as soon as enough have signal."""
    queue = make_queue(groups_per_update=2, target_lag=0.0, config=REFILLING)
    waiting = list(signals)
    index = 0
    while waiting and queue.admit(0) > 0:
        finish(queue, index, [0.0, 1.0] if waiting.pop(0) else [1.0, 1.0])
        index += 1
    ready = sum(signals[:index])
    assert queue.ready_groups == ready <= 2
    assert (queue.admit(0) == 0) == (ready == 2)
    snapshot = queue.ledger.snapshot()
    assert snapshot["dispatched"] == index == snapshot["live"] + sum(snapshot["dropped"].values())


def test_a_recovered_queue_remembers_what_it_dropped(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    queue = make_queue(config=REFILLING, journal=journal)
    finish(queue, 0, [1.0, 1.0])
    finish(queue, 1, [0.0, 1.0])
    queue.flush()
    journal.close()
    from experience.config import StalenessConfig

    policy = make_policy(StalenessConfig(), 2)
    again = ExperienceQueue.recover(REFILLING, policy, Journal(tmp_path), -1, 0.0)
    assert again.ledger.snapshot() == queue.ledger.snapshot()
    assert again.ready_groups == 1
