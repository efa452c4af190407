"""`millrace bench fleet`."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from benchmarks.fleet.kills import ACTORS, KillPlan, KillsError, measure_kills
from benchmarks.fleet.updates import UpdateLoad, measure_updates
from benchmarks.output import document, save_figure, table_console, write_json

STALL_TARGET_STEPS = 1.0
REROUTE_TARGET_S = 5.0
TABLE_WIDTH = 170


@click.command("fleet")
@click.option("--updates", default=100, show_default=True, help="Updates in a row under load; 0: leave this part out.")
@click.option(
    "--engines", default=2, show_default=True, help="Engines, in both parts; stalls are measured on one as well."
)
@click.option("--requests", default=32, show_default=True, help="Requests in flight on each engine during the updates.")
@click.option("--kv", default="keep,recompute", show_default=True, help="KV policies to update with.")
@click.option(
    "--transport", default="shared_memory", show_default=True, type=click.Choice(["shared_memory", "collective"])
)
@click.option("--kinds", default="torch,synthetic", show_default=True, help="Kinds of engines to kill; empty: none.")
@click.option("--kills", default=3, show_default=True, help="Engines killed in each run, one after another.")
@click.option("--below", is_flag=True, help="Kill the server process below its actor (vllm, sglang).")
@click.option(
    "--model", type=click.Path(path_type=Path), help="Model directory (default: the quickstart's, untrained)."
)
@click.option("--seed", default=0, show_default=True)
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the results as JSON.")
@click.option("--figure", "figure_file", type=click.Path(path_type=Path), help="Save a figure (.svg or .png).")
def fleet(
    updates: int,
    engines: int,
    requests: int,
    kv: str,
    transport: str,
    kinds: str,
    kills: int,
    below: bool,
    model: Path | None,
    seed: int,
    json_file: Path | None,
    figure_file: Path | None,
) -> None:
    """What updates and lost engines cost the requests in flight.

    Updates: the stall that a request sees, in decode steps, and whether a request was aborted or a token lost. Kills: a
    real training run whose engines get SIGKILL; seconds until their requests are elsewhere, episodes lost, turns generated
    again.
    """
    wanted = list(filter(None, kinds.split(",")))
    for kind in wanted:
        if kind not in ACTORS:
            raise click.BadParameter(f"--kinds {kind!r}: choose from {', '.join(ACTORS)}")
    console = table_console(TABLE_WIDTH)
    results: dict[str, Any] = {"updates": [], "kills": []}
    with tempfile.TemporaryDirectory(prefix="millrace-fleet-") as temporary:
        model = model or untrained_model(Path(temporary) / "model", seed)
        for load in _loads(updates, engines, requests, kv, transport, seed):
            with console.status(f"{load.updates} updates, {_manner(load.engines, load.rolling)}, kv={load.kv}"):
                results["updates"].append(measure_updates(load, model))
        for kind in wanted:
            plan = KillPlan(kind, engines, kills, below, seed, None if kind == "synthetic" else model)
            with console.status(kind) as status:
                try:
                    results["kills"].append(measure_kills(plan, Path(temporary) / kind, status.update))
                except KillsError as error:
                    raise click.ClickException(str(error)) from error
    settings = {"updates": updates, "engines": engines, "requests": requests, "transport": transport, "kills": kills}
    content = document("fleet", seeds=[seed], settings=settings, results=results)
    show(console, content)
    if json_file is not None:
        write_json(json_file, content)
    if figure_file is not None:
        save_figure(figure_file, draw(results))


def _loads(updates: int, engines: int, requests: int, kv: str, transport: str, seed: int) -> list[UpdateLoad]:
    if updates < 1:
        return []
    base = UpdateLoad(engines=engines, requests=requests, updates=updates, transport=transport, seed=seed)
    counts = dict.fromkeys([(1, True), (engines, True), (engines, engines == 1)])
    return [
        replace(base, kv=policy, engines=count, rolling=rolling)
        for policy in kv.split(",")
        for count, rolling in counts
    ]


def untrained_model(directory: Path, seed: int) -> Path:
    """The quickstart's model before its warm-up, as a directory."""
    from orchestrator.recipes.shop_small.build import make_model
    from orchestrator.recipes.shop_small.vocabulary import save_tokenizer

    directory.mkdir(parents=True)
    save_tokenizer(directory)
    make_model(seed).save_pretrained(directory)
    return directory


def _manner(engines: int, rolling: bool) -> str:
    if engines == 1:
        return "one"
    return f"{engines}, one after another" if rolling else f"{engines}, all together"


