from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from pool_fixtures import LocalActor

from experience.wire import encode
from orchestrator.fleet_config import FleetConfig
from orchestrator.prober import Prober
from orchestrator.probes import LONGEST_PAUSE, LONGEST_TIMEOUT, Condition, Probe, ProbePolicy
from rollout_workers.engines.protocol import EngineHealth

CONFIG = FleetConfig(probe_every_s=2.0, probe_timeout_s=5.0, probe_misses=3)


def test_an_engine_that_answers_is_asked_at_the_interval() -> None:
    policy = ProbePolicy(CONFIG)
    policy.joined("a", 10.0)
    assert policy.due(11.9) == []
    assert policy.due(12.0) == [Probe("a", 1, 5.0)]
    assert policy.due(12.0) == []
    assert policy.next_at() is None
    policy.answered("a", 1, 0.01, 12.01)
    assert policy.next_at() == 14.01


def test_an_engine_whose_answers_take_long_is_asked_less_often_and_gets_more_time() -> None:
    policy = ProbePolicy(CONFIG)
    policy.joined("a", 0.0)
    policy.due(2.0)
    policy.answered("a", 1, 1.5, 3.5)
    assert policy.next_at() == 3.5 + 4 * 1.5
    assert policy.due(9.5)[0].timeout_s == LONGEST_TIMEOUT * 5.0
    policy.answered("a", 2, 15.0, 24.5)
    assert policy.next_at() == 24.5 + LONGEST_PAUSE * 2.0


def test_misses_in_a_row_condemn_and_an_answer_between_them_saves() -> None:
    policy = ProbePolicy(CONFIG)
    policy.joined("a", 0.0)
    now, verdicts = 2.0, []
    for answers in (False, False, True, False, False, False):
        (probe,) = policy.due(now)
        now += probe.timeout_s
        if answers:
            policy.answered("a", probe.number, 0.1, now)
            verdicts.append(policy.condition("a"))
        else:
            verdicts.append(policy.missed("a", probe.number, now))
        now = policy.next_at() or now
    suspect = Condition.SUSPECT
    assert verdicts == [suspect, suspect, Condition.HEALTHY, suspect, suspect, Condition.CONDEMNED]
    assert policy.next_at() is None
    assert policy.due(now + 1000) == []
    policy.joined("a", now)
    assert policy.condition("a") is Condition.HEALTHY


def test_what_comes_too_late_or_from_nobody_is_ignored() -> None:
    policy = ProbePolicy(CONFIG)
    policy.joined("a", 0.0)
    policy.due(2.0)
    assert policy.missed("a", 7, 3.0) is None
    assert policy.missed("nobody", 1, 3.0) is None
    policy.left("a")
    policy.left("a")
    policy.answered("a", 1, 0.1, 3.0)
    with pytest.raises(KeyError):
        policy.condition("a")


