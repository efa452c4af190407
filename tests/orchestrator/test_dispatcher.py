from __future__ import annotations

from random import Random

from hypothesis import given, settings
from hypothesis import strategies as st

from experience.config import StalenessConfig
from experience.records import Task
from experience.staleness import make_policy
from orchestrator.dispatcher import Dispatcher, seed_of


def make_dispatcher(target_lag: float = 1.0, groups: int = 4, total: int = 100) -> Dispatcher:
    policy = make_policy(StalenessConfig(target_lag=target_lag), groups)
    return Dispatcher(policy, lambda index: Task(task_id=f"t{index}", environment="e", payload={}), 2, total, seed=3)


def test_pacing_decides_when_and_load_decides_where() -> None:
    dispatcher = make_dispatcher(target_lag=0.5)
    dispatcher.worker_joined("a")
    dispatcher.worker_joined("b")
    started = dispatcher.due()
    assert len(started) == 6
    assert sorted(worker for worker, _ in started) == ["a", "a", "a", "b", "b", "b"]
    assert dispatcher.due() == []
    dispatcher.version_served(1)
    assert [header.index for _, header in dispatcher.due()] == [6, 7, 8, 9]
    assert dispatcher.paced


def test_versions_that_are_not_published_pace_too_and_engines_are_not_taken_for_newer_than_they_are() -> None:
    """``weights.every`` > 1: without this the learner would wait for groups that wait for a version."""
    dispatcher = make_dispatcher(target_lag=0.0)
    dispatcher.worker_joined("a")
    assert len(dispatcher.due()) == 4
    dispatcher.trained(1)
    assert [(header.index, header.version_floor) for _, header in dispatcher.due()] == [(4, 0), (5, 0), (6, 0), (7, 0)]
    dispatcher.version_served(2)
    assert {header.version_floor for _, header in dispatcher.due()} == {2}


def test_a_returned_group_gives_its_slot_back() -> None:
    dispatcher = make_dispatcher(target_lag=0.0)
    dispatcher.worker_joined("a")
    first = dispatcher.due()[0][1]
    dispatcher.returned(first.group_id)
    again = dispatcher.due()
    assert [header.index for _, header in again] == [4]
    assert again[0][1].version_floor == 0


def test_the_groups_of_a_lost_worker_go_to_another_one_and_are_not_started_twice() -> None:
    dispatcher = make_dispatcher(target_lag=0.0)
    dispatcher.worker_joined("a")
    started = [header.group_id for _, header in dispatcher.due()]
    dispatcher.finished(started[0])
    lost = dispatcher.worker_lost("a")
    assert [header.group_id for header in lost] == started[1:]
    assert dispatcher.adopt() == []
    assert dispatcher.in_flight == 3
    dispatcher.worker_joined("b")
    assert [(worker, header.group_id) for worker, header in dispatcher.adopt()] == [
        ("b", group) for group in started[1:]
    ]
    assert dispatcher.due() == []
    assert dispatcher.oldest_in_flight(1) == [f"{started[1]} on b"]


def test_nothing_is_started_that_the_run_cannot_train() -> None:
    dispatcher = make_dispatcher(target_lag=5.0, total=6)
    dispatcher.worker_joined("a")
    assert len(dispatcher.due()) == 6
    assert dispatcher.exhausted
    dispatcher.returned("g000000")
    assert len(dispatcher.due()) == 1


def test_seeds_depend_on_seed_purpose_and_index_alone() -> None:
    assert seed_of(0, "train", 1) == seed_of(0, "train", 1)
    assert len({seed_of(s, p, i) for s in (0, 1) for p in ("train", "evaluate") for i in (0, 1)}) == 8
    assert 0 <= seed_of(1, "train", 2) < 2**63


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.floats(0, 3), st.integers(1, 5))
def test_pacing_never_exceeds_its_formula_and_never_wedges(seed: int, lag: float, groups: int) -> None:
    random, dispatcher = Random(seed), make_dispatcher(lag, groups, total=10 * groups)
    dispatcher.worker_joined("a")
    version, trained, live = 0, 0, []
    while trained < 10 * groups:
        live += [header.group_id for _, header in dispatcher.due()]
        assert dispatcher.dispatched - dispatcher.slots_returned <= -(-(version + 1 + lag) * groups // 1)
        assert live, "nothing in flight and nothing may start"
        group = live.pop(random.randrange(len(live)))
        if random.random() < 0.1:
            dispatcher.returned(group)
            continue
        dispatcher.finished(group)
        trained += 1
        if trained % groups == 0:
            version += 1
            dispatcher.version_served(version)
    assert dispatcher.exhausted
