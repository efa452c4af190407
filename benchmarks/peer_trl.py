"""Millrace against TRL's GRPOTrainer: the same model, prompts, completions and tokens; steps a second.

Each repeat runs TRL on one thread, TRL on two threads and Millrace, one after another, so that a machine that is busier
at times slows them alike; medians count. Millrace's side is a real `millrace train`: controller, queue, worker, engine
and learner as processes, asynchronous, every token within `max_lag`. Both count completion tokens only.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from benchmarks.learn import SHOWN_LOG_LINES, run_group
from benchmarks.output import document, save_figure, write_json
from benchmarks.process_cpu import CpuWatch

ROOT = Path(__file__).parents[1]
PYTHON = ROOT / ".venv-peers" / "bin" / "python"
TIME_OUT_S = 900.0
MILLRACE = "Millrace"


class PeerError(Exception):
    """A side that could not be measured; the message says which and why."""


@dataclass(frozen=True)
class Comparison:
    """One optimizer step is ``prompts`` x ``completions`` x ``tokens`` tokens."""

    prompts: int = 8
    completions: int = 8
    tokens: int = 32
    learning_rate: float = 1e-3
    trl_steps: int = 40
    millrace_steps: int = 200
    warm_up: int = 10
    """Steps at the beginning of each run that are not timed."""
    trl_threads: tuple[int, ...] = (1, 2)
    target_lag: float = 2.0
    in_flight: int = 192
    """Completions that Millrace has in flight."""
    kv: str = "keep"
    """What a weight update does with the KV of completions under way (`weights.kv`). With a version every 2,048 tokens,
    computing it anew costs as much as the generation itself."""
    repeats: int = 5
    seed: int = 0

    @property
    def step_tokens(self) -> int:
        return self.prompts * self.completions * self.tokens


@dataclass(frozen=True)
class Measured:
    """One run of one side, over its steps after the warm-up."""

    steps_per_s: float
    tokens_per_s: float
    cpu_ms_per_step: float
    reward: float
    """Mean of the last fifth of the steps: both sides do learn."""
    lag: float = 0.0
    """Mean lag of the trained tokens."""
    cpu_by_role: dict[str, float] = field(default_factory=dict)
    """CPU milliseconds a step by process."""
    versions: dict[str, str] = field(default_factory=dict)


def run(comparison: Comparison, python: Path, directory: Path) -> dict[str, Any]:
    """Measure; returns the document. Raises PeerError."""
    from benchmarks.peers.trl_ceiling import engine_alone, learner_alone
    from benchmarks.peers.trl_model import save_model

    check_python(python)
    model = directory / "model"
    parameters = save_model(model, comparison.seed)
    runs: dict[str, list[Measured]] = {}
    for _ in range(comparison.repeats):
        for threads in comparison.trl_threads:
            runs.setdefault(trl_name(threads), []).append(run_trl(comparison, threads, python, model, directory))
        runs.setdefault(MILLRACE, []).append(run_millrace(comparison, model, directory))
    engine = engine_alone(
        model, rows=comparison.in_flight, new_tokens=comparison.tokens, requests=8 * comparison.in_flight
    )
    learner = learner_alone(
        model,
        groups=comparison.prompts,
        size=comparison.completions,
        new_tokens=comparison.tokens,
        learning_rate=comparison.learning_rate,
        steps=comparison.trl_steps,
    )
    result = summarise(comparison, runs, engine / comparison.step_tokens, learner)
    settings = {**asdict(comparison), "parameters": parameters, "trl_versions": runs[trl_name(1)][0].versions}
    return document("peer trl", seeds=[comparison.seed], settings=settings, results=result)


def summarise(
    comparison: Comparison, runs: dict[str, list[Measured]], engine_steps: float, learner_steps: float
) -> dict[str, Any]:
    """A row a system (medians), the ratio to TRL at its better number of threads, and what limits Millrace.

    ``engine_steps`` and ``learner_steps``: steps a second that each would allow with a core of its own. The pipeline of
    the two is no faster than the slower one; and no faster than the cores, all of them always busy, carry out the CPU
    seconds that a step really takes in all processes together.
    """
    rows = [_row(name, measured) for name, measured in runs.items()]
    by_name = {row["system"]: row for row in rows}
    best_trl = max((row for row in rows if row["system"] != MILLRACE), key=lambda row: float(row["steps_per_s"]))
    ours = by_name[MILLRACE]
    cores = os.cpu_count() or 1
    busy = cores * 1000 / ours["cpu_ms_per_step"] if ours["cpu_ms_per_step"] else None
    pairs = zip(runs[MILLRACE], runs[best_trl["system"]], strict=True)
    return {
        "systems": rows,
        "best_trl": best_trl["system"],
        "ratio": round(ours["steps_per_s"] / best_trl["steps_per_s"], 3),
        "ratio_by_repeat": [round(a.steps_per_s / b.steps_per_s, 3) for a, b in pairs],
        "ceiling": {
            "engine_alone_steps_per_s": round(engine_steps, 2),
            "learner_alone_steps_per_s": round(learner_steps, 2),
            "pipeline_steps_per_s": round(min(engine_steps, learner_steps), 2),
            "all_cores_busy_steps_per_s": None if busy is None else round(busy, 2),
        },
    }


def _row(name: str, measured: Sequence[Measured]) -> dict[str, Any]:
    def median(values: Sequence[float]) -> float:
        return round(statistics.median(values), 3)

    rates = [each.steps_per_s for each in measured]
    roles = {role for each in measured for role in each.cpu_by_role}
    by_role = {role: median([each.cpu_by_role.get(role, 0.0) for each in measured]) for role in roles}
    return {
        "system": name,
        "steps_per_s": median(rates),
        "steps_per_s_range": [round(min(rates), 3), round(max(rates), 3)],
        "tokens_per_s": median([each.tokens_per_s for each in measured]),
        "cpu_ms_per_step": median([each.cpu_ms_per_step for each in measured]),
        "reward": median([each.reward for each in measured]),
        "lag": median([each.lag for each in measured]),
        "cpu_ms_by_role": dict(sorted(by_role.items(), key=lambda item: -item[1])),
    }


def trl_name(threads: int) -> str:
    return f"TRL, {threads} thread" + "s" * (threads > 1)


def check_python(python: Path) -> None:
    """Raises PeerError when TRL cannot be imported there."""
    if not python.exists():
        raise PeerError(f"{python} does not exist: TRL runs in an environment of its own, which `make peers` makes")
    found = subprocess.run([str(python), "-c", "import trl"], capture_output=True, text=True, timeout=TIME_OUT_S)
    if found.returncode != 0:
        raise PeerError(f"{python} cannot import trl ({_last_line(found.stderr)}): make it again with `make peers`")


def run_trl(comparison: Comparison, threads: int, python: Path, model: Path, directory: Path) -> Measured:
    """One run of GRPOTrainer with that many threads. Raises PeerError."""
    out = directory / "trl.json"
    settings = {
        "model": model,
        "out": out,
        "steps": comparison.trl_steps,
        "prompts": comparison.prompts,
        "completions": comparison.completions,
        "tokens": comparison.tokens,
        "threads": threads,
        "learning-rate": comparison.learning_rate,
        "seed": comparison.seed,
    }
    command = [
        "env",
        f"OMP_NUM_THREADS={threads}",
        f"PYTHONPATH={ROOT}",
        str(python),
        "-m",
        "benchmarks.peers.trl_runner",
    ]
    command += [f"--{name}={value}" for name, value in settings.items()]
    _run(command, directory / "trl.log", trl_name(threads))
    record = json.loads(out.read_text(encoding="utf-8"))
    check_tokens(trl_name(threads), record["tokens"], comparison)
    first, steps = comparison.warm_up, len(record["at"]) - comparison.warm_up
    rate = steps / (record["at"][-1] - record["at"][first - 1])
    return Measured(
        steps_per_s=rate,
        tokens_per_s=rate * comparison.step_tokens,
        cpu_ms_per_step=(record["cpu"][-1] - record["cpu"][first - 1]) / steps * 1000,
        reward=statistics.fmean(record["rewards"][-max(1, comparison.trl_steps // 5) :]),
        versions=record["versions"],
    )


def run_millrace(comparison: Comparison, model: Path, directory: Path) -> Measured:
    """One `millrace train`. Raises PeerError."""
    run_directory = directory / "run"
    command = ["env", "OMP_NUM_THREADS=1", f"PYTHONPATH={ROOT}", sys.executable, "-m", "orchestrator.cli", "train"]
    command += overrides(comparison, model, run_directory)
    with CpuWatch() as watch:
        _run(command, directory / "millrace.log", MILLRACE)
    steps = read_steps(run_directory)
    check_tokens(MILLRACE, [int(step["tokens/trained"] + step["tokens/masked"]) for step in steps], comparison)
    timed = steps[comparison.warm_up :]
    began_at, ended_at = steps[comparison.warm_up - 1]["time"], timed[-1]["time"]
    rate = len(timed) / (ended_at - began_at)
    by_role = {r: s / len(timed) * 1000 for r, s in watch.between(began_at, ended_at).items()}
    return Measured(
        steps_per_s=rate,
        tokens_per_s=rate * statistics.fmean(step["tokens/trained"] for step in timed),
        cpu_ms_per_step=sum(by_role.values()),
        reward=statistics.fmean(
            step["reward/mean"] for step in steps[comparison.trl_steps * 4 // 5 : comparison.trl_steps]
        ),
        lag=statistics.fmean(step["lag/mean"] for step in timed),
        cpu_by_role=by_role,
    )


def overrides(comparison: Comparison, model: Path, run_directory: Path) -> list[str]:
    """The configuration of Millrace's side, over the defaults."""
    environment = "benchmarks.peers.trl_environment"
    length = comparison.tokens + 16
    settings: dict[str, Any] = {
        "mode": "async",
        "seed": comparison.seed,
        "model.path": model,
        "run.dir": run_directory,
        "run.overwrite": "true",
        "run.steps": comparison.millrace_steps,
        "run.eval_every": 0,
        "run.checkpoint_every": 0,
        "tasks.environment": f"{environment}:PromptEnvironment",
        "tasks.held_out": 0,
        "rollout.loop": f"{environment}:complete",
        "rollout.concurrency": comparison.in_flight,
        "rollout.groups_per_update": comparison.prompts,
        "rollout.group_size": comparison.completions,
        "rollout.max_tokens": comparison.tokens,
        "rollout.max_episode_tokens": length,
        "engines.slots": comparison.in_flight,
        "engines.max_len": length,
        "engines.stream_every": comparison.tokens,
        "engines.threads": 1,
        "rewards": "[]",
        "staleness.target_lag": comparison.target_lag,
        "staleness.max_lag": 8,
        "weights.kv": comparison.kv,
        "learner.lr": comparison.learning_rate,
        "learner.threads": 1,
    }
    return [f"{key}={value}" for key, value in settings.items()]


