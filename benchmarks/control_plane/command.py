"""`millrace bench control-plane`."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from benchmarks.control_plane.measure import ControlPlaneError, Load, measure
from benchmarks.output import document, save_figure, write_json

LAG_TARGET_MS = 50.0
MEMORY_TARGET_MIB = 4096.0


@click.command("control-plane")
@click.option("--episodes", default="1000,10000", show_default=True, help="Concurrent episodes, one run for each.")
@click.option("--seconds", default=30.0, show_default=True, help="How long each run is measured.")
@click.option(
    "--turns-per-s", default=500.0, show_default=True, help="Turns of all episodes in a second; sets the time scale."
)
@click.option("--workers", default=1, show_default=True, help="Rollout workers.")
@click.option("--seed", default=0, show_default=True)
@click.option("--runs", "runs", type=click.Path(path_type=Path), help="Where the runs go; default: a temporary folder.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the results as JSON.")
@click.option("--figure", "figure_file", type=click.Path(path_type=Path), help="Save a figure (.svg or .png).")
def control_plane(
    episodes: str,
    seconds: float,
    turns_per_s: float,
    workers: int,
    seed: int,
    runs: Path | None,
    json_file: Path | None,
    figure_file: Path | None,
) -> None:
    """Dispatch latency, event-loop lag, CPU and memory with thousands of concurrent synthetic episodes.

    Every part is the real one (controller, queue, workers, environment pool, rewards, weight protocol); only the engine
    and the learner are cost models.
    """
    console = Console()
    rows = []
    with tempfile.TemporaryDirectory(prefix="millrace-control-plane-") as temporary:
        for count in _counts(episodes):
            load = Load(count, turns_per_s, seconds, seed, workers)
            with console.status(f"{count} episodes: starting") as status:
                try:
                    rows.append(measure(load, (runs or Path(temporary)) / f"episodes-{count}", status.update))
                except ControlPlaneError as error:
                    raise click.ClickException(str(error)) from error
    settings = {"seconds": seconds, "turns_per_s": turns_per_s, "workers": workers, "suite": "swe"}
    content = document("control-plane", seeds=[seed], settings=settings, results=rows)
    _show(console, rows, content)
    if json_file is not None:
        write_json(json_file, content)
    if figure_file is not None:
        save_figure(figure_file, draw(rows))


def _counts(text: str) -> list[int]:
    try:
        counts = [int(part) for part in text.split(",")]
    except ValueError:
        counts = []
    if not counts or min(counts) < 8:
        raise click.BadParameter(f"{text!r}: give whole numbers of at least 8 (one group), such as 1000,10000")
    return counts


def _show(console: Console, rows: Sequence[dict[str, Any]], content: dict[str, Any]) -> None:
    machine = content["machine"]
    console.print(
        f"{machine['cpus']} CPUs ({machine['processor']}), {machine['memory_gib']} GiB, Python {machine['python']}; seeds "
        f"{content['seeds']}; " + ", ".join(f"{name} {number}" for name, number in content["versions"].items())
    )
    console.print(_summary(rows))
    console.print(_by_role(rows))


def _summary(rows: Sequence[dict[str, Any]]) -> Table:
    table = Table(title="Control plane: all episodes, real actors, modelled engine and learner")
    for name in ("episodes", "turns/s", "dispatch p50 / p99", "loop lag p99 (worst)", "CPU s / 1,000 turns", "memory"):
        table.add_column(name, justify="right")
    for row in rows:
        ramp = row["dispatch_ms"]["ramp"]
        worst, total = row["loop_lag_p99_max_ms"], row["memory_mib"]["total"]
        table.add_row(
            f"{row['episodes']:,}",
            f"{row['turns_per_s']:,.0f}",
            f"{ramp['p50']:.0f} / {ramp['p99']:.0f} ms",
            f"{worst:.1f} ms ({_verdict(worst < LAG_TARGET_MS)} {LAG_TARGET_MS:g})",
            f"{row['cpu_s_per_1000_turns']['total']:.3f}",
            f"{total:,.0f} MiB ({_verdict(total < MEMORY_TARGET_MIB)} {MEMORY_TARGET_MIB:,.0f})",
        )
    return table


def _verdict(good: bool) -> str:
    return "below" if good else "not below"


def _by_role(rows: Sequence[dict[str, Any]]) -> Table:
    table = Table(title="By process")
    table.add_column("process")
    for row in rows:
        for name in ("loop lag p50 / p99 ms", "CPU s / 1,000 turns", "MiB"):
            table.add_column(f"{row['episodes']:,}: {name}", justify="right")
    roles = sorted({role for row in rows for role in row["memory_mib"]}, key=lambda role: (role == "total", role))
    for role in roles:
        cells = []
        for row in rows:
            lags = [lag for actor, lag in row["loop_lag_ms"].items() if actor.split("-")[0] == role]
            cells += [
                f"{max(lag['p50'] for lag in lags):.2f} / {max(lag['p99'] for lag in lags):.1f}" if lags else "",
                f"{row['cpu_s_per_1000_turns'].get(role, 0.0):.3f}",
                f"{row['memory_mib'].get(role, 0.0):,.0f}",
            ]
        table.add_row(role, *cells)
    return table


def draw(rows: Sequence[dict[str, Any]]) -> Any:
    """CPU a thousand turns and event-loop lag, by process, for every number of episodes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.6), layout="constrained")
    cpu, lag = figure.subplots(1, 2)
    roles = sorted({role for row in rows for role in row["cpu_s_per_1000_turns"]} - {"total"})
    actors = sorted({actor.split("-")[0] for row in rows for actor in row["loop_lag_ms"]})
    height = 0.8 / len(rows)
    for number, row in enumerate(rows):
        label = f"{row['episodes']:,} episodes, {row['turns_per_s']:,.0f} turns/s"
        places = [position + number * height for position in range(len(roles))]
        cpu.barh(places, [row["cpu_s_per_1000_turns"].get(role, 0.0) for role in roles], height, label=label)
        worst = [
            max(
                (value["p99"] for name, value in row["loop_lag_ms"].items() if name.split("-")[0] == actor), default=0.0
            )
            for actor in actors
        ]
        lag.barh([position + number * height for position in range(len(actors))], worst, height, label=label)
    middle = (len(rows) - 1) * height / 2
    cpu.set_yticks([position + middle for position in range(len(roles))], roles)
    lag.set_yticks([position + middle for position in range(len(actors))], actors)
    cpu.set_xlabel("CPU seconds a thousand turns")
    lag.set_xlabel("event-loop lag, p99 (ms)")
    lag.axvline(LAG_TARGET_MS, color="black", linewidth=0.8, linestyle="--")
    cpu.legend(fontsize=8)
    return figure
