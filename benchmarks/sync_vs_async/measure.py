"""From the evidence of a run to its row: the bound for the work that it did, and how far from it the run was. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.sync_vs_async.evidence import Evidence, Generation, Sample, Step
from benchmarks.sync_vs_async.processes import BenchError
from benchmarks.sync_vs_async.work import UnitCosts
from orchestrator.bound import Calibration, LagStatistics, ModeRow, speedup_bound, useful_efficiency


@dataclass(frozen=True)
class RoleCost:
    """Accelerator-seconds (modelled) a trajectory of one role alone, measured, and what the cost model says of the same work."""

    measured_s: float
    analytic_s: float

    @property
    def ratio(self) -> float:
        """Measured over analytic: what the real control plane adds to the cost model."""
        return self.measured_s / self.analytic_s


@dataclass(frozen=True)
class Roles:
    """Both calibrations."""

    rollout: RoleCost
    learner: RoleCost


SATURATED = 2.0
"""Requests for each slot from which on an accelerator is taken to have all its slots full (sessions are not spread evenly)."""


def calibrate_rollout(
    evidence: Evidence, costs: UnitCosts, accelerators: int, slots: int, time_scale: float
) -> RoleCost:
    """w from the part of a run in which all slots are full: accelerator-seconds over the work done in them.

    ``slots`` are those of one accelerator. Raises BenchError when they were never full.
    """
    generations = list(evidence.generations())
    began_at, ended_at = saturated_between(generations, SATURATED * accelerators * slots)
    done_s = costs.generated_s(generations, began_at, ended_at)
    if done_s <= 0:
        raise BenchError(
            f"calibration of w: there were never {SATURATED:g} requests for each of {accelerators * slots} slots"
        )
    ratio = accelerators * (ended_at - began_at) / done_s
    analytic_s = costs.rollout_s(evidence.samples) / len(evidence.samples) * time_scale
    return RoleCost(ratio * analytic_s, analytic_s)


def saturated_between(generations: Sequence[Generation], least: float) -> tuple[float, float]:
    """The longest time in which at least ``least`` requests were open; (0, 0) when there were never so many."""
    changes = sorted([(one.began_at, 1) for one in generations] + [(one.ended_at, -1) for one in generations])
    best, began_at, count = (0.0, 0.0), 0.0, 0
    for at, change in changes:
        enough_before, count = count >= least, count + change
        if not enough_before and count >= least:
            began_at = at
        elif enough_before and count < least and at - began_at > best[1] - best[0]:
            best = (began_at, at)
    return best


def calibrate_learner(evidence: Evidence, costs: UnitCosts, accelerators: int, time_scale: float) -> RoleCost:
    """tau from the steps of a learner for which groups wait; where heavy tails made it wait all the same, that time is
    left out."""
    steps = evidence.steps[1:]
    waited_s = sum(max(0.0, step.metrics["time/wait_s"]) for step in steps[1:])
    took_s = steps[-1].ended_at - steps[0].ended_at - waited_s
    samples = [sample for step in steps[1:] for sample in step.samples]
    analytic_s = costs.training_s(samples) / len(samples) * time_scale
    return RoleCost(accelerators * took_s * time_scale / len(samples), analytic_s)


@dataclass(frozen=True)
class Window:
    """The steady state of a run. Seconds are wall seconds."""

    steps: list[Step]
    began_at: float
    ended_at: float
    rollout_s: float
    """Accelerator-seconds (analytic) of what was generated in it and trained at some time."""
    training_s: float
    """Accelerator-seconds (analytic) of what was trained in it."""
    makespan_s: float
    """Mean time from a step's first request to its last token (of use where steps do not overlap)."""
    training_from: float = 0.0
    """When training began (Unix seconds)."""
    before: Step | None = None
    """The step before the first."""

    @property
    def step_s(self) -> float:
        return (self.ended_at - self.began_at) / len(self.steps)

    @property
    def trajectories(self) -> float:
        """B: trajectories trained a step."""
        return sum(len(step.samples) for step in self.steps) / len(self.steps)


def window_of(evidence: Evidence, costs: UnitCosts, skip: int, leave: int) -> Window:
    """Cut out the steady state: without the first ``skip`` steps and the last ``leave``."""
    steps = evidence.window(skip, leave)
    began_at = evidence.steps[skip - 1].ended_at if skip > 0 else _first_request(evidence.samples)
    ended_at = steps[-1].ended_at
    trained = {sample.group_id for step in evidence.steps for sample in step.samples}
    useful = (one for sample in evidence.samples if sample.group_id in trained for one in sample.generations)
    spans = [_makespan(step.samples) for step in steps]
    return Window(
        steps=steps,
        began_at=began_at,
        ended_at=ended_at,
        rollout_s=costs.generated_s(useful, began_at, ended_at),
        training_s=costs.training_s(sample for step in steps for sample in step.samples),
        makespan_s=sum(spans) / len(spans),
        training_from=_training_from(evidence.steps[0]),
        before=evidence.steps[skip - 1] if skip > 0 else None,
    )


