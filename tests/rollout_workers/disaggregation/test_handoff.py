"""One hand-off as both sides see it, with either side dying at any moment."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from rollout_workers.disaggregation.handoff import Handoff, HandoffError, HandoffState, Reason

TOKEN_BYTES = 8


def test_pieces_must_be_in_order_without_gaps_and_of_one_version() -> None:
    handoff = Handoff("h", version=3, total=100)
    with pytest.raises(HandoffError, match="announced: moved refused"):
        handoff.moved(0, 10, 3, 80)
    handoff.accepted(20)
    for start, end in ((0, 30), (30, 40), (20, 20), (20, 101)):
        with pytest.raises(HandoffError, match=r"after 20 of 100"):
            handoff.moved(start, end, 3, 80)
    with pytest.raises(HandoffError, match="of version 3, a piece of 4"):
        handoff.moved(20, 30, 4, 80)
    handoff.moved(20, 60, 3, 320)
    with pytest.raises(HandoffError, match="finished after 60 of 100"):
        handoff.finish()


def test_what_the_decode_side_holds_already_does_not_move() -> None:
    handoff = Handoff("h", version=0, total=10)
    handoff.accepted(10)
    handoff.finish()
    assert (handoff.state, handoff.pieces, handoff.nbytes) == (HandoffState.COMPLETE, 0, 0)
    with pytest.raises(HandoffError, match="11 of 10"):
        Handoff("h", version=0, total=10).accepted(11)
    with pytest.raises(HandoffError, match="of 0 tokens"):
        Handoff("h", version=0, total=0)


@given(st.sampled_from(list(Reason)))
def test_an_end_is_final_and_keeps_its_first_reason(reason: Reason) -> None:
    handoff = Handoff("h", version=0, total=10)
    assert handoff.cancel(reason)
    assert not handoff.cancel(Reason.LOST)
    assert (handoff.state, handoff.reason) == (HandoffState.CANCELLED, reason)
    with pytest.raises(HandoffError, match=reason.value):
        handoff.refused(Reason.NO_ROOM)


class TwoSides(RuleBasedStateMachine):
    """A prefill and a decode side with messages between them, in order, that are lost when either side dies."""

    @initialize(total=st.integers(1, 50), have=st.integers(0, 50))
    def begin(self, total: int, have: int) -> None:
        self.sender, self.receiver = Handoff("h", 7, total), Handoff("h", 7, total)
        self.have = min(have, total)
        self.wire: list[tuple[str, int, int]] = []
        self.back: list[str] = []
        self.connected = True
        self.held: set[int] = set()
        self.answered = False

    @precondition(lambda self: self.connected and not self.answered)
    @rule(wanted=st.booleans())
    def answer(self, wanted: bool) -> None:
        self.answered = True
        if wanted:
            self.receiver.accepted(self.have)
            self.held = set(range(self.have))
            self.back.append("accepted")
        else:
            self.receiver.refused(Reason.NO_ROOM)
            self.back.append("refused")

    @precondition(lambda self: self.connected and self.back)
    @rule()
    def hear(self) -> None:
        message = self.back.pop(0)
        if not self.sender.open:
            return
        if message == "accepted":
            self.sender.accepted(self.have)
        else:
            self.sender.refused(Reason.NO_ROOM)

    @precondition(lambda self: self.sender.streaming and self.sender.position < self.sender.total)
    @rule(count=st.integers(1, 20))
    def send(self, count: int) -> None:
        start = self.sender.position
        end = min(start + count, self.sender.total)
        self.sender.moved(start, end, 7, (end - start) * TOKEN_BYTES)
        if self.connected:
            self.wire.append(("piece", start, end))

    @precondition(lambda self: self.sender.streaming and self.sender.position == self.sender.total)
    @rule()
    def finish(self) -> None:
        self.sender.finish()
        if self.connected:
            self.wire.append(("end", 0, 0))

    @precondition(lambda self: self.wire)
    @rule()
    def arrive(self) -> None:
        self._arrive()

    def _arrive(self) -> None:
        kind, start, end = self.wire.pop(0)
        if not self.receiver.streaming:
            return
        if kind == "piece":
            self.receiver.moved(start, end, 7, (end - start) * TOKEN_BYTES)
            self.held |= set(range(start, end))
        elif kind == "end":
            self.receiver.finish()
        else:
            self.receiver.cancel(Reason.ABORTED)

    @rule()
    def abort(self) -> None:
        if self.sender.cancel(Reason.ABORTED) and self.connected:
            self.wire.append(("cancel", 0, 0))

    @precondition(lambda self: self.connected)
    @rule(arrived=st.integers(0, 60))
    def lose_connection(self, arrived: int) -> None:
        self.connected = False
        self.wire = self.wire[:arrived]
        while self.wire:
            self._arrive()
        self.back.clear()
        self.sender.cancel(Reason.LOST)
        self.receiver.cancel(Reason.LOST)

    @invariant()
    def nothing_is_mixed_or_lost(self) -> None:
        if not hasattr(self, "sender"):
            return
        assert self.held == set(range(len(self.held)))
        assert self.receiver.position == len(self.held)
        assert self.receiver.nbytes == (self.receiver.position - self.receiver.have) * TOKEN_BYTES
        if self.receiver.state is HandoffState.COMPLETE:
            assert self.sender.state is HandoffState.COMPLETE
            assert len(self.held) == self.receiver.total
            assert self.sender.nbytes == self.receiver.nbytes
        if not self.connected:
            assert not self.sender.open
            assert not self.receiver.open


TestTwoSides = TwoSides.TestCase
