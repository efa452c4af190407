"""The command: which systems, sizes and cases; the rounds; the table, the figure and the JSON document."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from benchmarks.output import PACKAGES, document, save_figure, write_json
from benchmarks.queue.samples import Case, Record, System, item_count, waiting_change
from benchmarks.queue.systems import Millrace, RayActor, RayQueue
from benchmarks.queue.transferqueue import PYTHON, TransferQueue
from experience.config import QueueTransport

CASES = {
    "single": (Case.PUT_SINGLE, Case.PUT_ALONE, Case.PUT_WAITING),
    "pipelined": (Case.PUT_PIPELINED,),
    "batched": (Case.PUT_BATCHED,),
}
PEERS: dict[str, Callable[[int], System]] = {
    "ray-actor": RayActor,
    "ray-queue": RayQueue,
    "transferqueue": TransferQueue,
}
UNITS = {"KB": 1e3, "MB": 1e6, "B": 1.0}


@dataclass(frozen=True)
class Settings:
    """One invocation."""

    item_bytes: tuple[int, ...] = (3600, 86_000, 664_000)
    cases: tuple[str, ...] = ("single", "pipelined", "batched")
    peers: tuple[str, ...] = ("ray-actor", "ray-queue", "transferqueue")
    repeats: int = 5
    most_mb: float = 90.0
    """Bytes of items that one repeat of one case moves at most, in MB."""
    ray_calls: bool = False
    """Also Millrace's queue without its socket."""
    seed: int = 0


def run(settings: Settings) -> dict[str, Any]:
    """Measure everything; returns the document."""
    import uvloop

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_run(settings))


