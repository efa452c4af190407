"""``millrace bench sync-vs-async``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from benchmarks.output import document, machine, save_figure, write_json
from benchmarks.sync_vs_async.campaign import Campaign, SuiteResult
from benchmarks.sync_vs_async.clusters import CLUSTERS, MODES, find_cluster
from benchmarks.sync_vs_async.learning import LearningSettings, race_all
from benchmarks.sync_vs_async.processes import BenchError
from orchestrator.composition import ConfigError

DEFAULT_SUITES = ("reason", "swe", "mixed", "long")
DELAY_SCALE = 200.0
TABLE_WIDTH = 170


@click.command("sync-vs-async")
@click.argument("overrides", nargs=-1)
@click.option("--suite", "suites", multiple=True, help=f"{', '.join(CLUSTERS)}, or all; may be repeated.")
@click.option("--engine", type=click.Choice(["synthetic", "torch"]), default="synthetic", show_default=True)
@click.option("--modes", default=",".join(MODES), show_default=True, help="Modes to compare, separated by commas.")
@click.option("--accelerators", type=click.IntRange(min=4), default=64, show_default=True)
@click.option(
    "--steps", type=click.IntRange(min=2), help="Steps measured (synthetic), or trained synchronously (torch)."
)
@click.option("--time-scale", type=click.FloatRange(min=0, min_open=True), help="Instead of each suite's own.")
@click.option(
    "--calibrate/--no-calibrate", default=True, show_default=True, help="Measure w and tau, or take the model's."
)
@click.option("--seeds", type=click.IntRange(min=1), help="How many seeds. [default: 1; torch: 3]")
@click.option("--first-seed", default=0, show_default=True)
@click.option(
    "--latency",
    type=click.Choice(["both", "swe", "none"]),
    default="both",
    show_default=True,
    help="torch: tools as slow as those of suite swe (scaled), tools that take no time, or one after the other.",
)
@click.option(
    "--delay-scale", default=DELAY_SCALE, show_default=True, help="torch: by how much tool times are scaled down."
)
@click.option(
    "--dir", "directory", type=click.Path(path_type=Path), default=Path("runs/sync-vs-async"), show_default=True
)
@click.option(
    "--json", "json_path", type=click.Path(path_type=Path, dir_okay=False), help="Write the result to this file."
)
@click.option(
    "--figure", "figure_path", type=click.Path(path_type=Path, dir_okay=False), help="Draw it (.svg or .png)."
)
@click.option("--timeout", "timeout_s", default=1800.0, show_default=True, help="Most seconds for one run.")
def sync_vs_async(
    overrides: tuple[str, ...],
    suites: tuple[str, ...],
    engine: str,
    modes: str,
    accelerators: int,
    steps: int | None,
    time_scale: float | None,
    calibrate: bool,
    seeds: int | None,
    first_seed: int,
    latency: str,
    delay_scale: float,
    directory: Path,
    json_path: Path | None,
    figure_path: Path | None,
    timeout_s: float,
) -> None:
    """The same work in every mode on the same resources: how close to the bound, how far the tokens lag, why they stood still.

    OVERRIDES are key.path=value as for `millrace train`, and come last.
    """
    chosen = list(range(first_seed, first_seed + (seeds or (3 if engine == "torch" else 1))))
    console = Console()
    console = console if console.is_terminal else Console(width=max(console.width, TABLE_WIDTH))
    say = _announce
    try:
        if engine == "torch":
            settings = _learning(latency, delay_scale, steps, overrides, timeout_s)
            content, figure = _run_torch(settings, chosen, directory, console)
        else:
            named = _suites(suites)
            wanted = _modes(modes)
            clusters = [find_cluster(name).sized(accelerators) for name in named]
            if time_scale is not None:
                clusters = [replace(cluster, time_scale=time_scale) for cluster in clusters]
            if steps is not None:
                clusters = [cluster.measuring(steps) for cluster in clusters]
            campaigns = [
                Campaign(cluster, seed, directory, say, overrides, timeout_s, calibrate)
                for cluster in clusters
                for seed in chosen
            ]
            content, figure = _run_synthetic(campaigns, wanted, console)
    except (BenchError, ConfigError) as error:
        raise click.ClickException(str(error)) from error
    facts = machine()
    console.print(f"{facts['cpus']} CPUs, {facts['platform']}, Python {facts['python']}; seeds {chosen}", style="dim")
    if json_path is not None:
        given = {"engine": engine, "accelerators": accelerators, "overrides": list(overrides)}
        write_json(json_path, document("sync-vs-async", seeds=chosen, settings=given, results=content))
    if figure_path is not None:
        save_figure(figure_path, figure)


def _announce(text: str) -> None:
    click.echo(text, err=True)


def _run_synthetic(
    campaigns: Sequence[Campaign], modes: list[str], console: Console
) -> tuple[list[dict[str, Any]], Any]:
    from benchmarks.sync_vs_async.display import suite_table, suites_figure

    results: list[SuiteResult] = []
    for campaign in campaigns:
        results.append(campaign.run(modes))
        console.print(suite_table(results[-1]))
    return [result.to_dict() for result in results], suites_figure(results)


def _run_torch(
    cases: Sequence[LearningSettings], seeds: list[int], directory: Path, console: Console
) -> tuple[list[dict[str, Any]], Any]:
    from benchmarks.sync_vs_async.display import learning_figure, learning_table

    results = []
    for case in cases:
        results.append(race_all(case, seeds, directory, _announce))
        console.print(learning_table(results[-1]))
    return [result.to_dict() for result in results], learning_figure(results)


def _learning(
    latency: str, delay_scale: float, steps: int | None, overrides: tuple[str, ...], timeout_s: float
) -> list[LearningSettings]:
    if delay_scale <= 0:
        raise click.BadParameter(f"{delay_scale:g}: must be positive", param_hint="--delay-scale")
    choices: dict[str, list[float | None]] = {"both": [delay_scale, None], "swe": [delay_scale], "none": [None]}
    defaults = LearningSettings()
    count = steps or defaults.steps
    return [
        LearningSettings(
            steps=count,
            delay_scale=scale,
            overrides=overrides,
            timeout_s=timeout_s,
        )
        for scale in choices[latency]
    ]


def _suites(suites: tuple[str, ...]) -> list[str]:
    if not suites:
        return list(DEFAULT_SUITES)
    return list(CLUSTERS) if "all" in suites else list(dict.fromkeys(suites))


def _modes(text: str) -> list[str]:
    wanted = [mode.strip() for mode in text.split(",") if mode.strip()]
    unknown = [mode for mode in wanted if mode not in MODES]
    if unknown or not wanted:
        raise click.BadParameter(f"{text!r}: give some of {', '.join(MODES)}", param_hint="--modes")
    return wanted
