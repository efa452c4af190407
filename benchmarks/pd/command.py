"""The command ``millrace bench pd``."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from benchmarks.output import document, save_figure, table_console, write_json
from benchmarks.pd.cases import (
    CASES,
    ENGINES,
    SUITES,
    Case,
    Layout,
    config_of,
    default_splits,
    parse_splits,
    settings_of,
    write_prefixes,
)
from benchmarks.pd.display import TABLE_WIDTH, figure_of, table_of
from benchmarks.pd.measure import PdRow, measure
from benchmarks.pd.words import best_split, sentences, summary, verdict_of
from orchestrator.composition import ConfigError
from orchestrator.simulator.events import SimulationStalled

PREFIX_TASKS = 256


def cases_of(suites: Sequence[str], kv: str | None) -> list[Case]:
    """The cases of these suites (none: all), of this KV policy (None: as they are). Raises ConfigError."""
    for suite in suites:
        if suite not in SUITES:
            raise ConfigError(f"--suite {suite}: there is no such suite; there are {', '.join(SUITES)}")
    return [case for case in CASES if (not suites or case.suite in suites) and kv in (None, case.kv)]


def layouts_of(splits: str | None, engines: int, auto: bool) -> list[Layout]:
    """All engines doing both, the splits, and roles by load beginning with the last split. Raises ConfigError."""
    if engines < 2:
        raise ConfigError(f"--engines {engines}: a split needs at least 2")
    static = parse_splits(splits, engines) if splits else default_splits(engines)
    start = static[-1]
    return [Layout(), *static, *([Layout(start.prefill, start.decode, auto=True)] if auto else [])]


def run_cases(
    cases: Sequence[Case],
    layouts: Sequence[Layout],
    engines: int,
    steps: int,
    seed: int,
    overrides: tuple[str, ...],
    told: Callable[[Case, list[PdRow]], None],
) -> list[PdRow]:
    """Every layout on every case; ``told`` hears of each case that is done. Raises ConfigError, SimulationStalled."""
    rows: list[PdRow] = []
    with tempfile.TemporaryDirectory(prefix="millrace-pd-") as directory:
        recording = Path(directory) / "prefixes.jsonl"
        if any(case.suite == "prefixes" for case in cases):
            write_prefixes(recording, seed, PREFIX_TASKS)
        for case in cases:
            sized = case.sized(engines / ENGINES)
            made = []
            for layout in layouts:
                settings = settings_of(sized, layout, engines, steps, seed, recording)
                made.append(measure(sized, layout, config_of(settings, overrides)))
            rows += made
            told(case, made)
    return rows


@click.command("pd")
@click.option("--suite", "suites", multiple=True, help=f"{', '.join(SUITES)}; may be repeated. [default: all]")
@click.option(
    "--kv", type=click.Choice(["keep", "recompute"]), help="Only cases in which weight updates do this. [default: both]"
)
@click.option(
    "--engine",
    type=click.Choice(["synthetic", "torch"]),
    default="synthetic",
    show_default=True,
    help="Modelled accelerators on a simulated clock, or the embedded engine in processes of this machine.",
)
@click.option("--engines", type=int, help=f"[default: {ENGINES}; torch: 2]")
@click.option("--split", "splits", help="PREFILL:DECODE, several with commas. [default: 1:7 to 4:4]")
@click.option("--auto/--no-auto", default=True, show_default=True, help="Measure roles by load as well.")
@click.option("--steps", type=click.IntRange(min=1), default=8, show_default=True, help="Steps measured.")
@click.option("--quick", is_flag=True, help="Two steps and two splits: a look, no measurement.")
@click.option("--seed", default=0, show_default=True)
@click.option("--set", "overrides", multiple=True, help="key=value of the modelled configuration; may be repeated.")
@click.option("--json", "json_path", type=click.Path(path_type=Path, dir_okay=False), help="Write the result here.")
@click.option(
    "--figure", "figure_path", type=click.Path(path_type=Path, dir_okay=False), help="Draw it (.svg or .png)."
)
def pd(engine: str, json_path: Path | None, figure_path: Path | None, **options: Any) -> None:
    """Measure what engines of their own for prefill and decode do to requests and steps, at equal resources."""
    if options.pop("quick"):
        options |= {
            "steps": 2,
            "splits": options["splits"] or _first_splits(options["engines"] or (2 if engine == "torch" else ENGINES)),
        }
    try:
        if engine == "torch":
            from benchmarks.pd.real import run_real

            run_real(options, json_path, figure_path)
        else:
            run_modelled(options, json_path, figure_path)
    except (ConfigError, SimulationStalled) as error:
        raise click.ClickException(str(error)) from error


def _first_splits(engines: int) -> str:
    return ",".join(layout.split for layout in default_splits(engines)[:2])


def run_modelled(options: dict[str, Any], json_path: Path | None, figure_path: Path | None) -> None:
    """Simulate, print tables and what they say, write files. Raises ConfigError, SimulationStalled."""
    console = table_console(TABLE_WIDTH)
    engines: int = options["engines"] or ENGINES
    cases = cases_of(options["suites"], options["kv"])
    layouts = layouts_of(options["splits"], engines, options["auto"])
    by_case: dict[str, list[PdRow]] = {}

    def told(case: Case, rows: list[PdRow]) -> None:
        by_case[case.name] = rows
        console.print(table_of(case.name, rows))
        for line in sentences(rows):
            console.print(line, soft_wrap=True, markup=False, highlight=False)
        console.print()

    overrides = tuple(options["overrides"])
    rows = run_cases(cases, layouts, engines, options["steps"], options["seed"], overrides, told)
    verdicts = [
        verdict_of(mixed, best)
        for made in by_case.values()
        if (mixed := next((row for row in made if row.split is None), None)) and (best := best_split(made))
    ]
    lines = summary(verdicts)
    for line in lines:
        console.print(line, soft_wrap=True, markup=False, highlight=False)
    if json_path is not None:
        settings = {name: options[name] for name in ("suites", "kv", "splits", "auto", "steps", "overrides")}
        results = {
            "rows": [row.to_dict() for row in rows],
            "words": {name: sentences(made) for name, made in by_case.items()},
            "summary": lines,
        }
        write_json(
            json_path,
            document("pd", seeds=[options["seed"]], settings=settings | {"engines": engines}, results=results),
        )
    if figure_path is not None:
        save_figure(figure_path, figure_of(rows))
