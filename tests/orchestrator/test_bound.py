"""The bound's formulas against closed forms."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.bound import (
    Calibration,
    LagStatistics,
    ModeRow,
    efficiency,
    ideal_step_s,
    speedup_bound,
    split_of,
    steady_step_s,
    useful_efficiency,
    weighted_quantile,
)

positive = st.floats(0.01, 1000.0)


def test_the_ideal_step() -> None:
    calibration = Calibration(w_s=30.0, tau_s=10.0, accelerators=8)
    assert calibration.rho == 0.75
    assert ideal_step_s(calibration, 128) == 640.0
    assert calibration.efficiency(800.0, 128) == pytest.approx(0.8)
    assert useful_efficiency(0.8, 90, 100) == pytest.approx(0.72)


@given(positive, positive, st.floats(1.0, 20.0), st.floats(0.0, 100.0))
def test_the_bound_is_the_synchronous_step_over_the_ideal_one(
    w: float, tau: float, phi: float, overhead: float
) -> None:
    calibration = Calibration(w, tau, 16)
    makespan = phi * 64 * w / 16
    bound = speedup_bound(
        calibration.rho, calibration.makespan_ratio(makespan, 64), calibration.overhead_ratio(overhead, 64)
    )
    synchronous = makespan + 64 * tau / 16 + overhead
    assert bound == pytest.approx(synchronous / calibration.ideal_step_s(64))
    assert calibration.synchronous_step_s(phi, overhead, 64) == pytest.approx(synchronous)


def test_a_makespan_below_its_ideal_counts_as_ideal() -> None:
    assert Calibration(1.0, 1.0, 4).makespan_ratio(0.1, 64) == 1.0


@given(positive, positive, st.integers(2, 300))
def test_the_split_is_the_best_of_all(w: float, tau: float, total: int) -> None:
    rollout, learner = split_of(Calibration(w, tau, total))
    assert rollout + learner == total
    steps = [max(w / n, tau / (total - n)) for n in range(1, total)]
    assert max(w / rollout, tau / learner) == min(steps)


def test_the_split_in_units() -> None:
    assert split_of(Calibration(3.0, 1.0, 64), unit=8) == (48, 16)
    with pytest.raises(ValueError, match="do not make two groups"):
        split_of(Calibration(3.0, 1.0, 8), unit=8)


def test_quantiles_are_weighted_by_tokens() -> None:
    histogram = {0: 50, 1: 48, 7: 2}
    assert [weighted_quantile(histogram, share) for share in (0.5, 0.51, 0.98, 0.99, 1.0)] == [0, 1, 1, 7, 7]
    assert LagStatistics.of(histogram) == LagStatistics(mean=0.62, p50=0, p99=7, largest=7)
    assert LagStatistics.of({}) == LagStatistics()


def test_steady_steps_leave_out_the_first() -> None:
    ends = [10.0, 13.0, 15.0, 17.0]
    assert steady_step_s(ends, 0.0, skip=2) == 2.0
    assert steady_step_s(ends, 0.0, skip=0) == 4.25
    assert steady_step_s(ends, 0.0, skip=9) == 2.0
    with pytest.raises(ValueError, match="no step ended"):
        steady_step_s([], 0.0, 0)


def test_nonsense_is_refused() -> None:
    with pytest.raises(ValueError, match="accelerators"):
        Calibration(1.0, 1.0, 0)
    with pytest.raises(ValueError, match="w_s and tau_s"):
        Calibration(-1.0, 1.0, 8)
    assert efficiency(1.0, 0.0) == 0.0


def test_a_row_has_the_keys_of_the_json_file() -> None:
    row = ModeRow("async", 2.0, 0.9, 0.8, 1.5, 1.7, 2.0, 0.7, LagStatistics(1.0, 1, 3, 4), 0.0, 0.1, 0.02, 0.5, 0.0)
    assert list(row.to_dict()) == [
        "mode",
        "step_s",
        "E",
        "E_useful",
        "S",
        "S_max",
        "phi",
        "rho",
        "lag_mean",
        "lag_p50",
        "lag_p99",
        "lag_max",
        "waste",
        "masked",
        "ks",
        "prefix_hit",
        "exposed_sync",
        "idle",
    ]
