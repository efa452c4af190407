"""One suite: calibrate each role alone, run every mode on the same accelerators and episodes, and make the rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.sync_vs_async.clusters import (
    BASE,
    Cluster,
    Split,
    config_of,
    learner_alone,
    mode_settings,
    overrides_of,
    rollout_alone,
    unmeasured,
)
from benchmarks.sync_vs_async.evidence import Evidence, read_evidence
from benchmarks.sync_vs_async.faults import EngineKiller
from benchmarks.sync_vs_async.measure import (
    Result,
    RoleCost,
    Roles,
    Synchronous,
    Window,
    calibrate_learner,
    calibrate_rollout,
    calibration_of,
    row_of,
    synchronous_of,
    window_of,
)
from benchmarks.sync_vs_async.processes import FinishedRun, train
from benchmarks.sync_vs_async.work import UnitCosts
from orchestrator.bound import Calibration, split_of
from orchestrator.planning.costs import workload_costs
from orchestrator.simulator.simulate import calibration_of as calibration_of_config

BUSY_MACHINE = 0.8
"""Share of all cores above which the real control plane distorts modelled time."""
Say = Callable[[str], None]


@dataclass
class SuiteResult:
    """A suite's calibration, split and rows for one seed."""

    cluster: Cluster
    seed: int
    roles: Roles
    split: Split
    split_efficiency: float
    """E that whole accelerators allow: T* over the slower of the two sides."""
    rows: list[Result] = field(default_factory=list)
    synchronous: Synchronous | None = None
    warnings: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        rollout, learner = self.roles.rollout, self.roles.learner
        return {
            "suite": self.cluster.suite,
            "seed": self.seed,
            "scale": {"time": self.cluster.time_scale, "tokens": self.cluster.token_scale},
            "accelerators": self.cluster.accelerators,
            "split": {"rollout": self.split.rollout, "learner": self.split.learner, "E": self.split_efficiency},
            "calibration": {
                "w_s": rollout.measured_s,
                "w_analytic_s": rollout.analytic_s,
                "tau_s": learner.measured_s,
                "tau_analytic_s": learner.analytic_s,
            },
            "synchronous_formula": None
            if self.synchronous is None
            else {
                "step_s": self.synchronous.step_s,
                "formula_s": self.synchronous.formula_s,
                "error": self.synchronous.error,
                "sigma": self.synchronous.sigma,
            },
            "rows": [result.to_dict() for result in self.rows],
            "warnings": self.warnings,
        }


