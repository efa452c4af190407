"""``--engine torch``: the shop is trained for real, synchronously and asynchronously, with and without slow tools."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import mean, median
from typing import Any

from benchmarks.sync_vs_async.curves import Race, curve_of, median_ratio
from benchmarks.sync_vs_async.evidence import read_metrics
from benchmarks.sync_vs_async.learning_bound import SyncStep, against_the_bound, core_seconds
from benchmarks.sync_vs_async.processes import BenchError, FinishedRun, train
from benchmarks.sync_vs_async.slow_shop import DELAY_SCALE, SlowShopEnvironment
from orchestrator.bound import Calibration

SLOW_SHOP = f"{SlowShopEnvironment.__module__}:{SlowShopEnvironment.__name__}"
TUNING_STEPS = 12
TUNING_SKIP = 4
Say = Callable[[str], None]


@dataclass(frozen=True)
class LearningSettings:
    """What is trained. Everything but the mode, its threads and the steps of the asynchronous run is the same for all."""

    config: str = "quickstart"
    steps: int = 100
    held_out: int = 200
    """Tasks of the evaluations before and after training; none in between."""
    async_steps: float = 1.3
    """Steps of the asynchronous run over those of the synchronous one: what counts is when it is as good."""
    delay_scale: float | None = None
    """Seconds of suite `swe`'s tools in a second of the run; None: tools take no time."""
    overrides: tuple[str, ...] = ()
    timeout_s: float = 1800.0

    @property
    def case(self) -> str:
        return "no latency" if self.delay_scale is None else f"swe tools / {self.delay_scale:g}"


@dataclass(frozen=True)
class Threads:
    """Torch threads of engine and learner."""

    engine: int
    learner: int

    @property
    def overrides(self) -> list[str]:
        return [f"engines.threads={self.engine}", f"learner.threads={self.learner}"]


ASYNC_THREADS = Threads(1, 1)
SYNC_CHOICES = (Threads(1, 1), Threads(2, 2), Threads(1, 2))


@dataclass
class LearningResult:
    """All seeds of one case."""

    settings: LearningSettings
    sync_threads: Threads
    tuning: dict[str, float]
    """Seconds a step of the synchronous mode by its threads (engine, learner)."""
    races: list[Race] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return {
            "case": self.settings.case,
            "steps": self.settings.steps,
            "sync_threads": [self.sync_threads.engine, self.sync_threads.learner],
            "sync_step_s_by_threads": self.tuning,
            "ratio_median": median_ratio(self.races),
            "races": [race.to_dict() for race in self.races],
            "rows": self.rows,
        }


def race_all(settings: LearningSettings, seeds: list[int], directory: Path, say: Say) -> LearningResult:
    """Tune the synchronous mode, then run both modes for each seed, one run after the other. Raises BenchError."""
    case = directory / settings.case.replace(" ", "-").replace("/", "by")
    threads, tuning, calibration = tune_sync(settings, seeds[0], case, say)
    result = LearningResult(settings, threads, tuning)
    for seed in seeds:
        say(f"{settings.case}, seed {seed}: sync")
        sync = _train(settings, "sync", seed, settings.steps, threads, case / f"sync-{seed}", None)
        say(f"{settings.case}, seed {seed}: async")
        more = max(settings.steps, round(settings.steps * settings.async_steps))
        model = sync.directory / "model"
        asynchronous = _train(settings, "async", seed, more, ASYNC_THREADS, case / f"async-{seed}", model)
        result.races.append(_race(seed, sync, asynchronous))
        rows = [learning_row("sync", seed, sync), learning_row("async", seed, asynchronous)]
        steps = _step_lines(sync)[TUNING_SKIP:]
        bound = SyncStep.of(calibration, steps, rows[0]["step_s"])
        batch = mean(step["episodes/rewarded"] for step in steps)
        result.rows += [{**row, **against_the_bound(row, bound, batch)} for row in rows]
    return result


