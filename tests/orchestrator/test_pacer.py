from __future__ import annotations

from experience.config import LagControl, StalenessConfig
from experience.staleness import Progress
from orchestrator.pacer import Pacer

CLOSE = {"staleness/ess": 0.999, "staleness/second_moment": 0.001}
FAR = {"staleness/ess": 0.5, "staleness/second_moment": 0.5}


def room(pacer: Pacer) -> int:
    return pacer.policy.admit(Progress(dispatched=0, returned=0, version=0))


def test_a_fixed_target_stays_whatever_is_measured() -> None:
    pacer = Pacer(StalenessConfig(target_lag=1.0), groups_per_update=8)
    assert [pacer.trained(FAR) for _ in range(5)] == [{}] * 5
    assert room(pacer) == 16


def test_an_adaptive_target_moves_what_may_start() -> None:
    pacer = Pacer(StalenessConfig(target_lag=2.0, max_lag=4, controller=LagControl.adaptive), groups_per_update=8)
    assert room(pacer) == 24
    told = [pacer.trained(FAR)["staleness/target_lag"] for _ in range(3)]
    assert told == [2.0, 2.0, 1.0]
    assert room(pacer) == 16
    for _ in range(150):
        pacer.trained(CLOSE)
    assert room(pacer) == 40, "no further ahead than max_lag"


def test_a_step_without_trained_tokens_tells_nothing() -> None:
    pacer = Pacer(StalenessConfig(target_lag=2.0, max_lag=4, controller=LagControl.adaptive), groups_per_update=8)
    assert [pacer.trained({})["staleness/target_lag"] for _ in range(9)] == [2.0] * 9
