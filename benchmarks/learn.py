"""Does it learn? The quickstart for several seeds through the real ``millrace train``, by kind and depth of task.

One seed is one process and one run directory, one after another; what is reported is read from the files that the run
itself wrote (``summary.json`` and ``eval/step-*.json``).
"""

from __future__ import annotations

import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

SHOWN_LOG_LINES = 15
STOP_GRACE_S = 10.0


class LearnError(Exception):
    """A run that failed or left no usable results; the message says which and why."""


@dataclass(frozen=True)
class Bar:
    """What the mean over the seeds has to reach: success rates as fractions, seconds of the whole command."""

    rise: float = 0.25
    end: float = 0.75
    wall_s: float = 300.0
    startup_s: float = 25.0


@dataclass(frozen=True)
class Share:
    """``successes`` of ``tasks``."""

    successes: float = 0.0
    tasks: int = 0

    def __add__(self, other: Share) -> Share:
        return Share(self.successes + other.successes, self.tasks + other.tasks)

    @property
    def rate(self) -> float:
        """The success rate; 0 of no tasks."""
        return self.successes / self.tasks if self.tasks else 0.0


@dataclass(frozen=True)
class SeedResult:
    """One run: its first and last evaluation, and how long everything took."""

    seed: int
    wall_s: float
    summary: dict[str, Any]
    start: dict[str, Any]
    end: dict[str, Any]

    @property
    def rise(self) -> float:
        return float(self.end["success"] - self.start["success"])


def read_result(directory: Path, seed: int, wall_s: float) -> SeedResult:
    """Read what a finished run left. Raises LearnError naming the file that is missing or damaged."""
    summary = _read_json(directory / "summary.json")
    if summary.get("status") != "finished":
        raise LearnError(f"{directory / 'summary.json'}: status is {summary.get('status')!r}, not 'finished'")
    evaluations = sorted((directory / "eval").glob("step-*.json"))
    if len(evaluations) < 2:
        raise LearnError(
            f"{directory / 'eval'} holds {len(evaluations)} evaluations; one before and one after are needed"
        )
    return SeedResult(seed, wall_s, summary, _read_json(evaluations[0]), _read_json(evaluations[-1]))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise LearnError(f"{path} does not exist: the run did not come to its end") from error
    except ValueError as error:
        raise LearnError(f"{path} is not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise LearnError(f"{path} holds {type(value).__name__}, not an object")
    return value


def pool(evaluations: Iterable[Mapping[str, Any]], part: str) -> dict[str, Share]:
    """Successes and tasks of all seeds by key of ``by_domain`` or ``by_difficulty``."""
    shares: dict[str, Share] = defaultdict(Share)
    for evaluation in evaluations:
        for key, entry in evaluation[part].items():
            shares[key] += Share(entry["success"] * entry["n"], entry["n"])
    return dict(shares)


def summarise(results: list[SeedResult], bar: Bar) -> dict[str, Any]:
    """Means over the seeds, the same by kind and depth, and which of the bars are missed."""
    means = {
        "start": _mean(result.start["success"] for result in results),
        "end": _mean(result.end["success"] for result in results),
        "rise": _mean(result.rise for result in results),
        "wall_s": _mean(result.wall_s for result in results),
        "startup_s": _mean(result.summary["startup_s"] for result in results),
    }
    missed = [
        f"{name} {means[name]:.3f} < {getattr(bar, name)}"
        for name in ("rise", "end")
        if means[name] < getattr(bar, name)
    ]
    for name in ("wall_s", "startup_s"):
        slowest = max(result.wall_s if name == "wall_s" else result.summary[name] for result in results)
        if slowest > getattr(bar, name):
            missed.append(f"{name} {slowest:.1f} > {getattr(bar, name)}")
    tables = {}
    for part in ("by_difficulty", "by_domain"):
        start, end = pool((result.start for result in results), part), pool((result.end for result in results), part)
        tables[part] = {
            key: {"n": share.tasks, "start": share.rate, "end": end.get(key, Share()).rate}
            for key, share in sorted(start.items())
        }
    return {"mean": means, **tables, "missed": missed}


def _mean(values: Iterable[float]) -> float:
    numbers = list(values)
    return sum(numbers) / len(numbers)


def train_seed(config: str, seed: int, directory: Path, overrides: tuple[str, ...], timeout_s: float) -> SeedResult:
    """One run of ``millrace train`` in a process of its own. Raises LearnError with the end of its output."""
    run = directory / f"seed-{seed}"
    log = directory / f"seed-{seed}.log"
    directory.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "orchestrator.cli", "train", config]
    command += [f"seed={seed}", f"run.dir={run}", "run.overwrite=true", *overrides]
    began_at = time.monotonic()
    try:
        returncode = run_group(command, log, timeout_s)
    except subprocess.TimeoutExpired as error:
        raise LearnError(f"seed {seed} did not end within {timeout_s:.0f} s; its output is in {log}") from error
    if returncode != 0:
        tail = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-SHOWN_LOG_LINES:])
        raise LearnError(f"seed {seed} ended with status {returncode} ({log}):\n{tail}")
    return read_result(run, seed, time.monotonic() - began_at)


