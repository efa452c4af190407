"""The command: staleness policies, and adaptive against fixed staleness, compared for what is learned and what it costs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from concurrent.futures import as_completed
from itertools import pairwise
from pathlib import Path
from statistics import mean
from typing import Any

import click
from rich.table import Table

from benchmarks.output import document, save_figure, table_console, write_json
from benchmarks.staleness.command import rewrite
from benchmarks.staleness.study import StudyError, prepare_model, read_rows, standard_error, worker_pool

TABLE_WIDTH = 120


def _policy(name: str) -> dict[str, Any]:
    return {"staleness.on_violation": name, "staleness.target_lag": 2.0, "staleness.max_lag": 2}


def _fixed(lag: float) -> dict[str, Any]:
    return {"staleness.target_lag": lag, "staleness.max_lag": 8}


VARIANTS: dict[str, dict[str, Any]] = {
    "mask_tokens": _policy("mask_tokens"),
    "drop_group": _policy("drop_group"),
    "wait": _policy("wait"),
    "fixed-0.5": _fixed(0.5),
    "fixed-2": _fixed(2.0),
    "fixed-4": _fixed(4.0),
    "fixed-8": _fixed(8.0),
    "adaptive": {**_fixed(1.0), "staleness.controller": "adaptive"},
}
"""The three policies have one bound of 2 versions, which the tools' tail breaks; the others may not be older than 8."""


def run_variant(job: tuple[str, int, int, int, int, str, Path]) -> dict[str, Any]:
    """One run in this process, as a row."""
    variant, seed, steps, eval_every, held_out, config_name, model = job
    import torch

    from benchmarks.staleness.run import area_under, configuration
    from benchmarks.staleness.ticks import TickedRun, Timing

    torch.set_num_threads(1)
    config = configuration(config_name, seed, VARIANTS[variant])
    run = TickedRun(config, model, Timing(), seed=seed, steps=steps, eval_every=eval_every, held_out=held_out)
    found = run.run()
    tokens = found.tokens
    return {
        "variant": variant,
        "seed": seed,
        "steps": steps,
        "eval_every": eval_every,
        "held_out": held_out,
        "final": found.curve[-1][3],
        "area": area_under([(tick, success) for _, tick, _, success in found.curve]),
        "ticks": found.curve[-1][1],
        "episodes": found.curve[-1][2],
        "curve": found.curve,
        "lag": mean(found.lags),
        "target_lag": mean(found.target_lags),
        "masked": tokens["masked"] / max(1, tokens["trained"] + tokens["masked"]),
        "dropped": sum(found.ledger["dropped"].values()) / found.ledger["dispatched"],
        "waited": found.waited_ticks / found.curve[-1][1],
        "length_bias": mean(found.trained_lengths) / mean(found.generated_lengths),
    }


@click.command()
@click.option("--variants", default=",".join(VARIANTS), show_default=True, help="Which, with commas.")
@click.option("--seeds", default=5, show_default=True, help="How many; they count from --first-seed.")
@click.option("--first-seed", default=0, show_default=True)
@click.option("--steps", default=300, show_default=True, help="Updates of each run.")
@click.option("--eval-every", default=50, show_default=True)
@click.option("--held-out", default=400, show_default=True)
@click.option("--config", default="quickstart", show_default=True)
@click.option("--processes", default=2, show_default=True, help="Runs at a time, each with one thread.")
@click.option(
    "--dir",
    "directory",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("runs/staleness-control"),
    show_default=True,
)
@click.option("--resume", is_flag=True, help="Keep the finished runs of --dir and run what is missing.")
@click.option("--json", "json_path", type=click.Path(path_type=Path, dir_okay=False), help="Write the result here.")
@click.option("--figure", "figure_path", type=click.Path(path_type=Path, dir_okay=False), help="An .svg or .png file.")
def staleness_control(
    variants: str,
    seeds: int,
    first_seed: int,
    steps: int,
    eval_every: int,
    held_out: int,
    config: str,
    processes: int,
    directory: Path,
    resume: bool,
    json_path: Path | None,
    figure_path: Path | None,
) -> None:
    """Compare the three staleness policies, and adaptive with fixed staleness, in runs whose clock is the engine's passes."""
    names = [name.strip() for name in variants.split(",")]
    unknown = [name for name in names if name not in VARIANTS]
    if unknown:
        raise click.BadParameter(f"{unknown[0]!r} is unknown: use {', '.join(VARIANTS)}", param_hint="--variants")
    for option, value in (("seeds", seeds), ("steps", steps), ("eval-every", eval_every), ("held-out", held_out)):
        if value < 1:
            raise click.BadParameter(f"{value}: give at least 1", param_hint=f"--{option}")
    directory.mkdir(parents=True, exist_ok=True)
    rows_path = directory / "rows.jsonl"
    chosen = range(first_seed, first_seed + seeds)
    same = {"steps": steps, "eval_every": eval_every, "held_out": held_out}
    try:
        if rows_path.exists() and not resume:
            raise StudyError(f"{rows_path} holds finished runs: add --resume to keep them, or choose another --dir")
        rows = [row for row in read_rows(rows_path) if all(row[key] == value for key, value in same.items())]
    except StudyError as error:
        raise click.ClickException(str(error)) from error
    rewrite(rows_path, rows)
    finished = {(row["variant"], row["seed"]) for row in rows}
    waiting = [(name, seed) for seed in chosen for name in names if (name, seed) not in finished]
    with worker_pool(processes) as pool:
        models = dict(zip(chosen, pool.map(prepare_model, [(config, s, directory) for s in chosen]), strict=True))
        running = {
            pool.submit(run_variant, (name, seed, steps, eval_every, held_out, config, models[seed])): (name, seed)
            for name, seed in waiting
        }
        for future in as_completed(running):
            name, seed = running[future]
            try:
                row = future.result()
            except Exception as error:
                raise click.ClickException(f"{name}, seed {seed}: {type(error).__name__}: {error}") from error
            rows.append(row)
            with rows_path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            click.echo(f"{name}, seed {seed}: {row['final']:.3f} in {row['ticks']} ticks", err=True)
    shown = [row for row in rows if row["variant"] in names and row["seed"] in chosen]
    console = table_console(TABLE_WIDTH)
    console.print(table(shown))
    if len(names) > 1:
        console.print(differences(shown, names))
    if figure_path is not None:
        save_figure(figure_path, draw(shown))
    if json_path is not None:
        settings = {"config": config, "variants": names, **same}
        write_json(json_path, document("staleness-control", seeds=list(chosen), settings=settings, results=shown))


