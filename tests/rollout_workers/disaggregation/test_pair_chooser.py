from __future__ import annotations

from collections import Counter

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from rollout_workers.disaggregation.pair_chooser import PairChooser
from rollout_workers.engines.protocol import EngineRole

PREFILL, DECODE = EngineRole.PREFILL, EngineRole.DECODE


def split(prefill: int = 1, decode: int = 1, min_tokens: int = 8) -> PairChooser:
    chooser = PairChooser(min_tokens)
    for index in range(prefill):
        chooser.add(f"p{index}", PREFILL)
    for index in range(decode):
        chooser.add(f"d{index}", DECODE)
    return chooser


def one_turn(chooser: PairChooser, session: str, prompt: int, answer: int) -> tuple[str | None, str | None]:
    first, decode = chooser.choose(session, prompt), chooser.decode_of(session)
    if first != decode:
        chooser.handed_over(session, complete=True)
    chooser.ended(session, prompt + answer)
    return first, decode


def test_first_prompts_are_prefilled_elsewhere_and_short_ones_stay() -> None:
    chooser = split()
    assert one_turn(chooser, "long", 100, 5) == ("p0", "d0")
    assert one_turn(chooser, "short", 8, 5) == ("d0", "d0")


def test_an_engine_that_comes_back_under_its_name_owes_nothing() -> None:
    chooser = split()
    assert chooser.choose("s", 100) == "p0"
    chooser.remove("p0")
    chooser.add("p0", PREFILL)
    chooser.ended("s")
    assert chooser.queued("p0") == 0


def test_a_prompt_shorter_than_what_is_held_counts_as_nothing_to_compute() -> None:
    chooser = PairChooser(4)
    chooser.add("e0", PREFILL)
    one_turn(chooser, "s", 10, 10)
    chooser.add("e1", DECODE)
    assert (chooser.choose("s", 12), chooser.decode_of("s")) == ("e0", "e1")
    assert chooser.queued("e0") == 0


def test_sessions_stay_with_their_decode_engine_and_are_divided_among_them() -> None:
    chooser = split(2, 3)
    homes = {f"s{number}": one_turn(chooser, f"s{number}", 100, 10)[1] for number in range(30)}
    assert set(Counter(homes.values()).values()) == {10}
    assert all(one_turn(chooser, session, 200, 10)[1] == home for session, home in homes.items())


def test_prompts_are_divided_among_the_prefill_engines_by_the_tokens_that_wait_there() -> None:
    chooser = split(2, 1)
    first = [chooser.choose(f"s{number}", length) for number, length in enumerate((1000, 100, 100, 100))]
    assert first == ["p0", "p1", "p1", "p1"]
    assert (chooser.queued("p0"), chooser.queued("p1")) == (1000, 300)


def test_a_later_turn_goes_where_the_least_work_holds_up_the_fewest() -> None:
    chooser = split(1, 1)
    one_turn(chooser, "s", 1000, 100)
    assert chooser.choose("s", 1300) == "d0"  # 200 new tokens there, 300 at p0; nobody else decodes
    chooser.ended("s", 1400)
    assert chooser.choose("other", 5) == "d0"
    assert chooser.choose("s", 1700) == "d0"  # p0 holds 1000: 700 tokens there delay more than 300 for two
    chooser.ended("s", 1800)
    assert [chooser.choose(f"other{number}", 5) for number in range(3)] == ["d0"] * 3
    assert chooser.choose("s", 2100) == "p0"  # 1100 there, 300 for five
    chooser.handed_over("s", complete=True)
    chooser.ended("s", 2200)
    assert chooser.choose("s", 2500) == "p0"  # it holds the turn before now: 400 there


def test_a_queue_at_the_prefill_engines_sends_prompts_to_decode_engines() -> None:
    chooser = split(1, 1)
    assert chooser.choose("a", 1000) == "p0"
    assert chooser.choose("b", 100) == "d0"  # 1100 behind a, 100 for a and itself
    assert chooser.choose("c", 600) == "p0"


def test_an_engine_that_is_gone_holds_nothing_and_roles_without_anybody_stop_nothing() -> None:
    chooser = split(1, 1)
    one_turn(chooser, "s", 100, 20)
    chooser.remove("d0")
    assert one_turn(chooser, "s", 150, 20) == ("p0", "p0")
    chooser.add("d1", DECODE)
    assert chooser.choose("s", 200) == "p0"
    assert chooser.decode_of("s") == "d1"
    chooser.remove("p0")
    assert (chooser.choose("s", 200), chooser.decode_of("s")) == ("d1", "d1")
    chooser.remove("d1")
    assert chooser.choose("s", 200) is None
    assert chooser.members == ()


