"""The command: staleness against learning, table, figure and JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from rich.table import Table

from benchmarks.output import document, save_figure, table_console, write_json
from benchmarks.staleness.study import CORRECTIONS, Cell, StudyError, cells, done, read_rows, run_study, trials

TABLE_WIDTH = 96


def _numbers(context: click.Context, parameter: click.Parameter, value: str) -> tuple[int, ...]:
    del context
    try:
        found = tuple(int(part) for part in value.split(","))
    except ValueError as error:
        raise click.BadParameter(
            f"{value!r} must be whole numbers with commas, such as 0,8", param=parameter
        ) from error
    if min(found) < 0:
        raise click.BadParameter(f"{value!r}: a lag is at least 0", param=parameter)
    return found


def _names(context: click.Context, parameter: click.Parameter, value: str) -> tuple[str, ...]:
    del context
    found = tuple(part.strip() for part in value.split(","))
    unknown = [name for name in found if name not in CORRECTIONS]
    if unknown:
        raise click.BadParameter(f"{unknown[0]!r} is unknown: use {', '.join(CORRECTIONS)}", param=parameter)
    return found


@click.command()
@click.option("--seeds", default=5, show_default=True, help="How many; they count from --first-seed.")
@click.option("--first-seed", default=0, show_default=True)
@click.option("--lags", default="0,2,4,8,16", show_default=True, callback=_numbers, help="Updates.")
@click.option(
    "--corrections", default="none,tis,clip,decoupled", show_default=True, callback=_names, help=", ".join(CORRECTIONS)
)
@click.option("--steps", default=300, show_default=True, help="Updates of each run.")
@click.option("--eval-every", default=50, show_default=True)
@click.option("--held-out", default=400, show_default=True, help="Held-out tasks of every evaluation.")
@click.option("--config", default="quickstart", show_default=True, help="Configuration, as `millrace train` takes it.")
@click.option("--processes", default=2, show_default=True, help="Runs at a time, each with one thread.")
@click.option(
    "--dir",
    "directory",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("runs/staleness"),
    show_default=True,
    help="Models and finished runs.",
)
@click.option("--resume", is_flag=True, help="Keep the finished runs of --dir and run what is missing.")
@click.option("--finished", is_flag=True, help="Run nothing: show what --dir holds of such runs.")
@click.option("--json", "json_path", type=click.Path(path_type=Path, dir_okay=False), help="Write the result here.")
@click.option("--figure", "figure_path", type=click.Path(path_type=Path, dir_okay=False), help="An .svg or .png file.")
def staleness(
    seeds: int,
    first_seed: int,
    lags: tuple[int, ...],
    corrections: tuple[str, ...],
    steps: int,
    eval_every: int,
    held_out: int,
    config: str,
    processes: int,
    directory: Path,
    resume: bool,
    finished: bool,
    json_path: Path | None,
    figure_path: Path | None,
) -> None:
    """Train with behaviour weights that are exactly so many updates old, and compare what corrects for it."""
    for name, value in (("seeds", seeds), ("steps", steps), ("held-out", held_out), ("processes", processes)):
        if value < 1:
            raise click.BadParameter(f"{value}: give at least 1", param_hint=f"--{name}")
    if eval_every < 1:
        raise click.BadParameter(f"{eval_every}: give at least 1", param_hint="--eval-every")
    chosen = range(first_seed, first_seed + seeds)
    rows_path = directory / "rows.jsonl"
    try:
        if rows_path.exists() and not (resume or finished):
            raise StudyError(f"{rows_path} holds finished runs: add --resume to keep them, or choose another --dir")
        rows = read_rows(rows_path)
        wanted = trials(corrections, lags, chosen, steps, eval_every, held_out)
        if finished:  # of a study that may still be going on: nothing is written
            alike = {"steps": steps, "eval_every": eval_every, "held_out": held_out}
            rows = [row for row in rows if alike.items() <= row.items()]
            if not rows:
                raise StudyError(
                    f"{rows_path} holds no finished runs of {alike}: leave out --finished, or name another --dir"
                )
            waiting = []
        else:
            directory.mkdir(parents=True, exist_ok=True)
            rewrite(rows_path, rows)
            waiting = [trial for trial in wanted if not done(rows, trial)]

        def keep(row: dict[str, Any]) -> None:
            rows.append(row)
            with rows_path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            click.echo(
                f"{row['correction']}, lag {row['lag']}, seed {row['seed']}: {row['final']:.3f} "
                f"({row['seconds']:.0f} s; {len(rows)} runs done)",
                err=True,
            )

        if waiting:
            run_study(waiting, config, directory, processes, keep)
    except StudyError as error:
        raise click.ClickException(str(error)) from error
    shown = rows if finished else [row for row in rows if any(done([row], trial) for trial in wanted)]
    found = cells(shown)
    table_console(TABLE_WIDTH).print(table(found))
    if figure_path is not None:
        save_figure(figure_path, draw(found, shown))
    if json_path is not None:
        of = {key: sorted({row[key] for row in shown}) for key in ("seed", "lag", "correction", "steps", "held_out")}
        settings = {"config": config, "lags": of["lag"], "corrections": of["correction"], "steps": of["steps"]}
        settings |= {"held_out": of["held_out"]}
        results = {"cells": [asdict(cell) for cell in found], "runs": shown}
        write_json(json_path, document("staleness", seeds=of["seed"], settings=settings, results=results))


def rewrite(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write the rows that could be read: a torn last line goes."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def table(found: Sequence[Cell]) -> Table:
    """One line for each correction and lag."""
    made = Table(
        "correction", "lag", "seeds", "final", "± s.e.", "area", "below lag 0", "± s.e.", "max mismatch", box=None
    )
    for cell in found:
        gap = "" if cell.gap is None else f"{cell.gap:+.3f}"
        made.add_row(
            cell.correction,
            str(cell.lag),
            str(cell.seeds),
            f"{cell.final:.3f}",
            f"{cell.final_error:.3f}" if cell.seeds > 1 else "",
            f"{cell.area:.3f}",
            gap,
            f"{cell.gap_error:.3f}" if cell.gap_error else "",
            f"{cell.mismatch_max:.3f}",
        )
    return made


def draw(found: Sequence[Cell], rows: Sequence[dict[str, Any]]) -> Any:
    """Final success by lag, and the curves at the largest lag, a colour for each correction."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    last = max(cell.lag for cell in found)
    fresh = [cell for cell in found if cell.lag == 0][:1]  # on-policy all corrections are one
    for index, correction in enumerate(dict.fromkeys(cell.correction for cell in found)):
        stale = sorted(
            (cell for cell in found if cell.correction == correction and cell.lag), key=lambda cell: cell.lag
        )
        chosen = fresh + stale
        colour = f"C{index}"
        left.errorbar(
            [cell.lag for cell in chosen],
            [cell.final for cell in chosen],
            yerr=[cell.final_error for cell in chosen],
            marker="o",
            color=colour,
            label=correction,
        )
        curves = [row["curve"] for row in rows if row["correction"] == correction and row["lag"] == last]
        if curves:
            steps = [point[0] for point in curves[0]]
            means = [sum(curve[i][1] for curve in curves) / len(curves) for i in range(len(steps))]
            right.plot(steps, means, color=colour, label=correction)
    left.set_xticks(sorted({cell.lag for cell in found}))
    left.set(xlabel="lag of the behaviour weights (updates)", ylabel="held-out success at the end")
    right.set(xlabel="updates", ylabel="held-out success", title=f"lag {last}")
    figure.legend(*left.get_legend_handles_labels(), loc="outside right upper", frameon=False)
    for axes in (left, right):
        axes.grid(alpha=0.3)
    return figure
