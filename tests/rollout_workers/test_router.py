from __future__ import annotations

import doctest
from collections import Counter
from types import ModuleType

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from rollout_workers import concurrency
from rollout_workers import router as router_module
from rollout_workers.engines import clients
from rollout_workers.router import Load, Router, RoutingPolicy


def router_of(engines: int, **policy: object) -> Router:
    router = Router(RoutingPolicy(**policy))  # type: ignore[arg-type]
    for index in range(engines):
        router.add(f"e{index}")
    return router


def chosen(router: Router, session: str, tokens: int = 0, group: str = "") -> str:
    engine = router.choose(session, tokens, group)
    assert engine is not None
    return engine


def test_ties_go_round_and_sessions_stay() -> None:
    router = router_of(3)
    homes = [chosen(router, f"s{index}") for index in range(6)]
    assert sorted(homes[:3]) == ["e0", "e1", "e2"]
    assert [chosen(router, f"s{index}") for index in range(6)] == homes


def test_a_session_counts_until_it_is_released_whether_it_generates_or_not() -> None:
    router = router_of(2)
    assert chosen(router, "a") == "e0"
    router.finished("e0")
    assert (router.load("e0"), router.requests("e0"), router.sessions_on("e0")) == (1, 0, 1)
    assert chosen(router, "b") == "e1"
    assert router.release("a") == "e0"
    assert router.load("e0") == 0
    assert chosen(router, "c") == "e0"


@pytest.mark.parametrize(("measure", "expected"), [(Load.SESSIONS, "e1"), (Load.REQUESTS, "e0"), (Load.TOKENS, "e2")])
def test_what_counts_as_load_is_the_policys(measure: Load, expected: str) -> None:
    router = router_of(3, load=measure)
    assert [chosen(router, name, tokens) for name, tokens in (("a", 10), ("b", 900), ("c", 5))] == ["e0", "e1", "e2"]
    router.finished("e0")
    router.finished(chosen(router, "d", 1))
    assert chosen(router, "e", 1) == expected


def test_a_session_leaves_an_engine_that_has_far_more_than_its_share() -> None:
    router = Router(RoutingPolicy(leave_above=1.0, slack=2))
    router.add("a")
    for index in range(8):
        router.choose(f"s{index}")
    router.add("b")
    moved = [index for index in range(8) if chosen(router, f"s{index}") == "b"]
    assert moved == [0, 1]
    assert router.moved == 2
    assert (router.load("a"), router.load("b")) == (6, 2)
    assert router.home("s0") == "b"


def test_without_stickiness_every_request_goes_to_the_least_loaded() -> None:
    router = router_of(2, sticky=False, load=Load.REQUESTS)
    assert [chosen(router, "s") for _ in range(4)] == ["e0", "e1", "e0", "e1"]
    assert router.moved == 3


def test_without_members_there_is_no_choice_and_a_lost_one_is_forgotten() -> None:
    router = Router()
    assert router.choose("s") is None
    router.add("a")
    assert router.choose("s") == "a"
    router.remove("a")
    assert router.home("s") is None
    router.finished("a")
    router.report("a", 3, 3)
    assert router.members == ()
    router.add("b")
    assert router.choose("s") == "b"
    assert router.load("b") == 1


def test_a_group_lands_together_as_far_as_the_balance_allows() -> None:
    router = router_of(4)
    for index in range(80):
        router.choose(f"old{index}")
    homes = Counter(chosen(router, f"new{member}", group="g") for member in range(8))
    assert homes == {"e0": 4, "e1": 3, "e2": 1}
    assert max(router.load(name) for name in router.members) <= 1.1 * 88 / 4
    apart = router_of(4, prefix_aware=False)
    assert Counter(chosen(apart, f"new{member}", group="g") for member in range(8)) == dict.fromkeys(apart.members, 2)


def test_a_group_that_has_ended_attracts_nobody() -> None:
    router = router_of(2, max_imbalance=2.0)
    for name in "ab":
        assert chosen(router, name, group="g") == "e0"
    for name in "ab":
        router.finished("e0")
        router.release(name)
    assert chosen(router, "c", group="g") == "e1"


