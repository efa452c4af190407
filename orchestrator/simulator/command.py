"""What ``millrace simulate`` does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console

from env_pool.workloads.scripts import FAULT_ENGINE_KILL_EVERY_S
from orchestrator.config import MODES, Config, ConfigError, one_of
from orchestrator.progress import versions
from orchestrator.simulator.cluster import total_accelerators
from orchestrator.simulator.events import SimulationStalled
from orchestrator.simulator.report import render_rows
from orchestrator.simulator.simulate import Report, simulate
from orchestrator.simulator.simulation import SimulationOptions


def modes_of(text: str, config: Config) -> list[str]:
    """The modes of a comma-separated option; empty: the configuration's own. Raises ConfigError for an unknown one."""
    modes = [mode.strip() for mode in text.split(",") if mode.strip()]
    for mode in modes:
        if mode not in MODES:
            raise ConfigError(f"--modes: {one_of(mode, MODES)}")
    return list(dict.fromkeys(modes)) or [config.mode]


def default_options(config: Config, mean_field: bool, engine_restart_s: float) -> SimulationOptions:
    """Engines are lost in suite `fault` only, as often as the suite says."""
    faulty = config.tasks.options.get("suite") == "fault"
    return SimulationOptions(
        mean_field=mean_field,
        engine_kill_every_s=FAULT_ENGINE_KILL_EVERY_S if faulty else None,
        engine_restart_s=engine_restart_s,
    )


def run_simulation(
    config: Config, modes: list[str], options: SimulationOptions, skip: int | None, json_path: Path | None
) -> None:
    """Simulate, print the table, write the JSON file."""
    try:
        report = simulate(config, modes, options, skip)
    except SimulationStalled as stalled:
        raise ConfigError(f"the simulated run came to a halt: {stalled}") from stalled
    console = Console()
    console.print(render_rows(report.rows, title_of(config, report)))
    console.print(footer_of(report), style="dim")
    if json_path is not None:
        _write(json_path, document_of(config, report, options))


def title_of(config: Config, report: Report) -> str:
    """What was simulated, in one line."""
    suite = config.tasks.options.get("suite")
    episodes = config.rollout.groups_per_update * config.rollout.group_size
    return f"{suite}: {total_accelerators(config):,} accelerators, {episodes:,} episodes a step, seed {config.seed}"


def footer_of(report: Report) -> str:
    """Calibration, and what the simulation itself took."""
    events = sum(outcome.events for outcome in report.outcomes)
    seconds = sum(outcome.wall_s for outcome in report.outcomes)
    splits = ", ".join(
        f"{o.mode} {o.cluster.rollout_accelerators}+{0 if o.cluster.time_shared else o.cluster.learner_accelerators}"
        for o in report.outcomes
    )
    calibration = report.calibration
    return (
        f"w {calibration.w_s:.2f} s, tau {calibration.tau_s:.2f} s a trajectory; rollout+learner accelerators: {splits}; "
        f"{events:,} events in {seconds:.1f} s"
    )


def document_of(config: Config, report: Report, options: SimulationOptions) -> dict[str, Any]:
    """The JSON file."""
    return {
        "command": "simulate",
        "versions": versions(),
        "seeds": [config.seed],
        "settings": {
            "suite": config.tasks.options.get("suite"),
            "accelerators": total_accelerators(config),
            "trajectories_a_step": config.rollout.groups_per_update * config.rollout.group_size,
            "steps": config.run.steps,
            "token_scale": config.engines.synthetic.token_scale,
            "mean_field": options.mean_field,
            "engine_kill_every_s": options.engine_kill_every_s,
        },
        "calibration": {
            "w_s": report.calibration.w_s,
            "tau_s": report.calibration.tau_s,
            "rho": report.calibration.rho,
        },
        "results": [row.to_dict() for row in report.rows],
        "simulated": [
            {"mode": o.mode, "steps": o.window.steps, "events": o.events, "wall_s": o.wall_s} for o in report.outcomes
        ],
    }


def run_published(json_path: Path | None) -> None:
    """Simulate the published systems, print the comparison, write the JSON file."""
    from orchestrator.simulator.published import compare_all, document_of_published, render_published

    comparisons = compare_all()
    Console().print(render_published(comparisons))
    if json_path is not None:
        _write(json_path, document_of_published(comparisons))


def _write(path: Path, document: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
