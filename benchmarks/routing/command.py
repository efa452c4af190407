"""The command: the cases, the tables, the figure and the JSON document."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from benchmarks.output import document, save_figure, table_console, write_json
from benchmarks.routing.closed_loop import Case, ClosedLoop, Measured
from benchmarks.routing.engines import IdealEngines, ModelledEngines
from env_pool.workloads.scripts import SUITES
from rollout_workers.engines.synthetic.config import SyntheticEngineConfig
from rollout_workers.engines.synthetic.cost_model import CostModel
from rollout_workers.router import Load, RoutingPolicy

POLICIES = {
    "least requests": RoutingPolicy(sticky=False, prefix_aware=False, load=Load.REQUESTS),
    "sticky, by requests": RoutingPolicy(prefix_aware=False, load=Load.REQUESTS),
    "sticky, by tokens": RoutingPolicy(prefix_aware=False, load=Load.TOKENS),
    "sticky, by sessions": RoutingPolicy(prefix_aware=False),
    "prefix-aware": RoutingPolicy(),
}
"""By name; the last one is what runs use."""
TABLE_WIDTH = 110


@dataclass(frozen=True)
class Settings:
    """One invocation."""

    suites: tuple[str, ...] = ("swe",)
    engines: tuple[int, ...] = (4, 64)
    workers: tuple[int, ...] = (1, 4)
    episodes: int = 32
    """In flight, for each engine."""
    group_size: int = 8
    policies: tuple[str, ...] = tuple(POLICIES)
    minutes: float = 30.0
    """Measured, after half as many to warm up."""
    seed: int = 0


@dataclass(frozen=True)
class AdaptiveSettings:
    """One invocation with ``--adaptive``: fixed numbers of episodes, and the one that is found."""

    suite: str = "swe"
    engines: int = 4
    workers: int = 2
    kv_tokens: int = 1_000_000
    """Of each engine."""
    episodes: tuple[int, ...] = (8, 16, 24, 32, 48, 64, 96)
    """In flight, for each engine."""
    minutes: float = 120.0
    seed: int = 0


def run(settings: Settings) -> dict[str, Any]:
    """Measure every case; returns the document."""
    rows = []
    for suite in settings.suites:
        for engines in settings.engines:
            for workers in settings.workers:
                for name in settings.policies:
                    for told in (True,) if workers == 1 else (True, False):
                        case = Case(
                            suite=suite,
                            engines=engines,
                            episodes=engines * settings.episodes,
                            workers=workers,
                            group_size=settings.group_size,
                            policy=POLICIES[name],
                            told=told,
                            seed=settings.seed,
                            warm_up_s=30.0 * settings.minutes,
                            measured_s=60.0 * settings.minutes,
                        )
                        rows.append(_row(name, case, ClosedLoop(case, IdealEngines()).run()))
    return document("routing", seeds=[settings.seed], settings=asdict(settings), results=rows)


def _row(name: str, case: Case, measured: Measured) -> dict[str, Any]:
    return {
        "policy": name,
        "suite": case.suite,
        "engines": case.engines,
        "workers": case.workers,
        "told": case.told,
        "turns": measured.turns,
        "affinity": measured.affinity,
        "moved": measured.moved,
        "imbalance": {measure: asdict(imbalance) for measure, imbalance in measured.imbalance.items()},
    }


def run_adaptive(settings: AdaptiveSettings) -> dict[str, Any]:
    """Measure each number of episodes, and what workers find by themselves with the largest one as their ceiling."""
    cost = CostModel.from_config(SyntheticEngineConfig(kv_tokens=settings.kv_tokens, time_scale=1.0, token_scale=1.0))
    rows = []
    for adaptive, episodes in [*((False, count) for count in settings.episodes), (True, max(settings.episodes))]:
        case = Case(
            suite=settings.suite,
            engines=settings.engines,
            episodes=settings.engines * episodes,
            workers=settings.workers,
            adaptive=adaptive,
            seed=settings.seed,
            warm_up_s=60.0 * settings.minutes,
            measured_s=60.0 * settings.minutes,
        )
        engines = ModelledEngines(cost, settings.engines)
        loop = ClosedLoop(case, engines)
        measured = loop.run()
        rows.append(
            {
                "adaptive": adaptive,
                "episodes": episodes,
                "in_flight": measured.in_flight / settings.engines,
                "tokens_per_s": measured.output_tokens / case.measured_s / settings.engines,
                "found": measured.cached / max(1, measured.possible),
                "ended": measured.ended,
            }
        )
    return document("routing --adaptive", seeds=[settings.seed], settings=asdict(settings), results=rows)


def show(result: dict[str, Any], console: Console) -> None:
    """Print the tables."""
    groups: dict[tuple[str, int, int], list[dict[str, Any]]] = {}
    for row in result["results"]:
        groups.setdefault((row["suite"], row["engines"], row["workers"]), []).append(row)
    for (suite, engines, workers), rows in groups.items():
        workers_said = "a worker" if workers == 1 else f"{workers} workers"
        table = Table(title=f"{suite}, {engines} engines, {workers_said}: max/mean load", title_justify="left")
        for column in (
            "policy",
            "others' load",
            "prefix reuse",
            "moved",
            "sessions",
            "requests: whole",
            "10 min",
            "1 min",
        ):
            table.add_column(column, justify="left" if column in ("policy", "others' load") else "right")
        for row in rows:
            sessions, requests = row["imbalance"]["sessions"], row["imbalance"]["requests"]
            table.add_row(
                row["policy"],
                "" if workers == 1 else "told" if row["told"] else "unknown",
                f"{row['affinity']:.2%}",
                f"{row['moved']:,}",
                f"{sessions['moment']:.3f}",
                f"{requests['whole']:.3f}",
                f"{requests['ten_minutes']:.3f}",
                f"{requests['minute']:.3f}",
            )
        console.print(table)
    console.print(
        "prefix reuse: of the prompt tokens whose KV some engine had, those whose KV was where the request went; sessions: at "
        "one moment, on average; requests in flight: averaged over the whole time, ten minutes, a minute"
    )
    _footer(result, console)


def show_adaptive(result: dict[str, Any], console: Console) -> None:
    """Print the table."""
    settings = result["settings"]
    table = Table(
        title=f"{settings['suite']}, {settings['engines']} engines with KV for {settings['kv_tokens']:,} tokens each",
        title_justify="left",
    )
    for column in ("episodes an engine", "in flight", "tokens/s an engine", "prefix found"):
        table.add_column(column, justify="right")
    for row in result["results"]:
        table.add_row(
            f"adaptive, at most {row['episodes']}" if row["adaptive"] else str(row["episodes"]),
            f"{row['in_flight']:.1f}",
            f"{row['tokens_per_s']:,.0f}",
            f"{row['found']:.1%}",
        )
    console.print(table)
    _footer(result, console)


def _footer(result: dict[str, Any], console: Console) -> None:
    console.print(f"seed {result['seeds'][0]}; modelled time, no clock; {result['versions']}")


def draw(result: dict[str, Any], path: Path) -> None:
    """Prefix reuse against the imbalance of sessions and of requests, a column for each number of engines and workers."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    rows = [row for row in result["results"] if row["told"]]
    panels = list(dict.fromkeys((row["suite"], row["engines"], row["workers"]) for row in rows))
    measures = {
        "sessions": ("moment", "sessions at one moment"),
        "requests": ("ten_minutes", "requests over 10 minutes"),
    }
    figure, axes = plt.subplots(2, len(panels), figsize=(3.4 * len(panels), 6.4), squeeze=False, sharey="col")
    for line, (measure, (window, words)) in zip(axes, measures.items(), strict=True):
        for axis, panel in zip(line, panels, strict=True):
            for row in rows:
                if (row["suite"], row["engines"], row["workers"]) == panel:
                    x = row["imbalance"][measure][window]
                    axis.plot([x], [100 * row["affinity"]], "o", label=row["policy"])
            axis.axhline(99, color="grey", linewidth=0.6)
            axis.axvline(1.1, color="grey", linewidth=0.6)
            axis.set_xlabel(f"max/mean {words}")
            axis.set_ylabel("prefix reuse, % of the possible")
            axis.set_title(f"{panel[0]}, {panel[1]} engines, workers: {panel[2]}", fontsize="small")
    axes[0][-1].legend(fontsize="small", loc="center right")
    figure.tight_layout()
    save_figure(path, figure)
    plt.close(figure)


