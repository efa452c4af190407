from __future__ import annotations

import doctest
import random
from fractions import Fraction

import numpy as np
import pytest
from experience_builders import entry, header, make_queue, trajectory
from hypothesis import given, settings
from hypothesis import strategies as st

from experience import staleness
from experience.config import OnViolation, QueueConfig, QueueOrder
from experience.entries import LeasedGroup
from experience.queue import ExperienceQueue
from experience.staleness import Pacing, Progress, loss_mask


def test_the_example_in_the_docstring_holds() -> None:
    assert doctest.testmod(staleness).failed == 0


@given(
    groups=st.integers(1, 64),
    target_lag=st.integers(0, 64).map(lambda n: n / 8),
    version=st.integers(0, 100),
    dispatched=st.integers(0, 10_000),
    returned=st.integers(0, 500),
)
def test_pacing_is_exactly_its_formula(
    groups: int, target_lag: float, version: int, dispatched: int, returned: int
) -> None:
    pacing = Pacing(groups, target_lag)
    limit = (version + 1 + Fraction(target_lag)) * groups
    assert pacing.may_dispatch(dispatched, returned, version) == (dispatched - returned < limit)
    room = pacing.room(dispatched, returned, version)
    for started in range(min(room, 3)):
        assert pacing.may_dispatch(dispatched + room - 1 - started, returned, version)
    assert not pacing.may_dispatch(dispatched + room, returned, version)


@pytest.mark.parametrize("target_lag", [0.0, 0.5, 1.0])
def test_pacing_at_the_start_of_a_run(target_lag: float) -> None:
    assert Pacing(16, target_lag).room(0, 0, 0) == 16 + 16 * target_lag


def test_a_returned_group_frees_its_slot() -> None:
    pacing = Pacing(2, 0.0)
    assert not pacing.may_dispatch(dispatched=2, returned=0, version=0)
    assert pacing.may_dispatch(dispatched=2, returned=1, version=0)
    assert make_queue(2, 0.0).admit(0) == staleness.MaskTokens(pacing, 4).admit(Progress(0, 0, 0)) == 2


@given(versions=st.lists(st.integers(0, 30), max_size=20), version=st.integers(0, 30), max_lag=st.integers(0, 10))
def test_loss_is_carried_exactly_by_sampled_tokens_within_the_bound(
    versions: list[int], version: int, max_lag: int
) -> None:
    record = trajectory("g0", "g0-0", versions, padding=3)
    mask = loss_mask(record, version, max_lag)
    assert mask.dtype == np.bool_
    assert mask.tolist() == [False, False] + [version - v <= max_lag for v in versions] + [False] * 3


def test_a_token_without_a_version_never_carries_loss() -> None:
    record = trajectory("g0", "g0-0", [0, 0])
    record.trainable = np.ones_like(record.trainable)
    assert loss_mask(record, 0, 5).tolist() == [False, False, True, True]


class Simulation:
    """Dispatcher, workers, engines and learner around a real queue; durations, lags and failures are random."""

    def __init__(self, queue: ExperienceQueue, seed: int, groups_per_update: int, max_lag: int, target_lag: float):
        self.queue, self.random = queue, random.Random(seed)
        self.groups_per_update, self.max_lag = groups_per_update, max_lag
        self.pacing = Pacing(groups_per_update, target_lag)
        self.learner = self.engine = self.index = 0
        self.running: list[tuple[str, str, int]] = []
        self.lags: list[int] = []

    def dispatch(self) -> None:
        while self.queue.admit(self.engine) > 0:
            group = header(self.index, size=self.random.randint(1, 3), version_floor=self.engine)
            self.queue.open(group, 0.0)
            self.running += [(group.group_id, episode_id, self.engine) for episode_id in group.episode_ids]
            self.index += 1
            assert self.queue.ledger.dispatched - self.queue.ledger.returned <= self.pacing.limit(self.engine)

    def finish_one(self) -> None:
        # Squaring makes a heavy tail: the oldest episodes tend to stay longest.
        place = len(self.running) - 1 - int(len(self.running) * self.random.random() ** 2)
        group_id, episode_id, begun = self.running.pop(place)
        if self.random.random() < 0.1:
            self.queue.fail(group_id, episode_id, "environment", 0.0)
            return
        versions = [self.random.randint(begun, self.engine) for _ in range(self.random.randint(1, 3))]
        self.queue.add(entry(group_id, episode_id, versions), 0.0)

    def step(self) -> None:
        """One learner step; fails when no progress is possible any more."""
        taken: list[LeasedGroup] = []
        for _ in range(1000):
            if len(taken) == self.groups_per_update:
                break
            leased = self.queue.lease("learner", self.groups_per_update - len(taken), self.learner, 0.0)
            taken += leased
            self.lags += [
                self.learner - e.oldest_version for g in leased for e in g.episodes if e.oldest_version is not None
            ]
            self.engine = self.learner if self.random.random() < 0.7 else self.engine
            self.dispatch()
            if self.running and (not leased or self.random.random() < 0.5):
                self.finish_one()
            elif not leased:
                # Nothing to wait for: dispatching must go on once the engines have caught up.
                self.engine = self.learner
                assert self.queue.admit(self.engine) > 0 or self.queue.ready_groups > 0, "wedged"
        assert len(taken) == self.groups_per_update, "wedged"
        tokens = sum(group.tokens for group in taken)
        group_ids = [group.group_id for group in taken]
        self.queue.ack(group_ids, step=self.learner, trained_tokens=tokens, masked_tokens=0)
        self.queue.ledger.check()
        self.learner += 1


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    groups_per_update=st.integers(1, 5),
    max_lag=st.integers(0, 3),
    slack=st.sampled_from([0.0, 0.25, 0.5, 1.0]),
    order=st.sampled_from(QueueOrder),
    window=st.integers(1, 6),
)
def test_waiting_keeps_every_token_within_the_bound_and_never_wedges(
    seed: int, groups_per_update: int, max_lag: int, slack: float, order: QueueOrder, window: int
) -> None:
    target_lag = max(0.0, max_lag - slack)
    config = QueueConfig(order=order, window=window, min_size=1, journal=False)
    queue = make_queue(groups_per_update, target_lag, max_lag, OnViolation.wait, config)
    simulation = Simulation(queue, seed, groups_per_update, max_lag, target_lag)
    for _ in range(25):
        simulation.step()
    assert max(simulation.lags) <= max_lag
    assert not any(reason in queue.ledger.dropped for reason in ("stale", "empty"))


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_dropping_keeps_every_token_within_the_bound(seed: int) -> None:
    queue = make_queue(3, 4.0, 1, OnViolation.drop_group, QueueConfig(min_size=1))
    simulation = Simulation(queue, seed, 3, 1, 4.0)
    for _ in range(25):
        simulation.step()
    assert max(simulation.lags) <= 1
    assert queue.ledger.dropped["stale"] > 0


def test_masking_alone_lets_old_tokens_in_as_context() -> None:
    queue = make_queue(3, 4.0, 1, OnViolation.mask_tokens, QueueConfig(min_size=1))
    simulation = Simulation(queue, 0, 3, 1, 4.0)
    for _ in range(25):
        simulation.step()
    assert max(simulation.lags) > 1


def test_sync_mode_is_on_policy_for_every_token() -> None:
    queue = make_queue(4, 0.0, 0, OnViolation.wait, QueueConfig(min_size=1))
    simulation = Simulation(queue, 7, 4, 0, 0.0)
    for _ in range(30):
        simulation.step()
    assert set(simulation.lags) == {0}
