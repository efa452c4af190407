"""Random sequences of operations on the queue: its invariants hold after every one, and none of them wedges it."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import pytest
from experience_builders import entry, header
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from experience import wire
from experience.config import OnViolation, QueueConfig, QueueOrder, StalenessConfig
from experience.entries import Added, EpisodeEntry, EventKind, LeasedGroup
from experience.journal import Journal
from experience.queue import ExperienceQueue
from experience.staleness import loss_mask, make_policy

CONSUMER = "learner"


class QueueMachine(RuleBasedStateMachine):
    """Dispatcher, workers and a learner, each doing at any moment anything that its contract allows."""

    @initialize(
        on_violation=st.sampled_from(OnViolation),
        order=st.sampled_from(QueueOrder),
        window=st.integers(1, 4),
        groups_per_update=st.integers(1, 3),
        max_lag=st.integers(0, 2),
        lag_share=st.sampled_from([0.0, 0.5, 1.0]),
        budget_bytes=st.sampled_from([1, 3000, 1 << 30]),
        min_size=st.integers(1, 3),
        close_after_s=st.none() | st.integers(1, 20),
    )
    def begin(
        self,
        on_violation: OnViolation,
        order: QueueOrder,
        window: int,
        groups_per_update: int,
        max_lag: int,
        lag_share: float,
        budget_bytes: int,
        min_size: int,
        close_after_s: int | None,
    ) -> None:
        self.directory = Path(tempfile.mkdtemp())
        self.staleness = StalenessConfig(target_lag=max_lag * lag_share, max_lag=max_lag, on_violation=on_violation)
        self.config = QueueConfig(
            order=order,
            window=window,
            budget_mb=budget_bytes / (1 << 20),
            min_size=min_size,
            close_after_s=close_after_s,
        )
        self.config.validate()
        self.staleness.validate()
        self.groups_per_update = groups_per_update
        self.policy = make_policy(self.staleness, groups_per_update)
        self.journal = Journal(self.directory, segment_bytes=2000)
        self.queue = ExperienceQueue(self.config, self.policy, journal=self.journal)
        self.now = 0.0
        self.version = 0
        self.engine = 0
        self.live: set[str] = set()
        self.floors: dict[str, int] = {}
        self.dropped: dict[str, str] = {}
        self.trained: dict[str, int] = {}
        self.arrived: dict[str, EpisodeEntry] = {}
        self.taken: list[LeasedGroup] = []
        self.owed: set[str] = set()
        self.refused = False
        self.generated = 0

    # The dispatcher

    @precondition(lambda self: self.queue.admit(self.engine) > 0)
    @rule(size=st.integers(1, 3))
    def dispatch(self, size: int) -> None:
        group = header(self.queue.next_index, size, self.engine)
        self.queue.open(group, self.now)
        self.live.add(group.group_id)
        self.floors[group.group_id] = self.engine
        limit = (self.engine + 1 + self.staleness.target_lag) * self.groups_per_update
        assert len(self.floors) - len(self.dropped) - 1 < limit

    @precondition(lambda self: self.queue.admit(self.engine) == 0)
    @rule()
    def pacing_is_not_too_strict(self) -> None:
        limit = (self.engine + 1 + self.staleness.target_lag) * self.groups_per_update
        assert len(self.floors) - len(self.dropped) >= limit

    @rule(data=st.data())
    def give_up_a_group(self, data: st.DataObject) -> None:
        group_id = f"g{data.draw(st.integers(0, self.queue.next_index))}"
        was_live = group_id in self.live
        self.taken = [group for group in self.taken if group.group_id != group_id]
        assert self.queue.drop(group_id, "cancelled") == was_live

    # The workers

    @precondition(lambda self: self.queue.in_flight())
    @rule(data=st.data(), tokens=st.integers(0, 3), padding=st.integers(0, 100))
    def finish_an_episode(self, data: st.DataObject, tokens: int, padding: int) -> None:
        group = data.draw(st.sampled_from(self.queue.in_flight()))
        group_id, episode_id = group.header.group_id, data.draw(st.sampled_from(group.missing))
        versions = [data.draw(st.integers(self.floors[group_id], self.engine)) for _ in range(tokens)]
        self.offer(entry(group_id, episode_id, versions, padding))

    def finish_one(self, group_id: str) -> bool:
        """The first missing episode of a group arrives, if the budget allows it."""
        missing = [e for group in self.queue.in_flight() if group.header.group_id == group_id for e in group.missing]
        return bool(missing) and self.offer(entry(group_id, missing[0], [self.engine]))

    def offer(self, episode: EpisodeEntry) -> bool:
        busy = self.queue.ready_groups + self.queue.leased_groups
        added = self.queue.add(episode, self.now)
        if added is Added.FULL:
            assert busy, "refused although nothing will make room"
            assert self.queue.bytes_used + episode.size_bytes > self.config.budget_mb * (1 << 20)
            self.refused = True
            return False
        assert added is Added.ACCEPTED
        self.arrived[episode.episode_id] = episode
        self.generated += episode.tokens
        return True

    @precondition(lambda self: self.arrived)
    @rule(data=st.data())
    def deliver_an_episode_again(self, data: st.DataObject) -> None:
        episode = self.arrived[data.draw(st.sampled_from(sorted(self.arrived)))]
        assert self.queue.add(episode, self.now) is Added.DUPLICATE

    @precondition(lambda self: self.dropped)
    @rule(data=st.data())
    def finish_an_episode_of_a_dropped_group(self, data: st.DataObject) -> None:
        group_id = data.draw(st.sampled_from(sorted(self.dropped)))
        episode_id = f"{group_id}-0"
        expected = Added.DUPLICATE if episode_id in self.arrived else Added.UNKNOWN
        episode = entry(group_id, episode_id, [self.engine])
        assert self.queue.add(episode, self.now) is expected
        if expected is Added.UNKNOWN:
            self.arrived[episode_id] = episode
            self.generated += episode.tokens

    @precondition(lambda self: self.queue.in_flight())
    @rule(data=st.data())
    def give_up_an_episode(self, data: st.DataObject) -> None:
        group = data.draw(st.sampled_from(self.queue.in_flight()))
        episode_id = data.draw(st.sampled_from(group.missing))
        assert self.queue.fail(group.header.group_id, episode_id, "environment", self.now)

    @rule(seconds=st.integers(1, 10))
    def let_time_pass(self, seconds: int) -> None:
        self.now += seconds
        deadline = self.queue.next_deadline()
        closed = self.queue.close_due(self.now)
        assert bool(closed) == (deadline is not None and deadline <= self.now)

    # The learner and the engines

    @rule(data=st.data())
    def lease(self, data: st.DataObject) -> None:
        remaining = self.groups_per_update - len(self.taken)
        self.take(data.draw(st.integers(0, remaining)))

    def take(self, limit: int) -> int:
        before = {group.header.group_id for group in self.queue.in_flight()}
        undelivered = sorted(self.live - {group.group_id for group in self.taken}, key=index_of)
        ready = [group_id for group_id in undelivered if group_id not in before]
        leased = self.queue.lease(CONSUMER, limit, self.version, self.now)
        self.note_events()
        assert len(leased) <= limit
        for group in leased:
            self.check_delivery(group)
        self.check_order([group.group_id for group in leased], ready, undelivered)
        self.taken += leased
        self.owed -= {group.group_id for group in leased}
        return len(leased)

    def check_delivery(self, group: LeasedGroup) -> None:
        assert group.group_id in self.live
        assert group.group_id not in {taken.group_id for taken in self.taken}, "delivered twice"
        assert [self.arrived[e.episode_id] for e in group.episodes] == group.episodes
        lags = [self.version - e.oldest_version for e in group.episodes if e.oldest_version is not None]
        youngest = [self.version - e.newest_version for e in group.episodes if e.newest_version is not None]
        assert min(youngest) <= self.staleness.max_lag, "nothing of the group may carry loss"
        if self.staleness.on_violation is not OnViolation.mask_tokens:
            assert max(lags) <= self.staleness.max_lag

    def check_order(self, leased: list[str], ready: list[str], undelivered: list[str]) -> None:
        """``ready``: what was ready before, in dispatch order; what staleness dropped on the way does not count."""
        if self.config.order is QueueOrder.windowed:
            for group_id in leased:
                remaining = [g for g in undelivered if g in self.live]
                assert index_of(group_id) < index_of(remaining[0]) + self.config.window
                undelivered = [g for g in undelivered if g != group_id]
        if self.staleness.on_violation is OnViolation.wait:
            return
        if self.config.order is not QueueOrder.ready_first:
            eligible = [group_id for group_id in ready if group_id in self.live]
            assert leased == eligible[: len(leased)]

    @rule()
    def lose_the_consumer(self) -> None:
        released = self.queue.release(CONSUMER)
        assert sorted(released) == sorted(group.group_id for group in self.taken)
        self.owed |= set(released)
        self.taken = []

    @precondition(lambda self: len(self.taken) == self.groups_per_update)
    @rule(expire=st.booleans())
    def train(self, expire: bool) -> None:
        self.acknowledge()
        self.version += 1
        if expire:
            self.queue.expire(self.version)

    def acknowledge(self) -> None:
        tokens, trained = sum(group.tokens for group in self.taken), 0
        for group in self.taken:
            for trajectory in wire.decode_group(group.encode()).trajectories:
                mask = loss_mask(trajectory, self.version, self.staleness.max_lag)
                assert (self.version - trajectory.versions[mask] <= self.staleness.max_lag).all()
                trained += int(mask.sum())
        group_ids = [group.group_id for group in self.taken]
        for _ in range(2):
            self.queue.ack(group_ids, step=self.version, trained_tokens=trained, masked_tokens=tokens - trained)
        for group_id in group_ids:
            assert group_id not in self.trained, "trained twice"
            self.trained[group_id] = self.version
            self.live.remove(group_id)
        self.taken = []

    @precondition(lambda self: self.engine < self.version)
    @rule()
    def update_the_engines(self) -> None:
        self.engine = self.version

    @rule()
    def restart_the_queue(self) -> None:
        """The queue's process dies; the learner goes on from the step it had finished."""
        before = (self.queue.ledger.snapshot(), self.queue.ledger.token_snapshot(), self.queue.in_flight())
        self.note_events()
        self.journal.close()
        self.journal = Journal(self.directory, segment_bytes=2000)
        self.queue = ExperienceQueue.recover(self.config, self.policy, self.journal, self.version - 1, self.now)
        assert before == (self.queue.ledger.snapshot(), self.queue.ledger.token_snapshot(), self.queue.in_flight())
        self.owed |= {group.group_id for group in self.taken}
        self.taken, self.refused = [], False

    # What holds at every moment

    @invariant()
    def every_group_is_somewhere_exactly_once(self) -> None:
        self.note_events()
        ledger = self.queue.ledger
        ledger.check()
        assert ledger.dispatched == len(self.floors)
        assert ledger.trained == len(self.trained)
        assert ledger.returned == len(self.dropped)
        assert ledger.live == len(self.live)
        assert set(self.floors) == self.live | set(self.trained) | set(self.dropped)
        assert ledger.token_snapshot()["generated"] == self.generated
        in_queue = len(self.queue.in_flight()) + self.queue.ready_groups + self.queue.leased_groups
        assert in_queue == len(self.live)

    def note_events(self) -> None:
        for event in self.queue.events():
            if event.kind is EventKind.RETURNED:
                assert event.group_id in self.live, "dropped twice"
                assert event.reason
                self.live.remove(event.group_id)
                self.dropped[event.group_id] = event.reason
                self.owed.discard(event.group_id)
                if self.staleness.on_violation is OnViolation.wait:
                    assert event.reason != "stale"
            if event.kind is EventKind.SPACE:
                assert self.refused
                self.refused = False

    def teardown(self) -> None:
        """Whatever happened, finishing the episodes and training empties the queue."""
        if not hasattr(self, "queue"):
            return
        for _ in range(20 * len(self.floors) + 20):
            if not self.live:
                break
            self.engine = self.version
            progress = sum(self.finish_one(group.header.group_id) for group in self.queue.in_flight())
            progress += self.take(self.groups_per_update - len(self.taken))
            if len(self.taken) == self.groups_per_update or (not progress and self.taken):
                self.acknowledge()
                self.version += 1
        self.note_events()
        assert not self.live, "wedged"
        assert self.queue.bytes_used == 0
        assert not self.owed, "a returned lease was never delivered again"
        self.queue.ledger.check()
        self.journal.close()
        shutil.rmtree(self.directory)


def index_of(group_id: str) -> int:
    return int(group_id[1:])


QueueMachine.TestCase.settings = settings(
    max_examples=150, stateful_step_count=60, deadline=None, suppress_health_check=list(HealthCheck)
)
TestQueueMachine = pytest.mark.timeout(120)(QueueMachine.TestCase)