def draw_adaptive(result: dict[str, Any], path: Path) -> None:
    """Tokens a second by episodes in flight; the adaptive case is a mark of its own."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    fixed = [row for row in result["results"] if not row["adaptive"]]
    figure, axis = plt.subplots(figsize=(5.6, 4.0))
    axis.plot([row["in_flight"] for row in fixed], [row["tokens_per_s"] for row in fixed], "o-", label="fixed")
    for row in result["results"]:
        if row["adaptive"]:
            axis.plot([row["in_flight"]], [row["tokens_per_s"]], "*", markersize=14, label="adaptive")
    axis.set_xlabel("episodes in flight, an engine")
    axis.set_ylabel("tokens/s, an engine")
    axis.set_ylim(bottom=0)
    axis.legend()
    figure.tight_layout()
    save_figure(path, figure)
    plt.close(figure)


def _numbers(text: str, name: str) -> tuple[int, ...]:
    try:
        numbers = tuple(int(part) for part in text.split(","))
    except ValueError:
        numbers = ()
    if not numbers or min(numbers) < 1:
        raise click.BadParameter(f"--{name} {text!r}: write whole numbers from 1, separated by commas")
    return numbers


def _names(text: str, known: Sequence[str], name: str) -> tuple[str, ...]:
    names = tuple(part.strip() for part in text.split(";" if ";" in text else ",")) if text != "all" else tuple(known)
    for each in names:
        if each not in known:
            raise click.BadParameter(f"--{name}: there is no {each!r}; there are {'; '.join(known)}")
    return names


@click.command()
@click.option("--suites", default="swe", show_default=True, help=f"Of {', '.join(SUITES)}.")
@click.option("--engines", default="4,64", show_default=True, help="Numbers of engines.")
@click.option("--workers", default="1,4", show_default=True, help="Numbers of rollout workers.")
@click.option("--episodes", default=32, show_default=True, help="Episodes in flight, for each engine.")
@click.option("--policies", default="all", show_default=True, help="Separated by semicolons.")
@click.option(
    "--minutes", default=30.0, show_default=True, help="Modelled minutes, after as many or half of them to warm up."
)
@click.option(
    "--adaptive", is_flag=True, help="Adaptive concurrency against fixed numbers of episodes, with little KV."
)
@click.option("--kv-tokens", default=1_000_000, show_default=True, help="With --adaptive: KV of an engine, in tokens.")
@click.option("--seed", default=0, show_default=True)
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the result to this file.")
@click.option("--figure", type=click.Path(path_type=Path), help="Draw it (svg or png).")
def routing(
    suites: str,
    engines: str,
    workers: str,
    episodes: int,
    policies: str,
    minutes: float,
    adaptive: bool,
    kv_tokens: int,
    seed: int,
    json_path: Path | None,
    figure: Path | None,
) -> None:
    """Where the router sends the sessions of a workload: prefix reuse, balance, moves. Simulated, with the run's own router."""
    if minutes < 10:
        raise click.BadParameter(f"--minutes must be at least 10, got {minutes:g}: loads are compared over ten minutes")
    chosen = _names(suites, SUITES, "suites")
    if adaptive:
        found = AdaptiveSettings(chosen[0], kv_tokens=kv_tokens, minutes=minutes, seed=seed)
        result = run_adaptive(found)
        show_adaptive(result, table_console(TABLE_WIDTH))
    else:
        settings = Settings(
            suites=chosen,
            engines=_numbers(engines, "engines"),
            workers=_numbers(workers, "workers"),
            episodes=episodes,
            policies=_names(policies, list(POLICIES), "policies"),
            minutes=minutes,
            seed=seed,
        )
        result = run(settings)
        show(result, table_console(TABLE_WIDTH))
    if json_path is not None:
        write_json(json_path, result)
    if figure is not None:
        (draw_adaptive if adaptive else draw)(result, figure)
