from __future__ import annotations

import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rollout_workers.concurrency import AdaptiveGate, ConcurrencyController, ConcurrencyPolicy, Gate
from rollout_workers.engines.protocol import EngineLoad


class Engines:
    """Engines that hold the KV of ``capacity`` sessions each; each session more costs another one its KV once a round.

    A tenth of the episodes ends in each round, and as many begin as the controller lets.
    """

    def __init__(self, controller: ConcurrencyController, count: int, capacity: int) -> None:
        self.controller, self.capacity = controller, capacity
        self.names = [f"e{index}" for index in range(count)]
        controller.members(self.names)
        self.episodes = controller.limit
        self.finished = dict.fromkeys(self.names, 0)
        self.lost = dict.fromkeys(self.names, 0)

    def round(self) -> int:
        """Live through one round; returns the limit after it."""
        for index, name in enumerate(self.names):
            sessions = (self.episodes + len(self.names) - 1 - index) // len(self.names)
            self.finished[name] += sessions
            self.lost[name] += max(0, sessions - self.capacity)
            load = EngineLoad(
                sessions=sessions,
                requests=sessions,
                own_sessions=sessions,
                kv_used=min(1.0, sessions / self.capacity),
                lost=self.lost[name],
                finished=self.finished[name],
            )
            self.controller.heard(name, load, self.episodes)
        self.episodes = max(self.episodes - (self.episodes + 9) // 10, self.controller.limit)
        return self.controller.limit


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 120), st.integers(1, 4), st.integers(4, 40))
def test_it_settles_where_next_to_nothing_is_lost_and_stays_there(ceiling: int, count: int, capacity: int) -> None:
    engines = Engines(ConcurrencyController(ceiling), count, capacity)
    for _ in range(300):
        engines.round()
    limits = [engines.round() for _ in range(300)]
    room = count * capacity
    if room >= ceiling:
        assert set(limits) == {ceiling}
        assert engines.controller.cuts == 0
    else:
        assert min(limits) >= int(0.85 * room) - 1
        assert max(limits) <= room / 0.98 + count


@settings(max_examples=200, deadline=None)
@given(
    st.integers(1, 50),
    st.lists(
        st.tuples(
            st.sampled_from("abc"),
            st.integers(0, 60),
            st.integers(0, 60),
            st.integers(0, 60),
            st.integers(0, 40),
            st.floats(0, 1),
            st.sets(st.sampled_from("abc")),
        ),
        max_size=60,
    ),
)
def test_the_limit_lies_between_one_and_the_ceiling_whatever_engines_say(
    ceiling: int, reports: list[tuple[str, int, int, int, int, float, set[str]]]
) -> None:
    controller = ConcurrencyController(ceiling)
    for name, sessions, finished, lost, waiting, kv_used, members in reports:
        controller.members(sorted(members))
        load = EngineLoad(
            sessions=sessions, requests=sessions, finished=finished, lost=lost, waiting=waiting, kv_used=kv_used
        )
        controller.heard(name, load, sessions)
        assert 1 <= controller.limit <= ceiling


def report(finished: int, lost: int = 0, *, waiting: int = 0, kv_used: float = 0.5) -> EngineLoad:
    return EngineLoad(sessions=20, requests=20, finished=finished, lost=lost, waiting=waiting, kv_used=kv_used)


def test_what_engines_lose_cuts_the_limit_once_and_again_only_when_the_cut_has_taken_effect() -> None:
    controller = ConcurrencyController(40)
    controller.members(["a"])
    controller.heard("a", report(0), 40)
    controller.heard("a", report(19, lost=19), 40)
    assert controller.limit == 40  # the round is not over
    controller.heard("a", report(20, lost=19), 40)
    assert controller.limit == 34
    controller.heard("a", report(40, lost=38), 40)
    assert controller.limit == 34
    controller.heard("a", report(60, lost=58), 34)
    assert controller.limit == 28
    assert controller.cuts == 2


