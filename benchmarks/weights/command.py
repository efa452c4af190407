"""`millrace bench weights`."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from benchmarks.output import document, table_console, write_json
from benchmarks.weights.changes import ChangesPlan, measure_changes
from benchmarks.weights.kill import measure_kills
from benchmarks.weights.throughput import measure

PARTS = ("transports", "delta", "kill", "stall")
BARS = {"shared_memory of memcpy": 0.8, "collective of raw gloo": 0.5, "delta: fewer bytes": 20.0, "kill: seconds": 5.0}
TABLE_WIDTH = 150


@click.command("weights")
@click.option("--mb", default=512.0, show_default=True, help="MiB of bfloat16 weights that the transports move.")
@click.option(
    "--repeats", default=7, show_default=True, help="Rounds that count, after two of which one is shown as `first`."
)
@click.option("--bucket-mb", default=64.0, show_default=True, help="weights.bucket_mb")
@click.option("--delta-steps", default=200, show_default=True, help="Updates that travel as changes.")
@click.option("--lr", default=1e-6, show_default=True, help="Learning rate of those updates.")
@click.option("--updates", default=10, show_default=True, help="Updates under load whose stall is measured.")
@click.option("--parts", default=",".join(PARTS), show_default=True, help="What to measure.")
@click.option("--check", is_flag=True, help="Exit with 1 if a bar is missed.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the results as JSON.")
def weights(
    mb: float,
    repeats: int,
    bucket_mb: float,
    delta_steps: int,
    lr: float,
    updates: int,
    parts: str,
    check: bool,
    json_file: Path | None,
) -> None:
    """How fast weights get to engines, how few bytes changes take, and what a receiver's death costs the others."""
    wanted = [part for part in parts.split(",") if part]
    if unknown := sorted(set(wanted) - set(PARTS)):
        raise click.BadParameter(f"--parts {','.join(unknown)}: choose from {', '.join(PARTS)}")
    console, results = table_console(TABLE_WIDTH), dict[str, Any]()
    if "transports" in wanted:
        results["transports"] = measure(mb, repeats, bucket_mb)
    if "delta" in wanted:
        results["delta"] = measure_changes(ChangesPlan(steps=delta_steps, lr=lr))
    if "kill" in wanted:
        results["kill"] = measure_kills(max(64.0, mb / 4))
    if "stall" in wanted:
        results["stall"] = [measure_stall(transport, updates) for transport in ("shared_memory", "collective")]
    settings = {"mb": mb, "repeats": repeats, "bucket_mb": bucket_mb, "delta_steps": delta_steps, "lr": lr}
    content = document("weights", seeds=[0], settings=settings, results=results | {"bars": bars(results)})
    show(console, content)
    if json_file is not None:
        write_json(json_file, content)
    missed = [bar["name"] for bar in content["results"]["bars"] if not bar["met"]]
    if check and missed:
        raise click.ClickException(f"missed: {', '.join(missed)}")


def measure_stall(transport: str, updates: int) -> dict[str, Any]:
    """What requests in flight see of updates: the real engine, under load (see `millrace bench fleet`)."""
    from benchmarks.fleet.command import untrained_model
    from benchmarks.fleet.updates import UpdateLoad, measure_updates

    with tempfile.TemporaryDirectory(prefix="millrace-weights-") as directory:
        model = untrained_model(Path(directory) / "model", 0)
        return measure_updates(
            UpdateLoad(engines=1, requests=16, tokens=64, updates=updates, transport=transport), model
        )


def bars(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Each bar that was measured: ``name``, ``found``, ``wanted``, ``met``."""
    found: list[dict[str, Any]] = []

    def add(name: str, value: float, *, least: bool = True, also: bool = True) -> None:
        met = also and (value >= BARS[name] if least else value <= BARS[name])
        found.append({"name": name, "found": value, "wanted": BARS[name], "met": met})

    if "transports" in results:
        ways = results["transports"]["ways"]
        add("shared_memory of memcpy", ways["shared_memory"]["of_memcpy"]["median"])
        add("collective of raw gloo", ways["collective"]["of_raw_gloo"]["median"])
    if "delta" in results:
        delta = results["delta"]
        add("delta: fewer bytes", delta["fewer"], also=delta["versions_not_bit_exact"] == 0)
    if "kill" in results:
        kills = results["kill"].values()
        whole = all(kill["hold_the_version"] and not kill["restarted"] for kill in kills)
        add("kill: seconds", max(kill["seconds"] for kill in kills), least=False, also=whole)
    return found


def show(console: Console, content: dict[str, Any]) -> None:
    """The tables."""
    machine, results = content["machine"], content["results"]
    console.print(
        f"{machine['cpus']} CPUs ({machine['processor']}), {machine['memory_gib']} GiB, load {machine['load_average_1m']}, "
        f"Python {machine['python']}"
    )
    if "transports" in results:
        console.print(transports_table(results["transports"]))
    if "delta" in results:
        delta = results["delta"]
        console.print(
            f"delta: {delta['parameters']:,} parameters, {delta['version_bytes']:,} bytes a version; a change takes "
            f"{delta['change_bytes_mean']:,}; with {delta['snapshots']} whole versions and all offers "
            f"{delta['fewer']:g} times fewer bytes; versions that were not bit-exact: {delta['versions_not_bit_exact']}"
        )
    for place, kill in results.get("kill", {}).items():
        console.print(
            f"receiver killed at the {place}: the others hold the version {kill['seconds']:.2f} s later (sent again to "
            f"{kill['sent_again_to']}, restarted {kill['restarted']})"
        )
    for stall in results.get("stall", []):
        console.print(
            f"stall of an update, {stall['transport']}: p50 {stall['stall_steps']['p50']}, p99 {stall['stall_steps']['p99']} "
            f"decode steps of {stall['step_ms']} ms (late without an update: p99 "
            f"{stall['late_without_update_steps']['p99']}); swap {stall['swap_ms']['p50']} ms; lost tokens "
            f"{stall['lost_tokens']}"
        )
    for bar in results["bars"]:
        mark = "[green]met[/]" if bar["met"] else "[red]missed[/]"
        console.print(f"{bar['name']}: {bar['found']:g}, wanted {bar['wanted']:g}: {mark}")


def transports_table(found: dict[str, Any]) -> Table:
    shown = Table(title=f"{found['bytes'] / 2**20:.0f} MiB in {found['tensors']} tensors; GB/s, medians")
    for column in (
        "transport", "prepare", "fetch", "memcpy", "raw gloo", "of memcpy", "fetch of memcpy", "of raw gloo", "publish s",
        "first s",
    ):  # fmt: skip
        shown.add_column(column, justify="left" if column == "transport" else "right")
    for name, row in found["ways"].items():
        shares = [
            f"{row[key]['median']:.0%} ({row[key]['least']:.0%} to {row[key]['most']:.0%})"
            for key in ("of_memcpy", "fetch_of_memcpy", "of_raw_gloo")
        ]
        rates = [
            f"{row[key]:.2f}" for key in ("prepare_gb_per_s", "fetch_gb_per_s", "memcpy_gb_per_s", "raw_gloo_gb_per_s")
        ]
        shown.add_row(name, *rates, *shares, f"{row['publish_s']:.3f}", f"{row['first_publish_s']:.3f}")
    return shown