def read_steps(run_directory: Path) -> list[dict[str, Any]]:
    """The metrics of the training steps, in order."""
    lines = (run_directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [step for step in map(json.loads, lines) if "tokens/trained" in step]


def check_tokens(name: str, tokens: Sequence[int], comparison: Comparison) -> None:
    """Raises PeerError unless every step held exactly the tokens that were asked for."""
    wrong = sorted(set(tokens) - {comparison.step_tokens})
    if wrong or len(tokens) <= comparison.warm_up:
        raise PeerError(
            f"{name}: {len(tokens)} steps of {wrong or comparison.step_tokens} completion tokens; each of more than "
            f"{comparison.warm_up} should hold {comparison.step_tokens}"
        )


def _run(command: list[str], log: Path, name: str) -> None:
    try:
        status = run_group(command, log, TIME_OUT_S)
    except subprocess.TimeoutExpired as error:
        raise PeerError(f"{name} did not end within {TIME_OUT_S:.0f} s; its output is in {log}") from error
    if status != 0:
        tail = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-SHOWN_LOG_LINES:])
        raise PeerError(f"{name} ended with status {status}:\n{tail}")


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no message"])[-1]


def report(result: dict[str, Any], console: Console) -> None:
    """Print the tables."""
    content, settings = result["results"], result["settings"]
    table = Table("system", "steps/s", "range", "tokens/s", "CPU ms/step", "lag", "reward", box=None)
    for row in content["systems"]:
        low, high = row["steps_per_s_range"]
        table.add_row(
            row["system"],
            f"{row['steps_per_s']:.2f}",
            f"{low:.2f} to {high:.2f}",
            f"{row['tokens_per_s']:,.0f}",
            f"{row['cpu_ms_per_step']:.0f}",
            f"{row['lag']:.2f}",
            f"{row['reward']:.3f}",
        )
    console.print(table)
    ceiling = content["ceiling"]
    console.print(
        f"{content['ratio']:.2f} times {content['best_trl']} (by repeat: {content['ratio_by_repeat']}). "
        f"{settings['prompts']} prompts x {settings['completions']} completions x {settings['tokens']} tokens a step on both "
        f"sides, {settings['parameters']:,} parameters, {settings['repeats']} repeats in turn."
    )
    console.print(
        f"Ceiling, steps/s: engine alone {ceiling['engine_alone_steps_per_s']}, learner alone "
        f"{ceiling['learner_alone_steps_per_s']}, so {ceiling['pipeline_steps_per_s']} with a core for each and nothing else; "
        f"{ceiling['all_cores_busy_steps_per_s']} if all cores were busy all the time with what a step takes now."
    )
    ours = next(row for row in content["systems"] if row["system"] == MILLRACE)
    parts = ", ".join(f"{role} {ms:.1f}" for role, ms in ours["cpu_ms_by_role"].items() if ms >= 0.05)
    console.print(f"Millrace's CPU ms a step: {parts}")
    console.print(f"machine: {result['machine']}\nversions: {result['versions']}\nTRL: {settings['trl_versions']}")


