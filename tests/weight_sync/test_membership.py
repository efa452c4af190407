from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from weight_sync.errors import TransitionError
from weight_sync.membership import Membership, MemberState


def serving_member(membership: Membership, name: str) -> None:
    membership.join(name)
    assert membership.loaded(name, membership.begin_load(name))


def test_an_engine_serves_only_after_it_has_loaded() -> None:
    membership = Membership(current_version=4)
    membership.join("e0")
    assert membership.serving() == []
    assert membership.begin_load("e0") == 4
    assert membership.serving() == []
    assert membership.loaded("e0", 4)
    assert membership.serving() == ["e0"]
    assert membership.oldest_served() == 4


def test_a_version_published_while_loading_must_be_loaded_again() -> None:
    membership = Membership()
    membership.join("e0")
    membership.begin_load("e0")
    membership.advance(1)
    assert membership.loaded("e0", 0) is False
    assert membership.get("e0").state is MemberState.LOADING
    assert membership.begin_load("e0") == 1
    assert membership.loaded("e0", 1)


def test_a_rebuilt_engine_starts_without_weights() -> None:
    membership = Membership()
    serving_member(membership, "e0")
    assert membership.died("e0")
    assert membership.died("e0") is False
    assert membership.serving() == []
    membership.advance(9)
    again = membership.join("e0")
    assert (again.version, again.incarnation) == (None, 1)
    assert membership.begin_load("e0") == 9


def test_a_draining_member_still_counts_as_sampling() -> None:
    membership = Membership()
    serving_member(membership, "old")
    serving_member(membership, "new")
    membership.drain("old")
    membership.advance(1)
    membership.switched("new", 1)
    assert membership.serving() == ["new"]
    assert membership.oldest_served() == 0
    membership.died("old")
    assert membership.oldest_served() == 1


def test_an_update_reaches_who_samples_and_nobody_else() -> None:
    membership = Membership()
    for name in ("serves", "drains"):
        serving_member(membership, name)
    membership.drain("drains")
    membership.join("starts")
    membership.join("gives up loading")
    membership.begin_load("gives up loading")
    membership.drain("gives up loading")
    assert membership.sampling() == ["serves", "drains"]
    membership.advance(1)
    assert membership.oldest_served() == 0
    membership.switched("drains", 1)
    with pytest.raises(TransitionError, match=r"engine gives up loading is draining .version None.: switched refused"):
        membership.switched("gives up loading", 1)
    assert membership.knows("starts")
    assert not membership.knows("nobody")


@pytest.mark.parametrize(
    ("event", "message"),
    [
        (lambda m: m.loaded("starting", 0), "engine starting is starting .*: loaded refused"),
        (lambda m: m.switched("starting", 0), "switched refused"),
        (lambda m: m.join("serving"), "engine serving is serving .*: join refused"),
        (lambda m: m.begin_load("serving"), "begin_load refused"),
        (lambda m: m.drain("dead"), "engine dead is dead .*: drain refused"),
        (lambda m: m.drain("nobody"), "no engine is called 'nobody'"),
        (lambda m: m.switched("serving", 1), "cannot go back from version 2 to 1"),
        (lambda m: m.advance(1), "cannot go back from 2 to 1"),
    ],
)
def test_refused_transitions_name_state_and_event(event: object, message: str) -> None:
    membership = Membership(current_version=2)
    membership.join("starting")
    serving_member(membership, "serving")
    membership.join("dead")
    membership.died("dead")
    with pytest.raises(TransitionError, match=message):
        event(membership)  # type: ignore[operator]


NAMES = st.sampled_from(["a", "b", "c"])


class MembershipMachine(RuleBasedStateMachine):
    """Any sequence of events, refused ones included: nobody serves a version that was old when it joined."""

    def __init__(self) -> None:
        super().__init__()
        self.membership = Membership()
        self.floor: dict[str, int] = {}

    def attempt(self, event: str, *args: object) -> object:
        try:
            return getattr(self.membership, event)(*args)
        except TransitionError:
            return None

    @rule(name=NAMES, event=st.sampled_from(["join", "begin_load", "drain", "died"]))
    def plain_event(self, name: str, event: str) -> None:
        self.attempt(event, name)

    @rule(name=NAMES, behind=st.integers(0, 2))
    def report_loaded(self, name: str, behind: int) -> None:
        current = self.membership.current_version
        if self.attempt("loaded", name, current - behind):
            assert behind == 0
            self.floor[name] = current

    @rule()
    def publish(self) -> None:
        self.membership.advance(self.membership.current_version + 1)

    @rule(name=NAMES)
    def switch(self, name: str) -> None:
        self.attempt("switched", name, self.membership.current_version)

    @invariant()
    def serving_members_hold_what_was_current_when_they_joined(self) -> None:
        for name in self.membership.serving():
            version = self.membership.get(name).version
            assert version is not None
            assert version >= self.floor[name]
        oldest = self.membership.oldest_served()
        assert oldest is None or oldest <= self.membership.current_version

    @invariant()
    def who_samples_holds_a_version_that_existed(self) -> None:
        sampling = self.membership.sampling()
        assert set(self.membership.serving()) <= set(sampling) <= set(self.membership.alive())
        for name in sampling:
            member = self.membership.get(name)
            assert member.state in (MemberState.SERVING, MemberState.DRAINING)
            assert member.version is not None
            assert member.version <= self.membership.current_version


TestMembershipMachine = MembershipMachine.TestCase
TestMembershipMachine.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
