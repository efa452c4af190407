from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from weight_sync.errors import TransitionError
from weight_sync.publication import Action, Phase, Publication


def to_stage(publication: Publication, version: int, members: list[str]) -> None:
    publication.offer(version)
    assert publication.actions() == [Action(Phase.ANNOUNCE, version)]
    publication.announced(members)
    assert publication.actions() == [Action(Phase.EXPIRE, version)]
    publication.expired()


def test_the_phases_follow_each_other_and_rolling_commits_one_by_one() -> None:
    publication = Publication()
    to_stage(publication, 1, ["a", "b"])
    assert publication.actions() == [Action(Phase.STAGE, 1, ("a", "b"))]
    publication.staged("a")
    assert publication.actions() == []
    assert publication.current == 0
    publication.staged("b")
    assert publication.current == 1
    assert publication.actions() == [Action(Phase.COMMIT, 1, ("a",))]
    assert publication.actions() == []
    publication.committed("a")
    assert publication.actions() == [Action(Phase.COMMIT, 1, ("b",))]
    publication.committed("b")
    assert publication.phase is Phase.IDLE
    assert publication.completed == 1


def test_all_together_when_not_rolling() -> None:
    publication = Publication(rolling=False)
    to_stage(publication, 1, ["a", "b"])
    publication.actions()
    publication.staged("b")
    publication.staged("a")
    assert publication.actions() == [Action(Phase.COMMIT, 1, ("a", "b"))]


def test_a_newer_version_supersedes_the_one_that_waits() -> None:
    publication = Publication()
    to_stage(publication, 1, ["a"])
    publication.offer(2)
    publication.offer(3)
    assert (publication.waiting, publication.superseded) == (3, 1)
    publication.staged("a")
    publication.actions()
    publication.committed("a")
    assert publication.actions() == [Action(Phase.ANNOUNCE, 3)]


def test_the_publication_goes_on_without_the_dead_also_with_nobody() -> None:
    publication = Publication()
    to_stage(publication, 1, ["a", "b"])
    publication.died("a")
    assert publication.actions() == [Action(Phase.STAGE, 1, ("b",))]
    publication.died("b")
    assert publication.phase is Phase.IDLE
    assert publication.current == 1


def test_a_member_that_dies_between_its_commits_frees_the_next() -> None:
    publication = Publication()
    to_stage(publication, 1, ["a", "b"])
    publication.actions()
    publication.staged("a")
    publication.staged("b")
    publication.actions()
    publication.died("a")
    assert publication.actions() == [Action(Phase.COMMIT, 1, ("b",))]
    publication.committed("a")
    publication.committed("b")
    assert publication.phase is Phase.IDLE


def test_an_action_for_a_member_that_died_before_it_was_handed_out_is_gone() -> None:
    publication = Publication()
    to_stage(publication, 1, ["a", "b"])
    publication.actions()
    publication.staged("a")
    publication.staged("b")
    publication.died("a")
    assert publication.actions() == [Action(Phase.COMMIT, 1, ("b",))]


def test_a_broken_transfer_is_repeated_for_those_without_the_version() -> None:
    publication = Publication(max_transfers=2)
    to_stage(publication, 1, ["a", "b", "c"])
    publication.actions()
    publication.staged("a")
    publication.died("b")
    publication.transfer_failed("connection reset")
    assert publication.actions() == [Action(Phase.STAGE, 1, ("c",))]
    with pytest.raises(TransitionError, match=r"version 1 could not be moved to \['c'\] in 2 transfers"):
        publication.transfer_failed("connection reset")


@pytest.mark.parametrize("version", [0, 1, 2])
def test_an_old_version_is_refused(version: int) -> None:
    publication = Publication()
    publication.offer(1)
    publication.offer(2)
    with pytest.raises(TransitionError, match=f"offer of version {version} refused: version 2"):
        publication.offer(version)


def test_answers_out_of_turn_are_refused() -> None:
    publication = Publication()
    with pytest.raises(TransitionError, match="expired refused: the publication of version None is in phase idle"):
        publication.expired()
    publication.offer(1)
    with pytest.raises(TransitionError, match="staged refused: the publication of version 1 is in phase announce"):
        publication.staged("a")


class PublicationMachine(RuleBasedStateMachine):
    """Random versions, members, deaths and broken transfers; every action is answered sooner or later."""

    def __init__(self) -> None:
        super().__init__()
        self.publication = Publication(max_transfers=10_000)
        self.alive = {"a", "b", "c"}
        self.staging: set[str] = set()
        self.committing: set[str] = set()
        self.todo: list[Phase] = []
        self.held: dict[str, int] = {}
        self.newest = 0
        self.commits: list[int] = []

    def carry_out(self) -> None:
        for action in self.publication.actions():
            assert action.version == self.publication.version
            assert set(action.members) <= self.alive
            if action.kind is Phase.STAGE:
                self.staging = set(action.members)
            elif action.kind is Phase.COMMIT:
                assert len(action.members) == 1
                assert not self.committing & self.alive
                assert all(self.held[m] == action.version for m in action.members), "committed without its weights"
                self.committing = set(action.members)
                self.commits.append(action.version)
            else:
                self.todo.append(action.kind)

    @rule(step=st.integers(1, 3))
    def offer(self, step: int) -> None:
        self.newest += step
        self.publication.offer(self.newest)
        self.carry_out()

    @precondition(lambda self: self.todo)
    @rule()
    def answer(self) -> None:
        if self.todo.pop(0) is Phase.ANNOUNCE:
            self.publication.announced(sorted(self.alive))
        else:
            self.publication.expired()
        self.carry_out()

    @precondition(lambda self: self.staging & self.alive)
    @rule()
    def stage(self) -> None:
        member = min(self.staging & self.alive)
        self.staging.discard(member)
        version = self.publication.version
        assert version is not None
        self.held[member] = version
        self.publication.staged(member)
        self.carry_out()

    @precondition(lambda self: self.staging & self.alive)
    @rule()
    def break_transfer(self) -> None:
        self.publication.transfer_failed("broken on purpose")
        self.carry_out()

    @precondition(lambda self: self.committing & self.alive)
    @rule()
    def commit(self) -> None:
        member = min(self.committing & self.alive)
        self.committing.discard(member)
        self.publication.committed(member)
        self.carry_out()

    @precondition(lambda self: self.alive)
    @rule(data=st.data())
    def die(self, data: st.DataObject) -> None:
        member = data.draw(st.sampled_from(sorted(self.alive)))
        self.alive.discard(member)
        self.publication.died(member)
        self.carry_out()

    @rule(name=st.sampled_from(["a", "b", "c"]))
    def rejoin(self, name: str) -> None:
        if name not in self.alive and name not in self.publication.members:
            self.alive.add(name)
            self.staging.discard(name)
            self.committing.discard(name)

    @invariant()
    def versions_only_grow(self) -> None:
        assert self.commits == sorted(self.commits)
        assert self.publication.current <= self.newest

    @invariant()
    def somebody_is_always_asked(self) -> None:
        if self.publication.phase is Phase.IDLE:
            assert self.publication.waiting is None
            assert self.publication.current == self.newest
        else:
            assert self.todo or self.staging & self.alive or self.committing & self.alive


TestPublicationMachine = PublicationMachine.TestCase
TestPublicationMachine.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