def draw(result: dict[str, Any]) -> Any:
    """Bars of steps a second with the range over the repeats, and the ceiling as a line."""
    from matplotlib.figure import Figure

    rows, ceiling = result["results"]["systems"], result["results"]["ceiling"]
    figure = Figure(figsize=(6.5, 2.6))
    axes = figure.subplots()
    names = [row["system"] for row in rows]
    rates = [row["steps_per_s"] for row in rows]
    low = [row["steps_per_s"] - row["steps_per_s_range"][0] for row in rows]
    high = [row["steps_per_s_range"][1] - row["steps_per_s"] for row in rows]
    axes.barh(names, rates, xerr=(low, high), color=["#9aa5b1"] * (len(rows) - 1) + ["#2f6f9f"], capsize=3)
    axes.axvline(ceiling["pipeline_steps_per_s"], color="#b0413e", linestyle="--", linewidth=1)
    limit = (ceiling["pipeline_steps_per_s"], 0.5)
    axes.annotate("slower of engine and\nlearner, each alone ", limit, fontsize=7, ha="right")
    axes.set_xlabel(f"optimizer steps a second ({result['settings']['repeats']} repeats: median, range)")
    axes.invert_yaxis()
    return figure


@click.group()
def peer() -> None:
    """Against another system at the same work."""


