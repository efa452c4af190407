"""How even the passes of several learner ranks are and how much of them is padding, on lengths of a workload.

*Balanced* is what the learner does. *Arrival order* is what a learner does that hands trajectories out in turn: each rank
fills its passes in the order of arrival, every pass padded to its longest row. Nothing runs: lengths are packed and counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from benchmarks.output import document, write_json
from env_pool.workloads.scripts import SUITES, suite_script
from learner.batching import balance, pack
from learner.packing import Packer, PackingCounts, even_bins, imbalance_bound


@dataclass(frozen=True)
class Settings:
    """One invocation."""

    suite: str = "swe"
    ranks: tuple[int, ...] = (2, 4, 8, 16, 32)
    groups: int = 64
    group_size: int = 8
    token_budget: int = 131072
    steps: int = 10
    seed: int = 0


@dataclass(frozen=True)
class Packed:
    """One way of packing at one number of ranks: means over the steps, and the worst step."""

    ranks: int
    way: str
    passes: float
    padding: float
    imbalance: float
    worst_imbalance: float
    bound: float | None
    """The largest that the imbalance could have been, of the worst step; None where there is no bound."""


def step_lengths(settings: Settings, step: int) -> list[int]:
    """Tokens of the trajectories of one step, in the order of dispatch."""
    indices = range(step * settings.groups, (step + 1) * settings.groups)
    members = range(settings.group_size)
    return [
        suite_script(settings.suite, settings.seed, index, member).context_tokens
        for index in indices
        for member in members
    ]


def in_turn(lengths: Sequence[int], ranks: int, budget: int) -> list[list[list[int]]]:
    """The passes of each rank if trajectory i goes to rank ``i % ranks``, in this order."""
    shares = []
    for rank in range(ranks):
        passes: list[list[int]] = []
        for length in lengths[rank::ranks]:
            if not passes or sum(passes[-1]) + length > budget:
                passes.append([])
            passes[-1].append(length)
        shares.append(passes)
    return shares


def balanced(settings: Settings, ranks: int) -> Packed:
    """What the learner does."""
    found, passes, bounds = [], [], []
    for step in range(settings.steps):
        lengths = step_lengths(settings, step)
        packer: Packer[range] = Packer(pack, balance)
        bins = even_bins([range(length) for length in lengths], ranks, settings.token_budget, packer)
        counts = PackingCounts(ranks, packer)
        counts.add(bins)
        found.append(counts.metrics())
        passes.append(len(bins))
        bounds.append(imbalance_bound(lengths, ranks))
    uneven = [metrics["packing/imbalance"] for metrics in found]
    padding = fmean(metrics["packing/padding"] for metrics in found)
    return Packed(ranks, "balanced", fmean(passes), padding, fmean(uneven), max(uneven), max(bounds))


def arrival_order(settings: Settings, ranks: int) -> Packed:
    """The naive way."""
    padding, uneven, passes = [], [], []
    for step in range(settings.steps):
        lengths = step_lengths(settings, step)
        shares = in_turn(lengths, ranks, settings.token_budget)
        rounds = max(map(len, shares))
        fullest = sum(max(sum(share[r]) if r < len(share) else 0 for share in shares) for r in range(rounds))
        rows = sum(max(rows) * len(rows) for share in shares for rows in share)
        padding.append(1.0 - sum(lengths) / rows)
        uneven.append(fullest * ranks / sum(lengths) - 1.0)
        passes.append(rounds * ranks)
    return Packed(ranks, "arrival order", fmean(passes), fmean(padding), fmean(uneven), max(uneven), None)


def run(settings: Settings) -> dict[str, Any]:
    """Measure every number of ranks both ways; returns the document."""
    rows = [asdict(way(settings, ranks)) for ranks in settings.ranks for way in (balanced, arrival_order)]
    return document("packing", seeds=[settings.seed], settings=asdict(settings), results=rows)


def table(results: Sequence[dict[str, Any]], suite: str) -> Table:
    """The results for a terminal."""
    made = Table(title=f"Packing of `{suite}` lengths over ranks")
    for name in ("ranks", "way", "passes", "padding", "imbalance", "worst step", "bound"):
        made.add_column(name, justify="left" if name == "way" else "right")
    for row in results:
        bound = "" if row["bound"] is None else f"{row['bound']:.2%}"
        shares = (f"{row[name]:.2%}" for name in ("padding", "imbalance", "worst_imbalance"))
        made.add_row(str(row["ranks"]), row["way"], f"{row['passes']:.0f}", *shares, bound)
    return made


@click.command("packing")
@click.option("--suite", type=click.Choice(SUITES), default="swe", show_default=True)
@click.option("--ranks", default="2,4,8,16,32", show_default=True, help="Comma-separated.")
@click.option("--groups", default=64, show_default=True, help="Of a step.")
@click.option("--group-size", default=8, show_default=True)
@click.option("--token-budget", default=131072, show_default=True, help="Of one pass of one rank.")
@click.option("--steps", default=10, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option(
    "--json", "json_path", type=click.Path(dir_okay=False, path_type=Path), help="Write the results to a file."
)
def packing(
    suite: str,
    ranks: str,
    groups: int,
    group_size: int,
    token_budget: int,
    steps: int,
    seed: int,
    json_path: Path | None,
) -> None:
    """How even the passes of several learner ranks are, and how much of them is padding."""
    try:
        counts = tuple(int(part) for part in ranks.split(","))
    except ValueError:
        raise click.BadParameter(f"{ranks!r}: give numbers such as 2,4,8", param_hint="--ranks") from None
    if min(*counts, groups, group_size, token_budget, steps) < 1:
        raise click.BadParameter("ranks, groups, group size, budget and steps must be at least 1")
    found = run(Settings(suite, counts, groups, group_size, token_budget, steps, seed))
    Console().print(table(found["results"], suite))
    if json_path is not None:
        write_json(json_path, found)