class Campaign:
    """Runs one suite. Every run is a ``millrace train`` of its own under ``directory``."""

    def __init__(
        self,
        cluster: Cluster,
        seed: int,
        directory: Path,
        say: Say,
        more: tuple[str, ...],
        timeout_s: float,
        calibrate: bool = True,
    ) -> None:
        """``calibrate`` False takes the cost model's w and tau instead of measuring them."""
        self._measure_roles = calibrate
        self._cluster = cluster
        self._seed = seed
        self._directory = directory / f"{cluster.suite}-{seed}"
        self._say = say
        self._more = more
        self._timeout_s = timeout_s

    def run(self, modes: Sequence[str]) -> SuiteResult:
        """Calibrate and run ``modes`` (``sync`` first, whatever their order: the others are compared with it).

        Raises:
            BenchError: A run failed or is too short.
        """
        cluster = self._cluster
        roles = self.calibrate() if self._measure_roles else self._modelled()
        balance = self._balance(roles)
        split = Split(*split_of(balance, cluster.replicas))
        slower = max(balance.w_s / split.rollout, balance.tau_s / split.learner)
        result = SuiteResult(cluster, self._seed, roles, split, balance.ideal_step_s(1) / slower)
        for mode in sorted(modes, key=lambda mode: mode != "sync"):
            result.rows.append(self._mode(mode, result))
        return result

    def calibrate(self) -> Roles:
        """Both roles alone, on half of the accelerators each; what counts is a rate per accelerator."""
        half = Split(self._cluster.accelerators // 2, self._cluster.accelerators // 2)
        half = Split(half.rollout // self._cluster.replicas * self._cluster.replicas, half.learner)
        run, evidence, costs = self._train("calibrate-rollout", rollout_alone(self._cluster, half, self._seed))
        rollout = calibrate_rollout(evidence, costs, half.rollout, self._cluster.slots, self._cluster.time_scale)
        self._cpu(run, evidence, 1, 2, [])
        run, evidence, costs = self._train("calibrate-learner", learner_alone(self._cluster, half, self._seed))
        learner = calibrate_learner(evidence, costs, half.learner, self._cluster.time_scale)
        self._say(
            f"  w = {rollout.measured_s:.1f} s (cost model {rollout.analytic_s:.1f}), "
            f"tau = {learner.measured_s:.1f} s (cost model {learner.analytic_s:.1f})"
        )
        return Roles(rollout, learner)

    def _balance(self, roles: Roles) -> Calibration:
        """w and tau of the episodes that the asynchronous run dispatches, as dear as calibration found them.

        The calibrating runs see what ends first, and with heavy tails that is not what a run is made of.
        """
        cluster = self._cluster
        half = cluster.accelerators // 2
        settings = mode_settings(cluster, "async", Split(half, cluster.accelerators - half), self._seed)
        config = config_of(overrides_of(settings, self._more))
        costs = workload_costs(config, episodes=config.run.steps * cluster.batch)
        modelled = calibration_of_config(config, costs)
        ratios = roles.rollout.ratio, roles.learner.ratio
        return Calibration(modelled.w_s * ratios[0], modelled.tau_s * ratios[1], cluster.accelerators)

    def _modelled(self) -> Roles:
        """What the cost model says of the suite's episodes."""
        cluster = self._cluster
        config = config_of(overrides_of(mode_settings(cluster, "sync", Split(0, 0), self._seed), self._more))
        found = calibration_of_config(config)
        return Roles(RoleCost(found.w_s, found.w_s), RoleCost(found.tau_s, found.tau_s))

    def _mode(self, mode: str, result: SuiteResult) -> Result:
        cluster = self._cluster.timed_for(mode)
        killer = None
        if cluster.kill_every_s is not None:
            killer = EngineKiller(cluster.kill_every_s / cluster.time_scale)
        run, evidence, costs = self._train(mode, mode_settings(cluster, mode, result.split, self._seed), killer)
        skip, leave = unmeasured(cluster, mode)
        window = window_of(evidence, costs, skip, leave)
        calibration = calibration_of(window, result.roles, cluster.accelerators, cluster.time_scale)
        if mode == "sync":
            overhead_s = cluster.step_overhead_s + cluster.switch_s + cluster.stage_s + cluster.update_pause_s
            result.synchronous = synchronous_of(window, calibration, overhead_s, cluster.time_scale)
        max_lag = {"sync": 0, "one_step": 1}.get(mode, cluster.max_lag)
        row = row_of(mode, window, calibration, result.synchronous, run.summary, cluster.time_scale, max_lag)
        extra = self._cpu(run, evidence, skip, leave, result.warnings) | {
            "E_model": self._by_the_model(window, cluster.time_scale),
            "time_scale": cluster.time_scale,
            "steps": len(evidence.steps),
            "measured_steps": [window.steps[0].number, window.steps[-1].number],
            "trajectories": window.trajectories,
            "ledger": run.summary.get("ledger", {}),
            "run_wall_s": run.wall_s,
        }
        if killer is not None:
            extra |= killer.report(run.directory, cluster.time_scale)
        return Result(row, calibration, extra)

    def _by_the_model(self, window: Window, scale: float) -> float:
        """E with the cost model's own w and tau: below E by what a busy machine added to the calibration."""
        nothing_added = Roles(RoleCost(1.0, 1.0), RoleCost(1.0, 1.0))
        calibration = calibration_of(window, nothing_added, self._cluster.accelerators, scale)
        return calibration.efficiency(window.step_s * scale, window.trajectories)

    def _cpu(
        self, run: FinishedRun, evidence: Evidence, skip: int, leave: int, warnings: list[str]
    ) -> dict[str, float]:
        began_at = evidence.steps[max(0, skip - 1)].ended_at
        own, machine = run.cpu_share(began_at, evidence.steps[-1 - leave].ended_at)
        if machine > BUSY_MACHINE:
            warnings.append(
                f"{run.directory.name}: the machine's cores were {machine:.0%} busy (this run {own:.0%}): real CPU time "
                "distorts modelled time; lower the time scale or leave the machine alone"
            )
        return {"cpu_share": own, "machine_cpu_share": machine}

    def _train(
        self, name: str, settings: dict[str, object], killer: EngineKiller | None = None
    ) -> tuple[FinishedRun, Evidence, UnitCosts]:
        overrides = overrides_of(settings, self._more)
        self._say(f"{self._cluster.suite}, seed {self._seed}: {name}")
        costs = UnitCosts.from_config(config_of(overrides))
        run = train(BASE, overrides, self._directory / name, self._timeout_s, killer.watch if killer else None)
        return run, read_evidence(run.directory), costs