async def _run(settings: Settings) -> dict[str, Any]:
    import ray

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(address="local", num_cpus=8, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    systems = _systems(settings)
    started: list[System] = []
    try:
        for system in systems:
            started.append(system)
            await system.start()
        records = await _rounds(systems, settings)
        routes = {system.name: system.route for system in systems if isinstance(system, Millrace)}
    finally:
        for system in started:
            await system.stop()
        ray.shutdown()
    rows = [record.row() for record in records]
    result = document(
        "queue",
        seeds=[settings.seed],
        settings=asdict(settings),
        results=rows,
        packages=(*PACKAGES, "uvloop"),
    )
    result["waiting_consumer"] = waiting_change(rows)
    result["routes"] = routes
    result["peer_versions"] = {s.name: s.versions for s in systems if isinstance(s, TransferQueue)}
    return result


def _systems(settings: Settings) -> list[System]:
    seed = settings.seed
    systems: list[System] = [Millrace(seed), Millrace(seed, journal=False)]
    if settings.ray_calls:
        systems.append(Millrace(seed, transport=QueueTransport.ray))
    return systems + [PEERS[peer](seed) for peer in settings.peers]


async def _rounds(systems: Sequence[System], settings: Settings) -> list[Record]:
    """Repeat after repeat, one system after the other, so that a busy machine slows all alike; the first warms up."""
    records: dict[tuple[str, int, Case], Record] = {}
    puts = [put for case in settings.cases for put in CASES[case]]
    for size in settings.item_bytes:
        for repeat in range(settings.repeats + 1):
            for put in puts:
                count = item_count(put, size, settings.most_mb)
                for system in systems:
                    for case, timing in (await system.measure(put, size, count)).items():
                        record = records.setdefault((system.name, size, case), Record(system.name, size, case))
                        if repeat > 0:
                            record.timings.append(timing)
    return list(records.values())


def show(result: dict[str, Any], console: Console) -> None:
    """Print the tables."""
    for size in result["settings"]["item_bytes"]:
        table = Table(title=f"{size / 1e3:g} KB an item", title_justify="left")
        for column in ("case", "system", "items/s", "GB/s", "p50 ms", "p99 ms"):
            table.add_column(column, justify="left" if column in ("case", "system") else "right")
        for case in Case:
            rows = [row for row in result["results"] if row["item_bytes"] == size and row["case"] == case.value]
            for place, row in enumerate(rows):
                table.add_row(
                    case.value if place == 0 else "",
                    row["system"],
                    f"{row['items_per_s']:,.0f}",
                    f"{row['gb_per_s']:.3f}",
                    f"{row['p50_ms']:.3f}",
                    f"{row['p99_ms']:.3f}",
                    end_section=place == len(rows) - 1,
                )
        console.print(table)
    for change in result["waiting_consumer"]:
        console.print(
            f"{change['system']}, {change['item_bytes'] / 1e3:g} KB: with a consumer waiting, the median put goes from "
            f"{change['p50_ms'][0]:.3f} to {change['p50_ms'][1]:.3f} ms ({change['p50_change']:+.0%}), the 99th "
            f"percentile from {change['p99_ms'][0]:.3f} to {change['p99_ms'][1]:.3f} ms"
        )
    console.print(
        f"seed {result['seeds'][0]}, {result['settings']['repeats']} repeats, {result['machine']['cpus']} CPUs, "
        f"load {result['machine']['load_average_1m']}; routes {result['routes']}; {result['versions']} {result['peer_versions']}"
    )


def draw(result: dict[str, Any], path: Path) -> None:
    """Items a second by case, a panel for each size."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    sizes = result["settings"]["item_bytes"]
    systems = list(dict.fromkeys(row["system"] for row in result["results"]))
    figure, panels = plt.subplots(1, len(sizes), figsize=(5.2 * len(sizes), 4.2), squeeze=False)
    for panel, size in zip(panels[0], sizes, strict=True):
        rates = {(r["case"], r["system"]): r["items_per_s"] for r in result["results"] if r["item_bytes"] == size}
        cases = [case.value for case in Case if any(key[0] == case.value for key in rates)]
        height = 0.8 / len(systems)
        for place, system in enumerate(systems):
            at = [row + place * height for row in range(len(cases))]
            panel.barh(at, [rates.get((case, system), 0.0) for case in cases], height, label=system)
        panel.set_yticks([row + 0.4 - height / 2 for row in range(len(cases))], cases)
        panel.invert_yaxis()
        panel.set_xscale("log")
        panel.set_title(f"{size / 1e3:g} KB an item")
        panel.set_xlabel("items/s")
    panels[0][-1].legend(fontsize="small")
    figure.tight_layout()
    save_figure(path, figure)
    plt.close(figure)


def parse_size(text: str) -> int:
    """Bytes from ``86KB``, ``1.5MB`` or ``3600B``."""
    for unit, factor in UNITS.items():
        number = text.strip().upper().removesuffix(unit)
        if number != text.strip().upper():
            try:
                size = int(float(number) * factor)
            except ValueError:
                break
            if size >= 100:
                return size
    raise click.BadParameter(f"{text!r} is no size of an item: write for example 3.6KB or 1MB, at least 100B")


def _names(text: str, known: Sequence[str]) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(",") if name.strip() and name.strip() != "none")
    unknown = [name for name in names if name not in known]
    if unknown:
        raise click.BadParameter(f"there is no {unknown[0]!r}; there are {', '.join(known)}")
    return names


@click.command()
@click.option("--items", default="3.6KB,86KB,664KB", show_default=True, help="Sizes of an item.")
@click.option("--cases", default="single,pipelined,batched", show_default=True)
@click.option("--peers", default=",".join(PEERS), show_default=True, help="Queues to compare with, or none.")
@click.option("--repeats", default=5, show_default=True, help="Measured rounds; the median counts.")
@click.option("--ray-calls", is_flag=True, help="Also Millrace's queue through Ray calls, without its socket.")
@click.option("--seed", default=0, show_default=True)
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the result to this file.")
@click.option("--figure", type=click.Path(path_type=Path), help="Draw it (svg or png).")
def queue(
    items: str,
    cases: str,
    peers: str,
    repeats: int,
    ray_calls: bool,
    seed: int,
    json_path: Path | None,
    figure: Path | None,
) -> None:
    """Put and get of the experience queue, durable as in a run, beside Ray's queues and TransferQueue."""
    settings = Settings(
        item_bytes=tuple(parse_size(size) for size in items.split(",")),
        cases=_names(cases, list(CASES)),
        peers=_names(peers, list(PEERS)),
        repeats=repeats,
        ray_calls=ray_calls,
        seed=seed,
    )
    if "transferqueue" in settings.peers and not PYTHON.exists():
        raise click.ClickException("TransferQueue has an environment of its own: run `make peers`, or leave it out")
    if repeats < 1:
        raise click.BadParameter(f"--repeats must be at least 1, got {repeats}")
    result = run(settings)
    show(result, Console())
    if json_path is not None:
        write_json(json_path, result)
    if figure is not None:
        draw(result, figure)