@peer.command()
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the result to this file.")
@click.option("--figure", "figure_path", type=click.Path(path_type=Path), help="Save the figure (.svg or .png).")
@click.option("--python", type=click.Path(path_type=Path), default=PYTHON, help="Interpreter of TRL's environment.")
@click.option("--repeats", default=Comparison.repeats, show_default=True, help="Runs of each; the median counts.")
@click.option("--trl-steps", default=Comparison.trl_steps, show_default=True, help="Steps of a run of TRL.")
@click.option(
    "--millrace-steps", default=Comparison.millrace_steps, show_default=True, help="Steps of a run of Millrace."
)
@click.option(
    "--target-lag", default=Comparison.target_lag, show_default=True, help="Versions that dispatch runs ahead."
)
@click.option(
    "--kv",
    type=click.Choice(["keep", "recompute", "auto"]),
    default=Comparison.kv,
    show_default=True,
    help="What an update does with the KV of completions under way.",
)
@click.option("--seed", default=Comparison.seed, show_default=True)
def trl(json_path: Path | None, figure_path: Path | None, python: Path, **settings: Any) -> None:
    """Steps/s against TRL's GRPOTrainer: same model, prompts, completions and tokens."""
    try:
        with tempfile.TemporaryDirectory(prefix="millrace-peer-") as directory:
            result = run(Comparison(**settings), python, Path(directory))
    except PeerError as error:
        raise click.ClickException(str(error)) from error
    report(result, Console())
    if json_path is not None:
        write_json(json_path, result)
    if figure_path is not None:
        save_figure(figure_path, draw(result))