@pytest.mark.parametrize(
    ("settings_", "told"),
    [
        ({"probe_every_s": 0.0}, "fleet.probe_every_s must be positive"),
        ({"probe_timeout_s": -1.0}, "fleet.probe_timeout_s must be positive"),
        ({"probe_misses": 0}, "fleet.probe_misses must be at least 1"),
        ({"drain_s": -1.0}, "fleet.drain_s must not be negative"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings_: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        FleetConfig(**settings_).validate()


NAMES = st.sampled_from(["a", "b", "c"])


class ProbeMachine(RuleBasedStateMachine):
    """Any order of joining, leaving, answers (late ones and wrong ones too) and misses."""

    def __init__(self) -> None:
        super().__init__()
        self.policy = ProbePolicy(CONFIG)
        self.now = 0.0
        self.under_way: dict[str, Probe] = {}
        self.misses: dict[str, int] = {}
        self.well_at: dict[str, float] = {}

    @rule(name=NAMES)
    def join(self, name: str) -> None:
        self.policy.joined(name, self.now)
        self.under_way.pop(name, None)
        self.misses[name], self.well_at[name] = 0, self.now

    @rule(name=NAMES)
    def leave(self, name: str) -> None:
        self.policy.left(name)
        for known in (self.under_way, self.misses, self.well_at):
            known.pop(name, None)

    @precondition(lambda self: self.policy.next_at() is not None)
    @rule(late=st.floats(0, 3))
    def ask(self, late: float) -> None:
        at = self.policy.next_at()
        assert at is not None
        self.now = max(self.now, at) + late
        probes = self.policy.due(self.now)
        assert probes
        for probe in probes:
            assert probe.name not in self.under_way, "asked again before the probe had ended"
            assert self.misses[probe.name] < CONFIG.probe_misses, "a condemned engine was asked"
            assert CONFIG.probe_timeout_s <= probe.timeout_s <= LONGEST_TIMEOUT * CONFIG.probe_timeout_s
            self.under_way[probe.name] = probe

    @precondition(lambda self: self.under_way)
    @rule(data=st.data(), share=st.floats(0, 1))
    def answer(self, data: st.DataObject, share: float) -> None:
        probe = self.under_way.pop(data.draw(st.sampled_from(sorted(self.under_way)), "name"))
        self.now += share * probe.timeout_s
        self.policy.answered(probe.name, probe.number, share * probe.timeout_s, self.now)
        self.misses[probe.name], self.well_at[probe.name] = 0, self.now
        assert self.policy.condition(probe.name) is Condition.HEALTHY

    @precondition(lambda self: self.under_way)
    @rule(data=st.data())
    def miss(self, data: st.DataObject) -> None:
        probe = self.under_way.pop(data.draw(st.sampled_from(sorted(self.under_way)), "name"))
        self.now += probe.timeout_s
        self.misses[probe.name] += 1
        condemned = self.misses[probe.name] == CONFIG.probe_misses
        assert self.policy.missed(probe.name, probe.number, self.now) is (
            Condition.CONDEMNED if condemned else Condition.SUSPECT
        )

    @rule(name=NAMES, number=st.integers(-1, 0))
    def stale(self, name: str, number: int) -> None:
        before = self.misses.get(name)
        assert self.policy.missed(name, number, self.now) is None
        assert self.misses.get(name) == before

    @invariant()
    def everybody_well_is_asked_again_before_long(self) -> None:
        for name in self.misses.keys() - self.under_way.keys():
            if self.policy.condition(name) is not Condition.CONDEMNED:
                at = self.policy.next_at()
                assert at is not None
                assert at <= self.now + LONGEST_PAUSE * CONFIG.probe_every_s


TestProbeMachine = ProbeMachine.TestCase
TestProbeMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_a_silent_engine_is_condemned_within_the_time_that_the_policy_names() -> None:
    for usual_s in (0.001, 0.3, 4.9):
        policy, now = ProbePolicy(CONFIG), 0.0
        policy.joined("a", now)
        now = policy.next_at() or now
        policy.answered("a", policy.due(now)[0].number, usual_s, now + usual_s)
        silent_since = now = now + usual_s
        while policy.condition("a") is not Condition.CONDEMNED:
            at = policy.next_at()
            assert at is not None
            now = max(now, at)
            (probe,) = policy.due(now)
            now += probe.timeout_s
            policy.missed("a", probe.number, now)
        assert now - silent_since <= policy.longest_s()


class Served:
    """An engine actor as far as its health goes."""

    def __init__(self, version: int = 0) -> None:
        self.version = version
        self.asked = asyncio.Event()
        self.silent = False
        self.error: Exception | None = None

    async def health(self) -> bytes:
        self.asked.set()
        if self.silent:
            await asyncio.Event().wait()
        if self.error is not None:
            raise self.error
        return encode(EngineHealth(version=self.version))


async def condemned_by_the_prober(engine: Served, held: int, timeout_s: float = 5.0) -> tuple[str, str]:
    """Who is condemned, and why, when this is the only engine; asked every few milliseconds."""
    verdict: asyncio.Future[tuple[str, str]] = asyncio.get_running_loop().create_future()
    config = FleetConfig(probe_every_s=0.005, probe_timeout_s=timeout_s, probe_misses=2)
    prober = Prober(ProbePolicy(config), lambda name: held, lambda name, why: verdict.set_result((name, why)))
    task = asyncio.create_task(prober.run())
    prober.watch("engine-0.0", LocalActor(engine))
    try:
        async with asyncio.timeout(10):
            return await verdict
    finally:
        task.cancel()


async def test_the_prober_condemns_who_does_not_answer() -> None:
    engine = Served()
    engine.silent = True
    assert await condemned_by_the_prober(engine, 0, timeout_s=0.02) == ("engine-0.0", "no answer within 0.02 s")


async def test_the_prober_condemns_who_cannot_say_how_it_is() -> None:
    engine = Served()
    engine.error = ConnectionError("the server answers 500")
    assert await condemned_by_the_prober(engine, 0) == ("engine-0.0", "ConnectionError: the server answers 500")


async def test_the_prober_condemns_an_engine_that_has_lost_its_weights() -> None:
    name, why = await condemned_by_the_prober(Served(version=3), 5)
    assert (name, why) == ("engine-0.0", "it serves version 3 although it was given version 5")


async def test_the_prober_lets_a_well_engine_be_and_forgets_one_that_left() -> None:
    engine, condemned = Served(version=5), []
    config = FleetConfig(probe_every_s=0.005, probe_timeout_s=5.0, probe_misses=1)
    prober = Prober(ProbePolicy(config), lambda name: 5, lambda name, why: condemned.append(why))
    task = asyncio.create_task(prober.run())
    prober.watch("engine-0.0", LocalActor(engine))
    for _ in range(5):
        engine.asked.clear()
        async with asyncio.timeout(10):
            await engine.asked.wait()
    prober.forget("engine-0.0")
    engine.asked.clear()
    await asyncio.sleep(0.05)
    assert not engine.asked.is_set()
    assert condemned == []
    task.cancel()