def _training_from(first: Step) -> float:
    return first.ended_at - float(first.metrics.get("time/step_s", 0.0))


def _first_request(samples: Sequence[Sample]) -> float:
    return min(one.began_at for sample in samples for one in sample.generations)


def _makespan(samples: Sequence[Sample]) -> float:
    times = [(one.began_at, one.ended_at) for sample in samples for one in sample.generations]
    return max(ended for _, ended in times) - min(began for began, _ in times) if times else 0.0


def calibration_of(window: Window, roles: Roles, accelerators: int, time_scale: float) -> Calibration:
    """w and tau of the trajectories of this very window, in modelled seconds."""
    count = len(window.steps) * window.trajectories
    return Calibration(
        w_s=window.rollout_s * roles.rollout.ratio / count * time_scale,
        tau_s=window.training_s * roles.learner.ratio / count * time_scale,
        accelerators=accelerators,
    )


@dataclass(frozen=True)
class Synchronous:
    """What the synchronous run says about every system on these resources."""

    step_s: float
    """Modelled seconds."""
    efficiency: float
    rho: float
    phi: float
    sigma: float
    formula_s: float
    """What T* (1 + rho (phi - 1) + sigma) says that the step takes, in modelled seconds."""

    @property
    def error(self) -> float:
        """Measured step over the formula's, less 1."""
        return self.step_s / self.formula_s - 1.0

    @property
    def speedup_bound(self) -> float:
        return speedup_bound(self.rho, self.phi, self.sigma)


def synchronous_of(window: Window, calibration: Calibration, overhead_s: float, time_scale: float) -> Synchronous:
    """phi from the makespans, sigma from the known cost of changing roles (``overhead_s`` a step, modelled seconds)."""
    batch, step_s = window.trajectories, window.step_s * time_scale
    phi = calibration.makespan_ratio(window.makespan_s * time_scale, batch)
    return Synchronous(
        step_s=step_s,
        efficiency=calibration.efficiency(step_s, batch),
        rho=calibration.rho,
        phi=phi,
        sigma=calibration.overhead_ratio(overhead_s, batch),
        formula_s=calibration.synchronous_step_s(phi, overhead_s, batch),
    )


@dataclass(frozen=True)
class Result:
    """A mode's row and what else is known of its run."""

    row: ModeRow
    calibration: Calibration
    extra: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return {**self.row.to_dict(), "w_s": self.calibration.w_s, "tau_s": self.calibration.tau_s, **self.extra}


def row_of(
    mode: str,
    window: Window,
    calibration: Calibration,
    reference: Synchronous | None,
    summary: Mapping[str, Any],
    time_scale: float,
    max_lag: int,
) -> ModeRow:
    """The row of a mode; without a synchronous ``reference`` S, S_max and phi are those of doing nothing better (1)."""
    step_s = window.step_s * time_scale
    e = calibration.efficiency(step_s, window.trajectories)
    lags: Counter[int] = Counter()
    for step in window.steps:
        lags.update(step.lags())
    sampled = sum(lags.values())
    trained = {lag: tokens for lag, tokens in lags.items() if lag <= max_lag}
    masked = (sampled - sum(trained.values())) / sampled if sampled else 0.0
    tokens = summary.get("tokens", {})
    generated = tokens.get("generated", 0)
    waste = tokens.get("wasted", 0) / generated if generated else 0.0
    idle = idle_shares(window) or {str(cause): float(share) for cause, share in summary.get("idle", {}).items()}
    return ModeRow(
        mode=mode,
        step_s=step_s,
        efficiency=e,
        useful_efficiency=useful_efficiency(e, (1.0 - masked) * (1.0 - waste), 1.0),
        speedup=e / reference.efficiency if reference else 1.0,
        speedup_bound=reference.speedup_bound if reference else 1.0,
        phi=reference.phi if reference else 1.0,
        rho=calibration.rho,
        lag=LagStatistics.of(trained),
        waste=waste,
        masked=masked,
        ks=float(window.steps[-1].metrics.get("lengths/ks") or summary.get("lengths_ks") or 0.0),
        prefix_hit=float(summary.get("prefix_hit") or 0.0),
        exposed_sync=idle.get("weight_stall", 0.0),
        idle=idle,
    )


IDLE = "idle/"


def idle_shares(window: Window) -> dict[str, float]:
    """Shares of all accelerator-seconds of the window by the cause of standing still.

    Each step's metrics have them for the training so far; those at the window's two ends, weighted with the time until
    then, give the window's own. Empty when the steps tell none.
    """
    last = window.steps[-1]
    causes = [key.removeprefix(IDLE) for key in last.metrics if key.startswith(IDLE)]
    until_end = window.ended_at - window.training_from
    until_begin = window.began_at - window.training_from if window.before is not None else 0.0
    length = until_end - until_begin
    if length <= 0:
        return {}
    before = window.before.metrics if window.before is not None else {}
    shares = {
        cause: (last.metrics[IDLE + cause] * until_end - before.get(IDLE + cause, 0.0) * until_begin) / length
        for cause in causes
    }
    return {cause: round(share, 5) for cause, share in shares.items() if share > 0}
