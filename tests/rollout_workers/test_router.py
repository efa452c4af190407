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


@given(st.lists(st.tuples(st.sampled_from(["choose", "finish", "add", "remove"]), st.integers(0, 9)), max_size=300))
def test_the_choice_is_the_least_loaded_then_least_chosen_then_first(steps: list[tuple[str, int]]) -> None:
    router = Router(max_imbalance=1.0, slack=0)
    load: dict[str, int] = {}
    chosen: dict[str, int] = {}
    running: list[str] = []
    for turn, (what, number) in enumerate(steps):
        name = f"e{number}"
        if what == "add" and name not in load:
            load[name], chosen[name] = 0, min(chosen.values(), default=0)
            router.add(name)
        elif what == "remove" and name in load:
            del load[name], chosen[name]
            router.remove(name)
            running = [engine for engine in running if engine != name]
        elif what == "finish" and running:
            engine = running.pop(number % len(running))
            load[engine] -= 1
            router.finished(engine)
        elif what == "choose" and load:
            expected = min(load, key=lambda engine: (load[engine], chosen[engine]))
            assert router.choose(f"s{turn}") == expected
            load[expected] += 1
            chosen[expected] += 1
            running.append(expected)
        assert {engine: router.load(engine) for engine in router.members} == load
