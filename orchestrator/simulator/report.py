"""From a simulated run to the row of ``sync-vs-async``, and the table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from experience.accounting import WORK, Cause
from orchestrator.bound import Calibration, LagStatistics, ModeRow, speedup_bound, useful_efficiency
from orchestrator.simulator.accounts import Accounts
from orchestrator.simulator.cluster import Cluster


@dataclass(frozen=True)
class Outcome:
    """One mode, simulated: its accounts over the steps that count."""

    mode: str
    cluster: Cluster
    window: Accounts
    ks: float
    events: int
    wall_s: float
    """Wall-clock seconds that the simulation took."""

    @property
    def step_s(self) -> float:
        return self.window.at / self.window.steps

    @property
    def trajectories(self) -> float:
        """A step's."""
        return self.window.episodes / self.window.steps


def window_of(states: Sequence[Accounts], target_lag: float, skip: int | None = None) -> Accounts:
    """The accounts without the first ``skip`` steps, in which the pipeline fills (None: two more than ``target_lag``).

    ``states`` are those at the beginning and after each step; at least one step counts.
    """
    wanted = math.ceil(target_lag) + 2 if skip is None else skip
    first = max(0, min(wanted, len(states) - 2))
    return states[-1].since(states[first])


def phi_and_sigma(synchronous: Outcome, calibration: Calibration) -> tuple[float, float]:
    """phi and sigma of a synchronous outcome (see `orchestrator.bound`)."""
    window, trajectories = synchronous.window, synchronous.trajectories
    makespan = sum(window.makespans) / max(1, len(window.makespans))
    overhead = sum(window.overheads) / max(1, len(window.overheads))
    return calibration.makespan_ratio(makespan, trajectories), calibration.overhead_ratio(overhead, trajectories)


def row_of(outcome: Outcome, calibration: Calibration, synchronous: Outcome | None) -> ModeRow:
    """The row of a mode; without a synchronous outcome phi is 1, S and S_max are those of a perfect synchronous run."""
    window = outcome.window
    e = calibration.efficiency(outcome.step_s, outcome.trajectories)
    settled = window.trained + window.masked + window.wasted
    phi, sigma = phi_and_sigma(synchronous, calibration) if synchronous else (1.0, 0.0)
    reference = synchronous.step_s if synchronous else calibration.ideal_step_s(outcome.trajectories)
    return ModeRow(
        mode=outcome.mode,
        step_s=outcome.step_s,
        efficiency=e,
        useful_efficiency=useful_efficiency(e, window.trained, settled),
        speedup=reference / outcome.step_s,
        speedup_bound=speedup_bound(calibration.rho, phi, sigma),
        phi=phi,
        rho=calibration.rho,
        lag=LagStatistics.of(window.lags),
        waste=window.wasted / settled if settled else 0.0,
        masked=window.masked / settled if settled else 0.0,
        ks=outcome.ks,
        prefix_hit=window.cached / window.prompt if window.prompt else 0.0,
        exposed_sync=_exposed(outcome),
        idle=idle_shares(window),
    )


def idle_shares(window: Accounts) -> dict[str, float]:
    """Share of all accelerator-seconds that were no work, by reason."""
    total = sum(window.rollout.values()) + sum(window.learner.values())
    shares: dict[str, float] = {}
    for account in (window.rollout, window.learner):
        for cause, seconds in account.items():
            if cause not in WORK and seconds > 0:
                shares[cause.value] = shares.get(cause.value, 0.0) + seconds / total
    return dict(sorted(shares.items(), key=lambda item: -item[1]))


def _exposed(outcome: Outcome) -> float:
    stalled = outcome.window.rollout.get(Cause.WEIGHT_STALL, 0.0)
    total = sum(outcome.window.rollout.values())
    return stalled / total if total else 0.0


def render_rows(rows: Sequence[ModeRow], title: str) -> Table:
    """The rows side by side, one column a mode."""
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    table.add_column("", style="cyan", no_wrap=True)
    for row in rows:
        table.add_column(row.mode, justify="right", no_wrap=True)
    values = [row.to_dict() for row in rows]
    for key in values[0] if values else []:
        if key not in ("mode", "idle"):
            table.add_row(key, *(_text(key, value[key]) for value in values))
    for cause in dict.fromkeys(cause for row in rows for cause in row.idle):
        table.add_row(f"idle: {cause}", *(_text("share", row.idle.get(cause, 0.0)) for row in rows))
    return table


def _text(key: str, value: Any) -> str:
    if isinstance(value, int):
        return str(value)
    return f"{value:.1f}" if key == "step_s" else f"{value:.3f}"
