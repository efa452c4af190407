"""Which corrections are compared, and the runs of a study: as many processes as asked for, each result kept at once."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from benchmarks.staleness.run import Trial

_PLAIN: dict[str, Any] = {"learner.surrogate": "plain"}
_CLIP: dict[str, Any] = {"learner.surrogate": "clip", "learner.clip_low": 0.2, "learner.clip_high": 0.28}

CORRECTIONS: dict[str, dict[str, Any]] = {
    "none": {**_PLAIN, "learner.correction": "unweighted"},
    "tis": {**_PLAIN, "learner.correction": "tis"},
    "masked_is": {**_PLAIN, "learner.correction": "masked_is", "learner.correction_level": "sequence"},
    "double_sided": {**_PLAIN, "learner.correction": "double_sided"},
    "clip": {**_CLIP, "learner.correction": "none"},
    "decoupled": {**_CLIP, "learner.correction": "decoupled"},
    "decoupled_m2": {**_CLIP, "learner.correction": "decoupled", "learner.second_moment_limit": 0.04},
    "cispo": {"learner.surrogate": "clipped_weight", "learner.clip_high": 4.0, "learner.correction": "none"},
    "m2po": {**_PLAIN, "learner.correction": "none", "learner.second_moment_limit": 0.04},
}
"""Settings by name. ``none`` takes stale tokens as if the current policy had sampled them."""


class StudyError(Exception):
    """A study that cannot go on; the message says why."""


@dataclass(frozen=True)
class Cell:
    """One correction at one lag over all its seeds."""

    correction: str
    lag: int
    seeds: int
    final: float
    final_error: float
    """Standard error of ``final`` over the seeds; 0 for one seed."""
    area: float
    gap: float | None
    """How much ``final`` is below that of lag 0, seeds paired (the same correction's, or else any's); None without one."""
    gap_error: float
    """Standard error of ``gap`` over the seeds; 0 for fewer than two."""
    mismatch_max: float


def trials(
    corrections: Sequence[str], lags: Sequence[int], seeds: Iterable[int], steps: int, eval_every: int, held_out: int
) -> list[Trial]:
    """All runs, seed by seed, so that what is finished first is already a whole table.

    On-policy every weight is 1 and no correction does anything: at lag 0 the first one stands for all.
    """
    return [
        Trial(correction, lag, seed, steps, eval_every, held_out)
        for seed in seeds
        for lag in lags
        for correction in (corrections if lag else corrections[:1])
    ]


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The finished runs of a results file; a torn last line is not one. Raises StudyError for damage before it."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            if number == len(lines):
                break
            raise StudyError(f"{path}:{number} is not valid JSON ({error}): remove that line, or start anew") from error
    return rows


def done(rows: Iterable[Mapping[str, Any]], trial: Trial) -> bool:
    """Whether this very trial is among the finished ones."""
    names = ("correction", "lag", "seed", "steps", "eval_every", "held_out")
    return any(all(row.get(name) == getattr(trial, name) for name in names) for row in rows)


def run_study(
    waiting: Sequence[Trial],
    config: str,
    directory: Path,
    processes: int,
    keep: Callable[[dict[str, Any]], None],
) -> None:
    """Run every trial; ``keep`` gets each result as it comes. Raises StudyError naming the trial that failed."""
    with worker_pool(processes) as pool:
        seeds = sorted({trial.seed for trial in waiting})
        models = dict(zip(seeds, pool.map(prepare_model, [(config, seed, directory) for seed in seeds]), strict=True))
        running: dict[Future[dict[str, Any]], Trial] = {
            pool.submit(run_one, trial, models[trial.seed], config): trial for trial in waiting
        }
        for future in as_completed(running):
            try:
                keep(future.result())
            except Exception as error:
                raise StudyError(f"{running[future].key}: {type(error).__name__}: {error}") from error


ENDED_S = 10.0
"""How long a killed worker may take to be gone."""


@contextmanager
def worker_pool(processes: int) -> Iterator[ProcessPoolExecutor]:
    """Processes of their own for trials. Left by an error or a signal, it ends them at once, not after their trials."""
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            yield pool
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            workers = multiprocessing.active_children()
            for worker in workers:
                worker.kill()
            for worker in workers:
                worker.join(ENDED_S)
            raise


def prepare_model(job: tuple[str, int, Path]) -> Path:
    """The recipe's model of a seed, made unless it is there."""
    config_name, seed, directory = job
    from benchmarks.staleness.run import configuration
    from orchestrator.recipes import make_model, recipe_key

    config = configuration(config_name, seed, {})
    if config.model.path is not None:
        return Path(config.model.path)
    recipe = config.model.recipe or ""
    model = directory / recipe_key(recipe, seed)
    if not (model / "made").exists():
        make_model(recipe, model, seed)
        (model / "made").touch()
    return model


def run_one(trial: Trial, model: Path, config_name: str) -> dict[str, Any]:
    """One trial in this process, with one thread."""
    import torch

    from benchmarks.staleness.run import configuration, run_trial

    torch.set_num_threads(1)
    return run_trial(trial, model, configuration(config_name, trial.seed, CORRECTIONS[trial.correction])).row()


def cells(rows: Sequence[Mapping[str, Any]]) -> list[Cell]:
    """Means over the seeds, by correction and lag, whatever the order in which the runs ended."""
    fresh: dict[int, list[float]] = {}
    for row in rows:
        if row["lag"] == 0:
            fresh.setdefault(row["seed"], []).append(row["final"])
    found = []
    for correction, lag in sorted({(row["correction"], row["lag"]) for row in rows}):
        chosen = [row for row in rows if (row["correction"], row["lag"]) == (correction, lag)]
        finals = [row["final"] for row in chosen]
        gaps = [mean(fresh[row["seed"]]) - row["final"] for row in chosen if row["seed"] in fresh]
        mismatch = max(row["mismatch_max"] for row in chosen)
        area = mean(row["area"] for row in chosen)
        gap = mean(gaps) if gaps else None
        found.append(
            Cell(
                correction,
                lag,
                len(chosen),
                mean(finals),
                standard_error(finals),
                area,
                gap,
                standard_error(gaps),
                mismatch,
            )
        )
    return found


def standard_error(values: Sequence[float]) -> float:
    """Of the mean; 0 for fewer than two values."""
    return stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
