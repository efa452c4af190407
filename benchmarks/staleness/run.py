"""One run with behaviour weights that are exactly so many updates old, in one process and without a clock.

The groups of step i are generated with the weights of version ``max(0, i - lag)``: whenever a version is there, the groups
of the step ``lag`` later are generated with it. The learner is the one of every run.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.staleness.episodes import LocalEngine, Rollouts
from env_pool.registry import TaskSource
from experience.records import GroupHeader
from experience.wire import decode_group
from learner.learner import Learner
from orchestrator.config import Config, load
from orchestrator.dispatcher import seed_of

EVALUATION = "held_out"


@dataclass(frozen=True)
class Trial:
    """What one run is."""

    correction: str
    lag: int
    seed: int
    steps: int = 300
    eval_every: int = 50
    held_out: int = 400

    @property
    def key(self) -> str:
        return f"{self.correction}/lag{self.lag}/seed{self.seed}"


@dataclass
class Outcome:
    """What came of it. ``curve``: step and held-out success; all rates are fractions."""

    trial: Trial
    curve: list[tuple[int, float]] = field(default_factory=list)
    mismatch_max: float = 0.0
    """Largest mean of ``log mu - log pi`` of a step, nats a token."""
    ess_min: float = 1.0
    """Smallest effective sample size of a step's importance weights, as a share."""
    lag_measured: float = 0.0
    """Mean lag of trained tokens, from the step on at which the lag can be full."""
    skipped: int = 0
    seconds: float = 0.0

    @property
    def final(self) -> float:
        return self.curve[-1][1]

    @property
    def area(self) -> float:
        """Mean height of the curve (trapezoids), from step 0 to the last."""
        return area_under(self.curve)

    def row(self) -> dict[str, Any]:
        """The line of a results file."""
        trial = self.trial
        return {
            **{name: getattr(trial, name) for name in ("correction", "lag", "seed", "steps", "eval_every", "held_out")},
            "final": self.final,
            "area": self.area,
            "curve": self.curve,
            "mismatch_max": self.mismatch_max,
            "ess_min": self.ess_min,
            "lag_measured": self.lag_measured,
            "skipped": self.skipped,
            "seconds": round(self.seconds, 1),
        }


def area_under(curve: list[tuple[int, float]]) -> float:
    """Mean height of a curve by trapezoids; a single point is its own height.

    >>> area_under([(0, 0.0), (10, 1.0), (20, 1.0)])
    0.75
    """
    if len(curve) == 1:
        return curve[0][1]
    total = sum((b[0] - a[0]) * (a[1] + b[1]) / 2 for a, b in pairwise(curve))
    return total / (curve[-1][0] - curve[0][0])


def configuration(name: str, seed: int, settings: Mapping[str, Any]) -> Config:
    """The run's configuration with the correction's settings on top. Raises ConfigError."""
    overrides = [f"{key}={'null' if value is None else value}" for key, value in settings.items()]
    return load([name], [f"seed={seed}", *overrides])


def run_trial(trial: Trial, model: Path, config: Config) -> Outcome:
    """Train and evaluate; the same trial gives the same outcome."""
    began_at = time.monotonic()
    rollout = config.rollout
    slots = max(config.engines.slots, rollout.groups_per_update * rollout.group_size)
    engine = LocalEngine(model, replace(config.engines, slots=slots, stream_every=max(16, rollout.max_tokens)))
    rollouts = Rollouts(model, rollout, engine)
    learner = Learner(
        config.learner, config.model, max_lag=trial.lag, threads=1, deterministic=True, seed=trial.seed, initial=model
    )
    learner.load(model)
    tasks = TaskSource.from_config(config.tasks, "train", trial.seed)
    held_out = TaskSource.from_config(config.tasks, "held_out", trial.seed)
    outcome = Outcome(trial)
    waiting: deque[list[bytes]] = deque()
    generated = 0

    def generate_until(step: int) -> None:
        nonlocal generated
        while generated <= min(step, trial.steps - 1):
            first = generated * rollout.groups_per_update
            headers = [
                _header(tasks, index, rollout.group_size, learner.version, trial.seed)
                for index in range(first, first + rollout.groups_per_update)
            ]
            waiting.append(rollouts.groups(headers))
            generated += 1

    def evaluate() -> None:
        headers = [
            _header(held_out, index, 1, learner.version, trial.seed, EVALUATION) for index in range(trial.held_out)
        ]
        made = [decode_group(data) for data in rollouts.groups(headers)]
        rewards = [group.trajectories[0].reward or 0.0 for group in made]
        outcome.curve.append((learner.version, sum(reward >= 1.0 for reward in rewards) / len(rewards)))

    evaluate()
    generate_until(trial.lag)
    lags = []
    while learner.version < trial.steps:
        learner.begin_step()
        learner.add(waiting.popleft())
        metrics = learner.finish_step()
        engine.serve(learner.version, learner.named_tensors())
        if learner.version > trial.lag and "lag/mean" in metrics:
            lags.append(metrics["lag/mean"])
        outcome.mismatch_max = max(outcome.mismatch_max, metrics.get("kl/mismatch", 0.0))
        outcome.ess_min = min(outcome.ess_min, metrics.get("staleness/ess", 1.0))
        outcome.skipped = int(metrics["steps/skipped"])
        if learner.version % trial.eval_every == 0 or learner.version == trial.steps:
            evaluate()
        generate_until(learner.version + trial.lag)
    rollouts.close()
    outcome.lag_measured = sum(lags) / len(lags) if lags else 0.0
    outcome.seconds = time.monotonic() - began_at
    return outcome


def _header(tasks: TaskSource, index: int, size: int, version: int, seed: int, purpose: str = "train") -> GroupHeader:
    return GroupHeader(
        group_id=f"{purpose}-{version}-{index:06d}",
        index=index,
        task=tasks.task(index),
        size=size,
        version_floor=version,
        seed=seed_of(seed, f"{purpose}{version if purpose == EVALUATION else ''}", index),
    )
