"""Tables and figures of the benchmark."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from benchmarks.sync_vs_async.campaign import SuiteResult
from benchmarks.sync_vs_async.learning import LearningResult

SHOWN_CAUSES = 4
LEAST_SHARE = 0.005
SYNC_COLOUR, ASYNC_COLOUR = "#c44e52", "#4c72b0"
COLOURS = {"sync": SYNC_COLOUR, "one_step": "#dd8452", "async": ASYNC_COLOUR}


def suite_table(result: SuiteResult) -> RenderableType:
    """One suite: what was calibrated, and a line for each mode."""
    cluster, roles, split = result.cluster, result.roles, result.split
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="dim")
    names = ("mode", "step s", "E", "E useful", "S", "S max", "phi", "rho", "lag mean/p50/p99/max", "waste", "masked")
    for name in (*names, "KS", "prefix", "sync exposed", "CPU"):
        table.add_column(name, justify="left" if name == "mode" else "right", no_wrap=True)
    for one in result.rows:
        row, extra = one.row, one.extra
        lag = f"{row.lag.mean:.2f}/{row.lag.p50}/{row.lag.p99}/{row.lag.largest}"
        table.add_row(
            row.mode,
            f"{row.step_s:,.0f}",
            f"{row.efficiency:.3f}",
            f"{row.useful_efficiency:.3f}",
            f"{row.speedup:.2f}",
            f"{row.speedup_bound:.2f}",
            f"{row.phi:.2f}",
            f"{row.rho:.2f}",
            lag,
            f"{row.waste:.1%}",
            f"{row.masked:.1%}",
            f"{row.ks:.3f}",
            f"{row.prefix_hit:.0%}",
            f"{row.exposed_sync:.1%}",
            f"{extra.get('cpu_share', 0.0):.0%}",
        )
    head = (
        f"{cluster.suite}, seed {result.seed}: {cluster.accelerators} accelerators ({split.rollout} roll out, "
        f"{split.learner} train when asynchronous; whole accelerators allow E = {result.split_efficiency:.3f}), "
        f"B = {cluster.batch}, time / {cluster.time_scale:g} (sync: {cluster.timed_for('sync').time_scale:g}), "
        f"tokens / {cluster.token_scale:g}"
    )
    rollout, learner = roles.rollout, roles.learner
    calibration = (
        f"w = {rollout.measured_s:.1f} s (cost model {rollout.analytic_s:.1f}), "
        f"tau = {learner.measured_s:.1f} s (cost model {learner.analytic_s:.1f}) an episode and accelerator"
    )
    lines = [Text(line, style="dim") for line in (calibration, *formula_lines(result), *idle_lines(result))]
    warnings = [Text(f"warning: {warning}", style="yellow") for warning in result.warnings]
    return Group(Text(head, style="bold"), table, *lines, *warnings, Text())


def formula_lines(result: SuiteResult) -> list[str]:
    """How the synchronous step compares with its own formula; beyond 5 % with what the difference is."""
    sync = result.synchronous
    if sync is None:
        return []
    line = (
        f"sync: {sync.step_s:,.0f} s a step; T* (1 + rho (phi - 1) + sigma) = {sync.formula_s:,.0f} s ({sync.error:+.1%}), "
        f"sigma = {sync.sigma:.3f}"
    )
    if abs(sync.error) > 0.05:
        difference = sync.step_s - sync.formula_s
        line += (
            f"; the {difference:,.0f} s between are {difference / result.cluster.timed_for('sync').time_scale:.2f} wall seconds a step of the "
            "real control plane (dispatch, delivery, weights), which no modelled role overlaps"
        )
    return [line]


def idle_lines(result: SuiteResult) -> list[str]:
    """A line a mode: where accelerators stood still, the largest cause first."""
    lines = []
    for one in result.rows:
        causes = sorted(one.row.idle.items(), key=lambda item: -item[1])
        shown = [f"{cause} {share:.1%}" for cause, share in causes[:SHOWN_CAUSES] if share >= LEAST_SHARE]
        if shown:
            lines.append(f"{one.row.mode} stood still: {', '.join(shown)}")
        if "kills" in one.extra:
            recovery = one.extra.get("recovery_wall_s", {})
            lines.append(
                f"{one.row.mode}: {one.extra['kills']} engines killed, out of service for "
                f"{recovery.get('mean', 0.0):.1f} wall s each (longest {recovery.get('max', 0.0):.1f}); "
                f"groups {one.extra['ledger']}"
            )
    return lines


def suites_figure(results: Sequence[SuiteResult]) -> Any:
    """E of every mode by suite (left), and the gain over the synchronous mode beside its bound (right)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.6))
    left, right = figure.subplots(1, 2)
    modes = list(dict.fromkeys(one.row.mode for result in results for one in result.rows))
    names = [f"{result.cluster.suite}" + (f" ({result.seed})" if _repeats(results) else "") for result in results]
    width = 0.8 / max(1, len(modes))
    for position, mode in enumerate(modes):
        rows = [next((one.row for one in result.rows if one.row.mode == mode), None) for result in results]
        places = [index + (position - (len(modes) - 1) / 2) * width for index in range(len(results))]
        colour = COLOURS.get(mode)
        left.bar(places, [row.efficiency if row else 0.0 for row in rows], width, label=mode, color=colour)
        left.scatter(
            places, [row.useful_efficiency if row else 0.0 for row in rows], marker="_", color="black", zorder=3
        )
        right.bar(places, [row.speedup if row else 0.0 for row in rows], width, label=mode, color=colour)
    for index, result in enumerate(results):
        if result.rows:
            bound = result.rows[0].row.speedup_bound
            right.plot([index - 0.45, index + 0.45], [bound, bound], color="black", linewidth=1)
    left.axhline(1.0, color="black", linewidth=1)
    left.set_ylabel("E = T* / T_step (mark: E useful)")
    right.set_ylabel("S (line: S_max)")
    for axes in (left, right):
        axes.set_xticks(range(len(results)), names)
        axes.spines[["top", "right"]].set_visible(False)
    left.legend(frameon=False, loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=len(modes))
    figure.tight_layout()
    return figure