def success_at(row: Mapping[str, Any], ticks: float) -> float:
    """Held-out success after so many ticks, on straight lines between evaluations.

    >>> success_at({"curve": [(0, 0, 0, 0.2), (50, 100, 9, 0.6)]}, 25)
    0.3
    """
    curve = row["curve"]
    for (_, start, _, low), (_, end, _, high) in pairwise(curve):
        if ticks <= end:
            return float(low + (high - low) * (ticks - start) / max(1, end - start))
    return float(curve[-1][3])


def table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """A line for each variant, means over its seeds; ``at T``: success when the fastest variant is done."""
    horizon = min(row["ticks"] for row in rows)
    made = Table(
        "variant", "seeds", "final", f"at T={horizon}", "ticks", "lag", "target", "masked", "dropped", "waits", "length bias",
        box=None,
    )  # fmt: skip
    for name in dict.fromkeys(row["variant"] for row in rows):
        chosen = [row for row in rows if row["variant"] == name]

        def average(key: str, chosen: list[Mapping[str, Any]] = chosen) -> float:
            return mean(float(row[key]) for row in chosen)

        made.add_row(
            name,
            str(len(chosen)),
            f"{average('final'):.3f}",
            f"{mean(success_at(row, horizon) for row in chosen):.3f}",
            f"{average('ticks'):.0f}",
            f"{average('lag'):.2f}",
            f"{average('target_lag'):.2f}",
            f"{average('masked'):.1%}",
            f"{average('dropped'):.1%}",
            f"{average('waited'):.1%}",
            f"{average('length_bias'):.3f}",
        )
    return made


def differences(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> Table:
    """Each variant's success less that of the first name's, seed by seed: mean and standard error, at the end and at T."""
    horizon = min(row["ticks"] for row in rows)
    first, *others = names
    by_seed = {(row["variant"], row["seed"]): row for row in rows}
    base = {seed: row for (name, seed), row in by_seed.items() if name == first}
    made = Table(f"less {first}", "seeds", "final", "± s.e.", f"at T={horizon}", "± s.e.", box=None)
    for name in others:
        pairs = [(by_seed[name, seed], row) for seed, row in base.items() if (name, seed) in by_seed]
        ends = [mine["final"] - other["final"] for mine, other in pairs]
        early = [success_at(mine, horizon) - success_at(other, horizon) for mine, other in pairs]
        shown = [f"{value:+.3f}" for each in (ends, early) for value in (mean(each), standard_error(each))]
        made.add_row(name, str(len(pairs)), *(text.lstrip("+") if at % 2 else text for at, text in enumerate(shown)))
    return made


def draw(rows: Sequence[Mapping[str, Any]]) -> Any:
    """Success against time and against samples: a colour for each variant, its mean over the seeds, and each seed faintly."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.6), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for index, name in enumerate(dict.fromkeys(row["variant"] for row in rows)):
        curves = [row["curve"] for row in rows if row["variant"] == name]
        middle = [[mean(values) for values in zip(*points, strict=True)] for points in zip(*curves, strict=True)]
        for place, column in ((axes[0], 1), (axes[1], 2)):
            place.plot([p[column] for p in middle], [p[3] for p in middle], f"C{index}o-", markersize=3, label=name)
            for curve in curves if len(curves) > 1 else []:
                place.plot([p[column] for p in curve], [p[3] for p in curve], f"C{index}", alpha=0.15)
    axes[0].set(xlabel="time (forward passes of the engine)", ylabel="held-out success")
    axes[1].set(xlabel="episodes generated")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper", frameon=False)
    for place in axes:
        place.grid(alpha=0.3)
        place.locator_params(axis="x", nbins=5)
    return figure