def test_a_request_that_shall_stay_alone_does() -> None:
    chooser = split()
    assert chooser.choose("s", 100) == "p0"
    chooser.handed_over("s", complete=False)
    chooser.stay_alone("s")
    assert chooser.choose("s", 100) == "d0"
    chooser.ended("s", 120)
    assert chooser.choose("s", 500) == "d0"  # 380 new tokens; p0 holds 100 of 500
    chooser.ended("s", 520)
    assert chooser.choose("t", 500) == "p0"


def test_only_engines_that_hold_a_pinned_version_are_chosen() -> None:
    chooser = split(2, 2)
    chosen = [(chooser.choose(f"s{n}", 100, "", ["p1", "d1"]), chooser.decode_of(f"s{n}")) for n in range(3)]
    assert chosen == [("p1", "d1")] * 3
    assert chooser.choose("t", 100, "", ["d0"]) == "d0"


def test_release_names_all_who_may_hold_the_session() -> None:
    chooser = split()
    one_turn(chooser, "s", 100, 20)
    assert sorted(chooser.release_all("s")) == ["d0", "p0"]
    assert chooser.release_all("s") == []
    assert chooser.sessions == 0


def test_after_a_change_of_role_requests_go_by_the_new_one_and_old_ones_still_end() -> None:
    chooser = split(1, 2)
    for session in "abcd":
        one_turn(chooser, session, 100, 20)
    chooser.choose("a", 101)
    busy = chooser.decode_of("a")
    assert busy is not None
    chooser.set_role(busy, PREFILL)
    chooser.ended("a", 120)
    chooser.set_role(busy, DECODE)
    assert chooser.requests(busy) == 0
    assert {chooser.role("p0"), chooser.role(busy)} == {PREFILL, DECODE}


class AnyOrder(RuleBasedStateMachine):
    """Joins, losses, flips, requests and releases in any order: counts stay right, and somebody takes each request."""

    engines = st.sampled_from(["e0", "e1", "e2", "e3"])
    sessions = st.sampled_from(["s0", "s1", "s2", "s3", "s4"])

    def __init__(self) -> None:
        super().__init__()
        self.chooser = PairChooser(min_tokens=4)
        self.roles: dict[str, EngineRole] = {}
        self.prompts: dict[str, int] = {}

    @rule(engine=engines, role=st.sampled_from([PREFILL, DECODE]))
    def join_or_flip(self, engine: str, role: EngineRole) -> None:
        self.chooser.add(engine, role)
        self.roles[engine] = role

    @rule(engine=engines)
    def lose(self, engine: str) -> None:
        self.chooser.remove(engine)
        self.roles.pop(engine, None)

    @rule(session=sessions, prompt=st.integers(1, 200))
    def start(self, session: str, prompt: int) -> None:
        first, decode = self.chooser.choose(session, prompt), self.chooser.decode_of(session)
        if not self.roles:
            assert first is None
            self.prompts.pop(session, None)
            return
        assert first in self.roles
        assert decode in self.roles
        if DECODE in self.roles.values():
            assert self.roles[decode] is DECODE
        if first != decode:
            assert self.roles[first] is PREFILL
        self.prompts[session] = prompt

    @precondition(lambda self: self.prompts)
    @rule(complete=st.booleans(), data=st.data())
    def hand_over(self, complete: bool, data: st.DataObject) -> None:
        self.chooser.handed_over(data.draw(st.sampled_from(sorted(self.prompts))), complete=complete)

    @precondition(lambda self: self.prompts)
    @rule(known=st.booleans(), data=st.data())
    def end(self, known: bool, data: st.DataObject) -> None:
        session = data.draw(st.sampled_from(sorted(self.prompts)))
        self.chooser.ended(session, self.prompts.pop(session) + 10 if known else None)

    @rule(session=sessions)
    def release(self, session: str) -> None:
        assert set(self.chooser.release_all(session)) <= self.roles.keys()
        self.prompts.pop(session, None)

    @invariant()
    def counts_are_right(self) -> None:
        for engine in self.roles:
            assert 0 <= self.chooser.requests(engine) <= len(self.prompts)
            assert self.chooser.queued(engine) >= 0
        if not self.prompts:
            assert all(self.chooser.queued(engine) == 0 for engine in self.roles)
            assert all(self.chooser.requests(engine) == 0 for engine in self.roles)


TestAnyOrder = AnyOrder.TestCase
