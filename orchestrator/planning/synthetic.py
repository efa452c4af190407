"""The forecast of a synthetic configuration, its table and its warnings."""

from __future__ import annotations

from rich.table import Table

from experience.config import OnViolation
from experience.staleness import Pacing
from orchestrator.config import Config
from orchestrator.planning.costs import SAMPLED_EPISODES, EpisodeCosts, walk, workload_scripts
from orchestrator.planning.forecast import Cluster, Demand, Forecast, Limit, forecast
from orchestrator.planning.measured import Measured
from orchestrator.planning.memory import MEBIBYTE, TOKEN_BYTES, TRAJECTORY_BYTES
from orchestrator.simulator.cluster import Cluster as Modelled

NOTABLE_MASKED = 0.01
UNBALANCED = 0.97
"""Share of the best split's efficiency below which another split is advised."""

ADVICE = {
    Limit.ROLLOUT: "more accelerators for rollout",
    Limit.LEARNER: "more accelerators for the learner",
    Limit.KV: "more KV (engines.synthetic.kv_tokens): sequences wait for it",
    Limit.CONCURRENCY: "more episodes in flight (rollout.concurrency): slots of the engines are empty",
    Limit.PACING: "more groups in flight (staleness.target_lag): slots of the engines are empty",
    Limit.ENVIRONMENT: "more episodes in flight (rollout.concurrency): most of them wait for tools",
    Limit.STRAGGLERS: "a larger staleness.max_lag: each step waits for them",
    Limit.QUEUE: "a larger queue (queue.budget_mb): it does not hold a step",
}


def forecast_of(config: Config, episodes: int = SAMPLED_EPISODES) -> Forecast:
    """What a synthetic configuration will be like. Raises ConfigError when it is not synthetic."""
    modelled = Modelled.of(config)
    rollout = config.rollout
    scale, longest = modelled.token_scale, rollout.max_episode_tokens
    scripts = list(workload_scripts(config, max(episodes, rollout.group_size)))
    costs = EpisodeCosts.of(scripts, scale, longest)
    walks = [walk(script, scale, longest) for script in scripts]
    allowed = Pacing(rollout.groups_per_update, config.staleness.target_lag).limit(0)
    cluster = Cluster(
        cost=modelled.cost,
        rollout=modelled.rollout_accelerators,
        learner=modelled.learner_accelerators,
        shared=modelled.time_shared,
        seconds_per_token=modelled.seconds_per_token,
        fixed_s=modelled.step_overhead_s + modelled.switch_s + (modelled.cost.stage_s if modelled.time_shared else 0.0),
    )
    entry_bytes = costs.context_tokens * TOKEN_BYTES + TRAJECTORY_BYTES
    demand = Demand(
        trajectories=rollout.groups_per_update * rollout.group_size,
        concurrency=rollout.concurrency,
        paced=allowed * rollout.group_size,
        target_lag=config.staleness.target_lag,
        max_lag=config.staleness.max_lag,
        waits=config.staleness.on_violation is OnViolation.wait,
        queued=config.queue.budget_mb * MEBIBYTE / entry_bytes,
    )
    return forecast(costs, [(w[1], w[0], w[4]) for w in walks], cluster, demand, rollout.group_size)


def forecast_warnings(config: Config, expected: Forecast) -> list[str]:
    """What the forecast says against the configuration."""
    warnings = []
    if config.mode != "sync" and expected.limit is Limit.STRAGGLERS:
        warnings.append(
            f"staleness.max_lag={config.staleness.max_lag} with on_violation=wait: a step waits {expected.straggler_s:.0f} s "
            f"for its slowest episodes, where training takes {expected.training_s:.0f} s: "
            "the learner stalls"
        )
    if expected.masked > NOTABLE_MASKED:
        lost = (
            "carry no loss"
            if config.staleness.on_violation is OnViolation.mask_tokens
            else "are dropped with their groups"
        )
        warnings.append(
            f"staleness.max_lag={config.staleness.max_lag}: about {expected.masked:.1%} of the sampled tokens will be older "
            f"when their group is complete, and {lost}"
        )
    if config.mode != "sync" and expected.efficiency < UNBALANCED * expected.best_efficiency:
        warnings.append(
            f"{expected.rollout} accelerators for rollout and {expected.learner} for the learner are not the best split: "
            f"{expected.best_rollout} and {expected.best_learner} give E={expected.best_efficiency:.2f}"
        )
    return warnings


def forecast_rows(expected: Forecast) -> list[tuple[str, str, str]]:
    """Name, value and explanation of each figure."""
    return [
        (
            "step",
            f"{expected.step_s:.0f} s",
            f"rollout {expected.rollout_s:.0f} s, training {expected.training_s:.0f} s",
        ),
        (
            "E",
            f"{expected.efficiency:.2f}",
            f"of the bound; w {expected.calibration.w_s:.1f} s, tau {expected.calibration.tau_s:.1f} s",
        ),
        ("split", f"{expected.rollout}+{expected.learner}", "rollout + learner accelerators"),
        (
            "best split",
            f"{expected.best_rollout}+{expected.best_learner}",
            f"E {expected.best_efficiency:.2f}, step {expected.best_step_s:.0f} s",
        ),
        ("limited by", expected.limit.value, f"faster with {ADVICE[expected.limit]}"),
        ("episode", f"{expected.episode_s:.0f} s", f"{expected.in_flight:.0f} in flight"),
        ("decoding", f"{expected.decoding:.1f}", f"sequences an accelerator, of {expected.slots:.0f}"),
        ("mean token lag", f"{expected.mean_lag:.2f}", "time from sampling to training, over step time"),
        ("masked", f"{expected.masked:.1%}", "of sampled tokens older than max_lag when trained"),
    ]


def measured_rows(measured: Measured) -> list[tuple[str, str, str]]:
    """The same of a run that has been made."""
    calibration = measured.calibration
    return [
        ("measured", measured.run, ""),
        ("step", f"{measured.step_s:.2f} s", "second half of the run"),
        (
            "E",
            f"{measured.efficiency:.2f}",
            f"of the bound; w {calibration.w_s:.3g} s, tau {calibration.tau_s:.3g} s a trajectory",
        ),
        ("split", f"{measured.rollout}+{measured.learner}", "rollout + learner"),
        (
            "best split",
            f"{measured.best_rollout}+{measured.best_learner}",
            f"step {measured.best_step_s:.2f} s at best",
        ),
        ("lag", f"{measured.lag_mean:.2f}", f"mean; masked {measured.masked:.1%}"),
    ]


def table_of(rows: list[tuple[str, str, str]]) -> Table:
    """As the plan prints its figures."""
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(no_wrap=True, justify="right", style="bold")
    table.add_column(style="dim")
    for row in rows:
        table.add_row(*row)
    return table