def show(console: Console, content: dict[str, Any]) -> None:
    """The tables."""
    machine, results = content["machine"], content["results"]
    console.print(
        f"{machine['cpus']} CPUs ({machine['processor']}), {machine['memory_gib']} GiB, load "
        f"{machine['load_average_1m']}, Python {machine['python']}; seeds {content['seeds']}; "
        + ", ".join(f"{name} {number}" for name, number in content["versions"].items())
    )
    if results["updates"]:
        console.print(_updates_table(results["updates"]))
    if results["kills"]:
        console.print(_kills_table(results["kills"]))


def _updates_table(rows: list[dict[str, Any]]) -> Table:
    table = Table(title="Updates under load: embedded engine, staged", title_justify="left", box=None)
    table.add_column("engines")
    table.add_column("kv")
    for name in ("updates", "decode step", "stall in steps p50 / p99 / max", f"p99 <= {STALL_TARGET_STEPS:g}"):
        table.add_column(name, justify="right")
    for name in (
        "late without update p99 / max",
        "swap p50 / p99",
        "requests",
        "aborted",
        "lost tokens",
        "wrong stamps",
    ):
        table.add_column(name, justify="right")
    for row in rows:
        stall, late, swap = row["stall_steps"], row["late_without_update_steps"], row["swap_ms"]
        table.add_row(
            _manner(row["engines"], row["rolling"]),
            row["kv"],
            str(row["updates"]),
            f"{row['step_ms']:.2f} ms",
            f"{stall['p50']:.2f} / {stall['p99']:.2f} / {stall['max']:.2f}",
            "yes" if stall["p99"] <= STALL_TARGET_STEPS else "no",
            f"{late['p99']:.2f} / {late['max']:.2f}",
            f"{swap['p50']:.2f} / {swap['p99']:.2f} ms",
            *(str(row[name]) for name in ("requests", "aborted", "lost_tokens", "wrong_stamps")),
        )
    return table


def _kills_table(rows: list[dict[str, Any]]) -> Table:
    table = Table(title="Engines killed with SIGKILL in a run under load", title_justify="left", box=None)
    for name in ("engines", "killed", "kills", "requests moved", "re-routed (worst)", "episodes lost", "turns again"):
        table.add_column(name, justify="right")
    for name in ("replacement after", "served old weights"):
        table.add_column(name, justify="right")
    for row in rows:
        worst = row["rerouted_s_max"]
        verdict = "at most" if worst is not None and worst <= REROUTE_TARGET_S else "above"
        table.add_row(
            f"{row['engines']} {row['kind']}",
            row["killed"],
            str(len(row["kills"])),
            str(row["requests_moved"]),
            "-" if worst is None else f"{worst:.2f} s ({verdict} {REROUTE_TARGET_S:g})",
            f"{row['episodes_lost']} of {row['episodes_ended']}",
            f"{row['turns_generated_again']} of {row['turns']}",
            ", ".join(f"{kill['replaced_s']:.1f}" for kill in row["kills"]) + " s",
            str(row["served_old_weights"]),
        )
    return table


def draw(results: dict[str, Any]) -> Any:
    """Stalls by policy, and the seconds after each kill."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.6), layout="constrained")
    stalls, kills = figure.subplots(1, 2)
    rows = results["updates"]
    labels = [f"{row['kv']}, {_manner(row['engines'], row['rolling'])}" for row in rows]
    for offset, name in enumerate(("p50", "p99")):
        places = [position + 0.4 * offset for position in range(len(rows))]
        stalls.barh(places, [row["stall_steps"][name] for row in rows], 0.4, label=name)
    stalls.set_yticks([position + 0.2 for position in range(len(rows))], labels)
    stalls.axvline(STALL_TARGET_STEPS, color="black", linewidth=0.8, linestyle="--")
    stalls.set_xlabel("stall at an update (decode steps)")
    stalls.legend(fontsize=8)
    for row in results["kills"]:
        times = [kill["rerouted_s"] for kill in row["kills"]]
        kills.plot(range(1, len(times) + 1), times, "o-", label=f"{row['kind']}: requests elsewhere")
        kills.plot(
            range(1, len(times) + 1),
            [kill["replaced_s"] for kill in row["kills"]],
            "s:",
            label=f"{row['kind']}: replaced",
        )
    kills.axhline(REROUTE_TARGET_S, color="black", linewidth=0.8, linestyle="--")
    kills.set_xlabel("kill")
    kills.set_ylabel("seconds after the kill")
    if results["kills"]:
        kills.legend(fontsize=8)
    return figure
