"""Simulate a configuration in several modes, and make the report."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass

from orchestrator.bound import Calibration, ModeRow
from orchestrator.config import Config, ConfigError, validate
from orchestrator.planning.costs import EpisodeCosts, calibrate, workload_costs
from orchestrator.simulator.cluster import Cluster, in_mode, require_synthetic, total_accelerators
from orchestrator.simulator.report import Outcome, row_of, window_of
from orchestrator.simulator.simulation import Simulation, SimulationOptions


@dataclass(frozen=True)
class Report:
    """All modes of one configuration."""

    calibration: Calibration
    """Seconds are modelled."""
    costs: EpisodeCosts
    outcomes: list[Outcome]
    rows: list[ModeRow]


def calibration_of(config: Config, costs: EpisodeCosts | None = None) -> Calibration:
    """w and tau of a synthetic configuration's workload, from its cost model, on all its accelerators."""
    cluster = Cluster.of(config)
    return calibrate(
        costs or workload_costs(config), cluster.cost, cluster.seconds_per_token, total_accelerators(config)
    )


def simulate_mode(
    config: Config, options: SimulationOptions | None = None, skip: int | None = None, leave: int = 0
) -> Outcome:
    """One run of ``config`` as it stands, without the first ``skip`` and the last ``leave`` steps (see `window_of`)."""
    began_at = time.perf_counter()
    simulation = Simulation(config, options)
    simulation.run()
    return Outcome(
        mode=config.mode,
        cluster=simulation.cluster,
        window=window_of(simulation.states[: len(simulation.states) - leave], config.staleness.target_lag, skip),
        ks=simulation.queue.ledger.length_distance(),
        events=simulation.loop.events,
        wall_s=time.perf_counter() - began_at,
    )


def simulate(
    config: Config,
    modes: Sequence[str] | None = None,
    options: SimulationOptions | None = None,
    skip: int | None = None,
) -> Report:
    """``config`` in each of ``modes`` (None: its own) on the same accelerators with the same episodes.

    Raises:
        ConfigError: The configuration is not valid, not synthetic, or cannot be run in one of the modes.
        SimulationStalled: A run came to a halt.
    """
    validate(config)
    require_synthetic(config)
    if options is not None and options.mean_field and options.engine_kill_every_s is not None:
        raise ConfigError(
            "engines and environments cannot be lost in mean field: simulate suite fault without --mean-field"
        )
    if options is not None and options.mean_field and config.engines.split:
        raise ConfigError(
            "engines are one pool in mean field: simulate a split of prefill and decode without --mean-field"
        )
    costs = workload_costs(config)
    calibration = calibration_of(config, costs)
    outcomes = [simulate_mode(in_mode(config, mode, calibration), options, skip) for mode in modes or [config.mode]]
    synchronous = next((outcome for outcome in outcomes if outcome.mode == "sync"), None)
    rows = [row_of(outcome, _as_trained(calibration, costs, outcome), synchronous) for outcome in outcomes]
    return Report(calibration, costs, outcomes, rows)


def _as_trained(calibration: Calibration, costs: EpisodeCosts, outcome: Outcome) -> Calibration:
    """The calibration scaled to the trajectories that were trained: with heavy tails no two windows are alike."""
    window = outcome.window
    if not window.episodes:
        return calibration
    sampled = (window.trained + window.masked) / window.episodes / costs.output_tokens
    context = window.context / window.episodes / costs.context_tokens
    return dataclasses.replace(calibration, w_s=calibration.w_s * sampled, tau_s=calibration.tau_s * context)
