"""``millrace bench simulator``: the simulator against real runs of the same configurations on the synthetic engine."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from benchmarks.output import document, save_figure, write_json
from benchmarks.sync_vs_async.clusters import (
    BASE,
    CLUSTERS,
    Cluster,
    Split,
    config_of,
    find_cluster,
    mode_settings,
    overrides_of,
    unmeasured,
)
from benchmarks.sync_vs_async.evidence import read_evidence
from benchmarks.sync_vs_async.measure import window_of
from benchmarks.sync_vs_async.processes import BenchError, train
from benchmarks.sync_vs_async.work import UnitCosts
from orchestrator.bound import LagStatistics, split_of
from orchestrator.composition import ConfigError
from orchestrator.config import Config, load
from orchestrator.run_directory import RunDirectory
from orchestrator.simulator.report import Outcome
from orchestrator.simulator.simulate import calibration_of, simulate_mode
from orchestrator.simulator.simulation import SimulationOptions

WITHIN = 0.10
"""The agreement asked for, in step time and mean lag."""
TABLE_WIDTH = 100
LEAST_LAG = 0.05
"""Lags (versions) that differ by less agree, whatever their ratio."""


@dataclass(frozen=True)
class Pair:
    """A run and its simulation. Seconds are modelled."""

    suite: str
    mode: str
    steps: int
    """Steps compared."""
    real_step_s: float
    simulated_step_s: float
    real_lag: float
    simulated_lag: float
    real_wall_s: float
    simulated_wall_s: float

    @property
    def step_error(self) -> float:
        """Simulated over real, less 1."""
        return self.simulated_step_s / self.real_step_s - 1.0

    @property
    def lag_error(self) -> float:
        """Simulated over real mean lag, less 1; 0 where both are next to nothing."""
        if abs(self.simulated_lag - self.real_lag) <= LEAST_LAG:
            return 0.0
        return self.simulated_lag / self.real_lag - 1.0

    @property
    def agrees(self) -> bool:
        return max(abs(self.step_error), abs(self.lag_error)) <= WITHIN


def compare(cluster: Cluster, mode: str, seed: int, directory: Path, timeout_s: float) -> Pair:
    """Run a mode of a suite's cluster for real and simulated, and compare the same steps of both.

    The split of the accelerators is the cost model's. Raises BenchError when the run fails or is too short.
    """
    cluster = cluster.timed_for(mode)
    shared = config_of(overrides_of(mode_settings(cluster, "sync", Split(0, 0), seed)))
    split = Split(*split_of(calibration_of(shared), cluster.replicas))
    overrides = overrides_of(mode_settings(cluster, mode, split, seed))
    run = train(BASE, overrides, directory / f"{cluster.suite}-{seed}" / mode, timeout_s)
    return compare_run(cluster, mode, run.directory, run.wall_s)


def compare_run(cluster: Cluster, mode: str, run: Path, wall_s: float | None = None) -> Pair:
    """Simulate the configuration of a finished run and compare all steps of both but those of the warm-up.

    Raises BenchError when there is no such run or it is too short.
    """
    files = RunDirectory(run)
    if not files.summary.is_file():
        raise BenchError(f"{run} holds no finished run of {cluster.suite}, {mode}; run it, or leave --runs out")
    config = load([str(files.config)])
    skip, _ = unmeasured(cluster, mode)
    outcome = simulate_as(config, skip)
    evidence = read_evidence(run)
    window = window_of(evidence, UnitCosts.from_config(config), skip, leave=0)
    lags: Counter[int] = Counter()
    for step in window.steps:
        lags.update(step.lags())
    kept = {lag: tokens for lag, tokens in lags.items() if lag <= config.staleness.max_lag}
    summary = json.loads(files.summary.read_text(encoding="utf-8"))
    return Pair(
        suite=cluster.suite,
        mode=mode,
        steps=len(window.steps),
        real_step_s=window.step_s * config.engines.synthetic.time_scale,
        simulated_step_s=outcome.step_s,
        real_lag=LagStatistics.of(kept).mean,
        simulated_lag=LagStatistics.of(outcome.window.lags).mean,
        real_wall_s=float(summary["wall_s"]) if wall_s is None else wall_s,
        simulated_wall_s=outcome.wall_s,
    )


def simulate_as(config: Config, skip: int) -> Outcome:
    """The simulation of a run as it is: dispatching ends with what is trained, so its last steps are alike too."""
    return simulate_mode(config, SimulationOptions(open_ended=False), skip, 0)


def render_pairs(pairs: list[Pair]) -> Table:
    """Real and simulated side by side."""
    table = Table(box=None, pad_edge=False)
    for name in (
        "suite",
        "mode",
        "steps",
        "step s",
        "simulated",
        "error",
        "mean lag",
        "simulated",
        "error",
        "wall s",
        "",
    ):
        table.add_column(name, justify="left" if name in ("suite", "mode", "") else "right", no_wrap=True)
    for pair in pairs:
        table.add_row(
            pair.suite,
            pair.mode,
            str(pair.steps),
            f"{pair.real_step_s:.0f}",
            f"{pair.simulated_step_s:.0f}",
            f"{pair.step_error:+.1%}",
            f"{pair.real_lag:.2f}",
            f"{pair.simulated_lag:.2f}",
            f"{pair.lag_error:+.1%}",
            f"{pair.real_wall_s:.0f} / {pair.simulated_wall_s:.1f}",
            "" if pair.agrees else "differs",
        )
    return table


def figure_of(pairs: list[Pair]) -> Any:
    """Step times, simulated over real."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3))
    axes = figure.subplots()
    names = [f"{pair.suite}\n{pair.mode}" for pair in pairs]
    axes.bar(names, [pair.simulated_step_s / pair.real_step_s for pair in pairs], color="#4477aa")
    axes.axhspan(1 - WITHIN, 1 + WITHIN, color="#ccbb44", alpha=0.3)
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.set_ylabel("step time, simulated / real")
    return figure