def test_the_load_of_others_counts() -> None:
    router = router_of(2)
    router.report("e0", sessions=5, requests=2)
    assert [chosen(router, f"s{index}") for index in range(6)] == ["e1"] * 5 + ["e0"]
    router.report("e0", sessions=0, requests=0)
    assert chosen(router, "s6") == "e0"


@pytest.mark.parametrize("values", [{"max_imbalance": 0.9}, {"leave_above": 0.5}, {"slack": -1}])
def test_a_policy_that_cannot_work_is_refused(values: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=rf"{next(iter(values))}={next(iter(values.values()))}.*at least"):
        RoutingPolicy(**values)  # type: ignore[arg-type]


NAMES = st.integers(0, 5).map("e{}".format)
SESSIONS = st.integers(0, 30).map("s{}".format)


class Routing(RuleBasedStateMachine):
    """Whatever happens, the books agree with what was said, sessions stay, and the bounds hold."""

    policy = RoutingPolicy(max_imbalance=1.2, leave_above=1.5, slack=3)

    def __init__(self) -> None:
        super().__init__()
        self.router = Router(self.policy)
        self.homes: dict[str, str] = {}
        self.flying: list[str] = []
        self.others: dict[str, int] = {}

    def load(self, engine: str) -> int:
        return sum(home == engine for home in self.homes.values()) + self.others[engine]

    @rule(engine=NAMES)
    def add(self, engine: str) -> None:
        self.router.add(engine)
        self.others.setdefault(engine, 0)

    @rule(engine=NAMES)
    def remove(self, engine: str) -> None:
        self.router.remove(engine)
        self.others.pop(engine, None)
        self.homes = {session: home for session, home in self.homes.items() if home != engine}
        self.flying = [home for home in self.flying if home != engine]

    @precondition(lambda self: self.others)
    @rule(session=SESSIONS, tokens=st.integers(0, 1000), group=st.integers(0, 3))
    def choose(self, session: str, tokens: int, group: int) -> None:
        loads = {engine: self.load(engine) for engine in self.others}
        mean, least = sum(loads.values()) / len(loads), min(loads.values())
        before = self.homes.get(session)
        engine = chosen(self.router, session, tokens, f"g{group}")
        if before is None:
            assert loads[engine] + 1 <= max(1.2 * (mean + 1 / len(loads)), least + 1) + 1e-9
        elif engine == before:
            assert loads[engine] <= max(1.5 * mean + 3, least + 1) + 1e-9
        else:
            assert loads[before] > 1.5 * mean + 3
            assert loads[engine] == least < loads[before]
        self.homes[session] = engine
        self.flying.append(engine)

    @precondition(lambda self: self.flying)
    @rule(which=st.integers(0, 100))
    def finish(self, which: int) -> None:
        self.router.finished(self.flying.pop(which % len(self.flying)))

    @rule(session=SESSIONS)
    def release(self, session: str) -> None:
        assert self.router.release(session) == self.homes.pop(session, None)

    @rule(engine=NAMES, sessions=st.integers(0, 20))
    def report(self, engine: str, sessions: int) -> None:
        self.router.report(engine, sessions, sessions // 2)
        if engine in self.others:
            self.others[engine] = sessions

    @invariant()
    def the_books_agree(self) -> None:
        assert set(self.router.members) == set(self.others)
        assert self.router.sessions == len(self.homes)
        for engine in self.others:
            assert self.router.load(engine) == self.load(engine)
            assert self.router.requests(engine) == self.flying.count(engine)
        assert {session: self.router.home(session) for session in self.homes} == self.homes


TestRouting = Routing.TestCase
TestRouting.settings = settings(max_examples=60, stateful_step_count=60, deadline=None)


@pytest.mark.parametrize("module", [router_module, concurrency, clients])
def test_the_examples_hold(module: ModuleType) -> None:
    result = doctest.testmod(module)
    assert result.attempted > 0
    assert result.failed == 0