def test_it_grows_while_nothing_is_lost_and_the_limit_is_used() -> None:
    controller = ConcurrencyController(40)
    controller.members(["a"])
    controller.heard("a", report(0), 40)
    controller.heard("a", report(20, lost=20), 40)
    for count, (episodes, load, expected) in enumerate(
        [
            (34, report(40, lost=20), 35),
            (20, report(60, lost=20), 35),  # not used up
            (35, report(80, lost=20, kv_used=0.99), 35),  # full
            (35, report(100, lost=20, waiting=3), 35),  # they wait for slots
            (35, report(120, lost=20), 36),
            (36, report(140, lost=20, waiting=11), 30),  # more wait than run
        ]
    ):
        controller.heard("a", load, episodes)
        assert controller.limit == expected, count


def test_several_workers_grow_by_one_for_each_engine_together() -> None:
    controller = ConcurrencyController(40)
    controller.members(["a"])

    def hear(finished: int) -> None:
        load = EngineLoad(sessions=20, requests=20, own_sessions=5, finished=finished, lost=20, kv_used=0.5)
        controller.heard("a", load, controller.limit)

    controller.heard("a", report(0), 40)
    hear(20)
    assert controller.limit == 34
    hear(40)
    hear(60)
    hear(80)
    assert controller.limit == 34  # a quarter of what the engine holds is this worker's
    hear(100)
    assert controller.limit == 35


def test_a_limit_that_was_found_follows_the_number_of_engines() -> None:
    controller = ConcurrencyController(40)
    controller.members(["a", "b"])
    controller.members(["a"])
    assert controller.limit == 40  # nothing was found yet
    controller.heard("a", report(0), 40)
    controller.heard("a", report(20, lost=20), 40)
    assert controller.limit == 34
    controller.members(["b", "c"])
    assert controller.limit == 40
    controller.members(["c"])
    assert controller.limit == 20
    controller.heard("gone", report(20, lost=20), 40)
    controller.members([])
    assert controller.limit == 20


@pytest.mark.parametrize(("values"), [{"tolerated": 1.0}, {"back_off": 1.0}, {"full": 0.0}, {"least_round": 0}])
def test_constants_that_cannot_work_are_refused(values: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(values))):
        ConcurrencyPolicy(**values)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="ceiling=0"):
        ConcurrencyController(0)


class Visitors:
    """Tasks that go through a gate and stay until they are told to leave."""

    def __init__(self, gate: Gate) -> None:
        self.gate = gate
        self.came: list[int] = []
        self.leave: dict[int, asyncio.Event] = {}
        self.tasks: dict[int, asyncio.Task[None]] = {}

    def send(self, number: int) -> None:
        self.leave[number] = asyncio.Event()
        self.tasks[number] = asyncio.create_task(self._visit(number))

    async def _visit(self, number: int) -> None:
        async with self.gate:
            self.came.append(number)
            await self.leave[number].wait()


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_a_gate_lets_in_as_many_as_it_may_in_order_and_follows_its_limit() -> None:
    gate = Gate(2)
    visitors = Visitors(gate)
    for number in range(6):
        visitors.send(number)
    await settle()
    assert visitors.came == [0, 1]
    gate.resize(1)
    visitors.leave[0].set()
    await settle()
    assert visitors.came == [0, 1]
    gate.resize(3)
    await settle()
    assert visitors.came == [0, 1, 2, 3]
    visitors.tasks[4].cancel()
    visitors.leave[1].set()
    await settle()
    assert visitors.came == [0, 1, 2, 3, 5]
    for event in visitors.leave.values():
        event.set()
    await asyncio.gather(*visitors.tasks.values(), return_exceptions=True)
    assert gate.inside == 0


async def test_one_who_is_cancelled_at_the_moment_of_being_let_in_takes_no_place() -> None:
    gate = Gate(1)
    visitors = Visitors(gate)
    for number in range(3):
        visitors.send(number)
    await settle()
    gate.resize(2)
    visitors.tasks[1].cancel()
    await settle()
    assert visitors.came == [0, 2]
    assert gate.inside == 2
    for event in visitors.leave.values():
        event.set()
    await settle()
    assert gate.inside == 0


async def test_a_gate_that_adapts_follows_its_controller() -> None:
    gate = AdaptiveGate(40)
    visitors = Visitors(gate)
    for number in range(40):
        visitors.send(number)
    await settle()
    gate.heard("a", report(0), ["a"])
    gate.heard("a", report(20, lost=20), ["a"])
    assert gate.limit == 34
    for event in visitors.leave.values():
        event.set()
    await asyncio.gather(*visitors.tasks.values())
