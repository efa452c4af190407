"""Whom a run that stands still waits for."""

from __future__ import annotations

from dataclasses import replace

import pytest

from experience.slots import Doing, Wait
from orchestrator.stall import Evidence, StallWatch, judge

OLDEST = (("g000003", "worker-0.0"), ("g000004", "worker-0.0"))
BASE = Evidence(
    in_flight=2,
    oldest=OLDEST,
    now=100.0,
    needed=4,
    paced=True,
    alone={"environment": "environment-0", "reward": "reward-0", "queue": "queue-0"},
)

SPLIT = replace(BASE, phases={"engine-0": "prefill", "engine-1": "decode"})


def wait(doing: Doing, actor: str = "", evaluation: bool = False) -> Wait:
    return Wait("g000003-1", "g000003", doing, 58.0, evaluation, actor)


@pytest.mark.parametrize(
    ("evidence", "stage", "actor"),
    [
        (replace(BASE, silent={"environment-1": 9.0, "queue-0": 8.0}), "queue", "queue-0"),
        (replace(BASE, silent={"learner-0": 9.0}, learner_phase="saving"), "saving", "learner-0"),
        (replace(BASE, silent={"engine-0": 9.0}), "generation", "engine-0"),
        (replace(BASE, silent={"engine-0": 9.0}, publishing=3, publishing_s=9.0), "weight sync", "engine-0"),
        (replace(BASE, away=["worker-0"]), "dispatch", "worker-0"),
        (
            replace(BASE, publishing=3, publishing_s=9.0, publication_awaits=["engine-1.0"]),
            "weight sync",
            "engine-1.0",
        ),
        (replace(BASE, learner_phase="training", learner_phase_s=9.0), "training", "learner-0"),
        (replace(BASE, learner_phase="saving", learner_phase_s=9.0), "saving", "learner-0"),
        (replace(BASE, waits=[wait(Doing.GENERATING, "engine-0.0")]), "generation", "engine-0.0"),
        (replace(SPLIT, waits=[wait(Doing.GENERATING, "engine-0.2")]), "prefill", "engine-0.2"),
        (replace(SPLIT, waits=[wait(Doing.GENERATING, "engine-1.0")]), "decode", "engine-1.0"),
        (replace(SPLIT, silent={"engine-1": 9.0}), "decode", "engine-1"),
        (replace(BASE, waits=[wait(Doing.ENVIRONMENT)]), "environment", "environment-0"),
        (replace(BASE, waits=[wait(Doing.REWARD)]), "reward", "reward-0"),
        (replace(BASE, waits=[wait(Doing.DELIVERING)]), "queue", "queue-0"),
        (replace(BASE, ready=4), "queue", "queue-0"),
        (
            replace(BASE, phase="evaluating", waits=[wait(Doing.ENVIRONMENT, evaluation=True)]),
            "evaluation",
            "environment-0",
        ),
        (replace(BASE, in_flight=0, oldest=()), "dispatch", "controller-0"),
        (BASE, "dispatch", "worker-0.0"),
    ],
)
def test_the_stage_and_the_actor(evidence: Evidence, stage: str, actor: str) -> None:
    stall = judge(evidence)
    assert (stall.stage, stall.actor) == (stage, actor)
    assert str(stall).startswith(f"{stage}: ")
    assert f"({actor})" in str(stall)


def test_the_episode_and_how_long_it_has_waited_are_named() -> None:
    stall = judge(replace(BASE, waits=[wait(Doing.REWARD)]))
    assert (stall.group, stall.episode) == ("g000003", "g000003-1")
    assert str(stall) == "reward: g000003-1 (reward-0): reward for 42 s"


def test_one_of_several_environment_actors_is_said_to_be_one_of_them() -> None:
    assert judge(replace(BASE, alone={}, waits=[wait(Doing.ENVIRONMENT)])).actor == "one of the environment actors"


def test_steady_steps_never_warn_and_a_late_one_does_once_until_it_has_doubled() -> None:
    watch = StallWatch(factor=3.0, floor_s=1.0, first_s=60.0, now=0.0)
    now = 0.0
    for _ in range(50):
        now += 2.0
        assert not watch.overdue(now)
        watch.episode(1.5)
        watch.trained(now)
    assert watch.expected_s() == pytest.approx(7.5)
    assert [watch.overdue(now + wait_s) for wait_s in (7.0, 8.0, 9.0, 15.0, 17.0)] == [False, True, False, False, True]
    watch.episode(500.0)  # held up by the stall: no measure of what to expect
    watch.trained(now + 20.0)
    assert not watch.warned
    assert watch.expected_s() == pytest.approx(7.5)


def test_the_floor_holds_for_quick_steps() -> None:
    watch = StallWatch(factor=3.0, floor_s=30.0, first_s=10.0, now=0.0)
    assert watch.expected_s() == 30.0
    for step in range(5):
        watch.trained(step * 0.1)
    assert watch.expected_s() == 30.0