def tune_sync(
    settings: LearningSettings, seed: int, directory: Path, say: Say
) -> tuple[Threads, dict[str, float], Calibration]:
    """The threads with which the synchronous mode is fastest, the step time (seconds) of every choice, and w and tau.

    w and tau are those of the run with one thread a role: core-seconds in which the other role does nothing.
    """
    calibration: Calibration | None = None
    times: dict[Threads, float] = {}
    model: Path | None = None
    for threads in SYNC_CHOICES:
        say(f"{settings.case}: sync with {threads.engine} and {threads.learner} threads, {TUNING_STEPS} steps")
        target = directory / f"tune-{threads.engine}-{threads.learner}"
        quiet = ["tasks.held_out=0"]
        run = _train(settings, "sync", seed, TUNING_STEPS, threads, target, model, quiet)
        model = model or run.directory / "model"
        times[threads] = _step_s(run)
        if calibration is None:
            calibration = core_seconds(run.summary, _step_lines(run), os.cpu_count() or 1)
    assert calibration is not None, "there is at least one choice"
    best = min(times, key=lambda threads: times[threads])
    return best, {f"{threads.engine},{threads.learner}": seconds for threads, seconds in times.items()}, calibration


def _train(
    settings: LearningSettings,
    mode: str,
    seed: int,
    steps: int,
    threads: Threads,
    directory: Path,
    model: Path | None,
    more: list[str] | None = None,
) -> FinishedRun:
    overrides = [f"mode={mode}", f"seed={seed}", f"run.steps={steps}", "run.eval_every=0"]
    overrides += ["run.checkpoint_every=0", f"tasks.held_out={settings.held_out}", *threads.overrides]
    if settings.delay_scale is not None:
        overrides += [f"tasks.environment={SLOW_SHOP}", f"tasks.options.{DELAY_SCALE}={settings.delay_scale}"]
    if model is not None:
        overrides.append(f"model.path={model.resolve()}")
    overrides += [*(more or []), *settings.overrides]
    return train(settings.config, overrides, directory, settings.timeout_s)


def _race(seed: int, sync: FinishedRun, asynchronous: FinishedRun) -> Race:
    try:
        return Race(
            seed,
            curve_of(list(read_metrics(sync.directory)), evaluation_pauses=True),
            curve_of(list(read_metrics(asynchronous.directory)), evaluation_pauses=False),
        )
    except ValueError as error:
        raise BenchError(f"seed {seed}: {error}") from error


def _step_lines(run: FinishedRun) -> list[dict[str, Any]]:
    lines = [line for line in read_metrics(run.directory) if "time/step_s" in line]
    if len(lines) <= TUNING_SKIP + 1:
        raise BenchError(
            f"{run.directory}: {len(lines)} steps are too few to measure; more than {TUNING_SKIP + 1} are needed"
        )
    return lines


def _step_s(run: FinishedRun) -> float:
    """Median seconds from step to step after the first few (a median: an evaluation pauses a synchronous run)."""
    lines = _step_lines(run)[TUNING_SKIP:]
    return float(median(later["time"] - earlier["time"] for earlier, later in pairwise(lines)))


def learning_row(mode: str, seed: int, run: FinishedRun) -> dict[str, Any]:
    """What one run was like. Shares of the learner's time come from its own counters."""
    lines = _step_lines(run)
    summary, last = run.summary, lines[-1]
    cpu, machine = run.cpu_share(lines[TUNING_SKIP]["time"], last["time"])
    tokens = summary["tokens"]
    generated = tokens["generated"] or 1
    return {
        "mode": mode,
        "seed": seed,
        "steps": summary["steps"],
        "step_s": _step_s(run),
        "success": summary["success_after"],
        "lag_mean": summary["lag_mean"],
        "lag_p50": _mean_of(lines, "lag/p50"),
        "lag_p99": _mean_of(lines, "lag/p99"),
        "lag_max": summary["lag_max"],
        "masked": tokens["masked"] / generated,
        "waste": tokens["wasted"] / generated,
        "ks": summary.get("lengths_ks") or 0.0,
        "prefix_hit": summary.get("prefix_hit") or 0.0,
        "learner_wait_share": mean(line["time/wait_s"] / line["time/step_s"] for line in lines[TUNING_SKIP:]),
        "idle": dict(summary.get("idle", {})),
        "cpu_share": cpu,
        "machine_cpu_share": machine,
    }


def _mean_of(lines: list[dict[str, Any]], key: str) -> float:
    """The mean over the steps that have the figure; 0 when none has."""
    values = [float(line[key]) for line in lines[TUNING_SKIP:] if line.get(key) is not None]
    return mean(values) if values else 0.0