@click.command("simulator")
@click.option(
    "--suite", "suites", multiple=True, help=f"{', '.join(CLUSTERS)}; may be repeated. [default: reason, swe, mixed]"
)
@click.option("--modes", default="sync,async", show_default=True)
@click.option(
    "--runs",
    type=click.Path(path_type=Path, file_okay=False, exists=True),
    help="Compare with the runs that `bench sync-vs-async --dir` left here, instead of new ones.",
)
@click.option("--accelerators", type=click.IntRange(min=4), default=64, show_default=True)
@click.option("--steps", type=click.IntRange(min=2), default=6, show_default=True, help="Steps compared.")
@click.option("--time-scale", type=click.FloatRange(min=0, min_open=True), help="Instead of each suite's own.")
@click.option("--seed", default=0, show_default=True)
@click.option("--dir", "directory", type=click.Path(path_type=Path), default=Path("runs/simulator"), show_default=True)
@click.option(
    "--json", "json_path", type=click.Path(path_type=Path, dir_okay=False), help="Write the result to this file."
)
@click.option(
    "--figure", "figure_path", type=click.Path(path_type=Path, dir_okay=False), help="Draw it (.svg or .png)."
)
@click.option("--timeout", "timeout_s", default=1800.0, show_default=True, help="Most seconds for one run.")
def simulator(
    suites: tuple[str, ...],
    modes: str,
    runs: Path | None,
    accelerators: int,
    steps: int,
    time_scale: float | None,
    seed: int,
    directory: Path,
    json_path: Path | None,
    figure_path: Path | None,
    timeout_s: float,
) -> None:
    """Compare simulated with real runs of the synthetic engine: step time and mean lag."""
    from dataclasses import replace

    console, pairs = Console(), []
    console.width = max(console.width, TABLE_WIDTH)
    try:
        for suite in suites or ("reason", "swe", "mixed"):
            cluster = find_cluster(suite)
            if runs is not None:
                found = runs / f"{suite}-{seed}"
                pairs += [compare_run(cluster, mode, found / mode) for mode in modes.split(",")]
                continue
            cluster = cluster.sized(accelerators).measuring(steps)
            cluster = replace(cluster, time_scale=time_scale) if time_scale is not None else cluster
            pairs += [compare(cluster, mode, seed, directory, timeout_s) for mode in modes.split(",")]
    except (BenchError, ConfigError) as error:
        raise click.ClickException(str(error)) from error
    console.print(render_pairs(pairs))
    if json_path is not None:
        results = [
            {**asdict(p), "step_error": p.step_error, "lag_error": p.lag_error, "agrees": p.agrees} for p in pairs
        ]
        settings = {"accelerators": accelerators, "steps": steps, "time_scale": time_scale}
        write_json(json_path, document("simulator", seeds=[seed], settings=settings, results=results))
    if figure_path is not None:
        save_figure(figure_path, figure_of(pairs))
