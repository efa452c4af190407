"""The bound of a run that trains for real: cores in place of accelerators, each role measured alone on one thread. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

from benchmarks.sync_vs_async.processes import BenchError
from experience.accounting import Cause
from orchestrator.bound import Calibration, speedup_bound, useful_efficiency

ROLLOUT = (Cause.PREFILL, Cause.DECODE)


def core_seconds(summary: Mapping[str, Any], steps: Sequence[Mapping[str, Any]], cores: int) -> Calibration:
    """w and tau of a trajectory in core-seconds.

    From a synchronous run with one thread a role and without evaluations (``steps``: the metrics of all its steps): there
    each role works alone. Raises BenchError when the run left no accounts.
    """
    rollout, training = 0.0, 0.0
    for lane, seconds in summary.get("accounting", {}).items():
        if lane.startswith("engine"):
            rollout += sum(seconds.get(cause, 0.0) for cause in ROLLOUT)
        elif lane.startswith("learner"):
            training += seconds.get(Cause.TRAIN, 0.0)
    trajectories = sum(step.get("episodes/rewarded", 0.0) for step in steps)
    if trajectories <= 0 or rollout + training <= 0:
        raise BenchError("the tuning run left no accounts of its engine and learner, or trained nothing")
    return Calibration(rollout / trajectories, training / trajectories, cores)


@dataclass(frozen=True)
class SyncStep:
    """A synchronous run's steps against the bound."""

    step_s: float
    phi: float
    sigma: float
    calibration: Calibration

    @classmethod
    def of(cls, calibration: Calibration, steps: Sequence[Mapping[str, Any]], step_s: float) -> SyncStep:
        """phi from the time that the learner waited for all groups of a step; sigma is what neither role explains."""
        batch = mean(step["episodes/rewarded"] for step in steps)
        phi = calibration.makespan_ratio(min(step_s, _median_wait(steps)), batch)
        known_s = calibration.synchronous_step_s(phi, 0.0, batch)
        return cls(step_s, phi, calibration.overhead_ratio(max(0.0, step_s - known_s), batch), calibration)

    @property
    def speedup_bound(self) -> float:
        return speedup_bound(self.calibration.rho, self.phi, self.sigma)


def _median_wait(steps: Sequence[Mapping[str, Any]]) -> float:
    waits = sorted(float(step["time/wait_s"]) for step in steps)
    return waits[len(waits) // 2]


def against_the_bound(row: Mapping[str, Any], sync: SyncStep, batch: float) -> dict[str, float]:
    """The keys of a row that compare it with the bound."""
    e = sync.calibration.efficiency(row["step_s"], batch)
    return {
        "E": e,
        "E_useful": useful_efficiency(e, 1.0 - row["masked"] - row["waste"], 1.0),
        "S": sync.step_s / row["step_s"],
        "S_max": sync.speedup_bound,
        "phi": sync.phi,
        "rho": sync.calibration.rho,
        "exposed_sync": row["idle"].get(Cause.WEIGHT_STALL, 0.0),
    }