def _repeats(results: Sequence[SuiteResult]) -> bool:
    return len({result.cluster.suite for result in results}) < len(results)


def learning_table(result: LearningResult) -> RenderableType:
    """One case of training for real: a line a run, and the ratio a seed."""
    from benchmarks.sync_vs_async.curves import median_ratio

    table = Table(box=None, padding=(0, 1, 0, 0), header_style="dim")
    for name in (
        "mode",
        "seed",
        "steps",
        "step s",
        "E",
        "S",
        "S max",
        "success",
        "lag mean",
        "lag max",
        "masked",
        "learner waits",
        "CPU",
    ):
        table.add_column(name, justify="left" if name == "mode" else "right", no_wrap=True)
    for row in result.rows:
        table.add_row(
            row["mode"],
            str(row["seed"]),
            str(row["steps"]),
            f"{row['step_s']:.3f}",
            f"{row['E']:.2f}",
            f"{row['S']:.2f}",
            f"{row['S_max']:.2f}",
            f"{row['success']:.3f}",
            f"{row['lag_mean']:.2f}",
            str(row["lag_max"]),
            f"{row['masked']:.1%}",
            f"{row['learner_wait_share']:.0%}",
            f"{row['cpu_share']:.0%}",
        )
    threads = result.sync_threads
    tried = ", ".join(f"{choice}: {seconds:.3f} s" for choice, seconds in result.tuning.items())
    ratios = ", ".join(
        f"seed {race.seed}: {'never' if race.ratio is None else f'{race.ratio:.2f}'} (at {race.level:.3f})"
        for race in result.races
    )
    middle = median_ratio(result.races)
    lines = [
        f"sync with {threads.engine} engine and {threads.learner} learner threads (seconds a step by threads: {tried})",
        f"wall-clock of async to reach what sync ended with, over that of sync: {ratios}",
        f"median {'never' if middle is None else f'{middle:.2f}'}",
    ]
    return Group(
        Text(f"shop, {result.settings.case}", style="bold"), table, *(Text(x, style="dim") for x in lines), Text()
    )


def learning_figure(results: Sequence[LearningResult]) -> Any:
    """Mean reward of trained episodes against seconds of training: points are steps, lines smoothed, a panel a case."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5 * len(results), 3.6))
    panels = figure.subplots(1, len(results), squeeze=False)[0]
    for axes, result in zip(panels, results, strict=True):
        for position, race in enumerate(result.races):
            for curve, colour, name in ((race.sync, SYNC_COLOUR, "sync"), (race.asynchronous, ASYNC_COLOUR, "async")):
                label = name if position == 0 else None
                axes.plot(curve.seconds, curve.smoothed(), color=colour, linewidth=1.5, alpha=0.8, label=label)
                axes.scatter(curve.seconds, curve.reward, color=colour, s=3, alpha=0.25)
        axes.set_title(result.settings.case)
        axes.set_xlabel("seconds of training")
        axes.set_ylabel("reward")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, loc="lower right")
    figure.tight_layout()
    return figure
