from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from rollout_workers.router import Router


def test_ties_go_round_and_sessions_stay() -> None:
    router = Router()
    for name in ("a", "b", "c"):
        router.add(name)
    homes = [router.choose(f"s{index}") for index in range(6)]
    assert sorted(homes[:3]) == ["a", "b", "c"]
    assert [router.choose(f"s{index}") for index in range(6)] == homes


def test_an_overloaded_home_is_left() -> None:
    router = Router(max_imbalance=1.0, slack=2)
    router.add("a")
    for index in range(8):
        router.choose(f"s{index}")
    router.add("b")
    assert router.choose("s0") == "b"
    assert router.moved == 1
    assert router.home("s0") == "b"


def test_without_members_there_is_no_choice_and_a_lost_one_is_forgotten() -> None:
    router = Router()
    assert router.choose("s") is None
    router.add("a")
    assert router.choose("s") == "a"
    router.remove("a")
    assert router.home("s") is None
    router.finished("a")
    assert router.members == ()


@given(st.lists(st.tuples(st.integers(0, 20), st.booleans()), max_size=200), st.integers(1, 5))
def test_load_counts_what_is_in_flight_and_stays_balanced(steps: list[tuple[int, bool]], engines: int) -> None:
    router = Router(max_imbalance=1.5, slack=4)
    names = [f"e{index}" for index in range(engines)]
    for name in names:
        router.add(name)
    running: list[str] = []
    for session, ends in steps:
        if ends and running:
            router.finished(running.pop())
        else:
            chosen = router.choose(f"s{session}")
            assert chosen in names
            running.append(chosen)
            mean = len(running) / engines
            assert router.load(chosen) <= 1.5 * mean + 4 + 1
    assert sum(router.load(name) for name in names) == len(running)