def run_group(command: list[str], log: Path, timeout_s: float) -> int:
    """Run a command and all it starts as one process group, which a time-out ends as a whole."""
    with log.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        return process.wait(timeout_s)
    except BaseException:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(STOP_GRACE_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(STOP_GRACE_S)
        raise


def report(results: list[SeedResult], summary: Mapping[str, Any], console: Console) -> None:
    """Print the tables: seeds, depths, kinds."""
    seeds = Table("seed", "start", "end", "rise", "steps", "wall s", "first token s", "lag mean", "lag max", box=None)
    for result in results:
        facts = result.summary
        cells = [result.start["success"], result.end["success"], result.rise]
        times = [f"{result.wall_s:.0f}", f"{facts['startup_s']:.1f}", f"{facts['lag_mean']:.2f}", str(facts["lag_max"])]
        seeds.add_row(str(result.seed), *(f"{cell:.3f}" for cell in cells), str(facts["steps"]), *times)
    means = summary["mean"]
    rates = [f"{means[name]:.3f}" for name in ("start", "end", "rise")]
    seeds.add_row("mean", *rates, "", f"{means['wall_s']:.0f}", f"{means['startup_s']:.1f}", "", "")
    console.print(f"success on {results[0].end['tasks']} held-out tasks, sampled as in training")
    console.print(seeds)
    for part, title in (("by_difficulty", "depth"), ("by_domain", "kind")):
        table = Table(title, "tasks", "start", "end", "rise", box=None)
        for key, row in summary[part].items():
            rise = row["end"] - row["start"]
            table.add_row(key, str(row["n"]), f"{row['start']:.2f}", f"{row['end']:.2f}", f"{rise:+.2f}")
        console.print()
        console.print(table)
    console.print()
    console.print("all bars reached" if not summary["missed"] else f"missed: {'; '.join(summary['missed'])}")


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    return {
        "cpus": os.cpu_count(),
        "platform": platform.platform(),
        "processor": platform.processor() or platform.machine(),
    }


@click.command()
@click.argument("overrides", nargs=-1)
@click.option("--seeds", default=3, show_default=True, help="How many runs; their seeds count from --first-seed.")
@click.option("--first-seed", default=0, show_default=True)
@click.option("--config", default="quickstart", show_default=True, help="Configuration, as `millrace train` takes it.")
@click.option("--dir", "directory", type=click.Path(path_type=Path), default=Path("runs/learn"), show_default=True)
@click.option(
    "--json", "json_path", type=click.Path(path_type=Path, dir_okay=False), help="Write the result to this file."
)
@click.option("--check", is_flag=True, help="End with status 1 when a bar is missed.")
@click.option("--timeout", "timeout_s", default=900.0, show_default=True, help="Most seconds for one run.")
def learn(
    overrides: tuple[str, ...],
    seeds: int,
    first_seed: int,
    config: str,
    directory: Path,
    json_path: Path | None,
    check: bool,
    timeout_s: float,
) -> None:
    """Train the quickstart for several seeds and print what was learned. OVERRIDES are key.path=value, as for train."""
    if seeds < 1:
        raise click.BadParameter(f"{seeds} seeds: give at least 1", param_hint="--seeds")
    chosen = list(range(first_seed, first_seed + seeds))
    results = []
    for seed in chosen:
        click.echo(f"seed {seed}: training, output in {directory / f'seed-{seed}.log'}", err=True)
        try:
            results.append(train_seed(config, seed, directory, overrides, timeout_s))
        except LearnError as error:
            raise click.ClickException(str(error)) from error
    summary = summarise(results, Bar())
    report(results, summary, Console())
    if json_path is not None:
        document = {
            "bench": "learn",
            "machine": machine(),
            "versions": results[0].summary["versions"],
            "seeds": chosen,
            "settings": {"config": config, "overrides": list(overrides), "bar": asdict(Bar())},
            "results": {"summary": summary, "runs": [asdict(result) for result in results]},
        }
        json_path.parent.mkdir(parents=True, exist_ok=True)
        json_path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    if check and summary["missed"]:
        sys.exit(1)
