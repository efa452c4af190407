"""Reward branches: the bundled rule, and the user's own functions and classes.

A branch is a function ``(sample) -> value`` or an object with a method ``score`` of that form, sync or async. The value
is a finite number, or a :class:`~env_pool.environment.VerifierResult` where it has named parts.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from inspect import isawaitable, iscoroutinefunction
from numbers import Real
from typing import Any

from env_pool.config import RewardConfig
from env_pool.environment import VerifierResult
from env_pool.registry import load_environment, load_object
from env_pool.rewards.length import Overlong
from env_pool.rewards.records import RewardSample
from env_pool.runner import HungError, Runner, within

Score = Callable[[RewardSample], Any]


class BranchFailed(Exception):
    """A branch gave no value, also when tried again. There is no reward then."""


@dataclass(frozen=True)
class RetryOnFailure:
    """Try again after a failure, at once, up to ``max_retries`` times."""

    max_retries: int = 2

    def again(self, attempt: int) -> bool:
        """Whether to go on after attempt number ``attempt`` (from 0) failed."""
        return attempt < self.max_retries


@dataclass(frozen=True)
class Branch:
    """A branch ready to run."""

    label: str
    weight: float
    timeout_s: float
    retry: RetryOnFailure
    score: Score

    async def evaluate(self, sample: RewardSample, runner: Runner) -> VerifierResult:
        """The branch's judgement. Raises :class:`BranchFailed`, naming the branch, after the last attempt."""
        attempt = 0
        while True:
            try:
                return as_result(await self._attempt(sample, runner))
            except Exception as error:  # user code: anything may come out of it
                if not self.retry.again(attempt):
                    reason = str(error) if isinstance(error, HungError) else f"{type(error).__name__}: {error}"
                    raise BranchFailed(f"reward branch {self.label!r}, attempt {attempt + 1}: {reason}") from error
            attempt += 1

    async def _attempt(self, sample: RewardSample, runner: Runner) -> Any:
        if iscoroutinefunction(self.score):
            return await within(self.score(sample), self.timeout_s)
        value = await runner.submit(partial(self.score, sample), self.timeout_s)
        return await within(value, self.timeout_s) if isawaitable(value) else value


def rule(sample: RewardSample) -> VerifierResult:
    """The environment's own verifier on the evidence it left."""
    return load_environment(sample.task.environment).verify(sample.task, sample.outcome)


def load_branch(config: RewardConfig) -> Branch:
    """Build a branch. Raises ValueError when ``kind`` names nothing, or something that cannot score."""
    config.validate()
    bundled: dict[str, Any] = {"rule": rule, "overlong": Overlong}
    found = bundled.get(config.kind) or load_object(config.kind, "rewards: kind")
    retry = RetryOnFailure(config.retries)
    return Branch(config.label, config.weight, config.timeout_s, retry, _as_score(found, config))


def load_branches(configs: Sequence[RewardConfig]) -> list[Branch]:
    """Build all branches. Raises ValueError also when there is none, or two share a label."""
    if not configs:
        raise ValueError("rewards: at least one branch is needed, e.g. [{kind: rule}]")
    branches = [load_branch(config) for config in configs]
    labels = [branch.label for branch in branches]
    for label in labels:
        if labels.count(label) > 1:
            raise ValueError(f"rewards: two branches are called {label!r}; give each its own name")
    return branches


def combine(branches: Sequence[Branch], results: Sequence[VerifierResult]) -> tuple[float, dict[str, float]]:
    """The reward, sum of weight x value, and the parts by label."""
    total, parts = 0.0, {}
    for branch, result in zip(branches, results, strict=True):
        total += branch.weight * result.reward
        parts[branch.label] = result.reward
        parts.update({f"{branch.label}/{name}": value for name, value in result.parts.items()})
    return total, parts


def as_result(value: Any) -> VerifierResult:
    """A branch's value in its full form. Raises TypeError or ValueError when it is not a finite number."""
    if isinstance(value, Real):
        value = VerifierResult(reward=float(value))
    if not isinstance(value, VerifierResult):
        raise TypeError(f"a branch must return a number or a VerifierResult, got {type(value).__name__}")
    if not math.isfinite(value.reward):
        raise ValueError(f"the reward is {value.reward}, it must be finite")
    return value


def _as_score(found: Any, config: RewardConfig) -> Score:
    if isinstance(found, type):
        try:
            instance = found(**config.args)
        except TypeError as error:
            raise ValueError(f"rewards: {config.kind} does not take args {dict(config.args)}: {error}") from error
        if not callable(getattr(instance, "score", None)):
            raise ValueError(f"rewards: class {config.kind} has no method score(sample)")
        score: Callable[[RewardSample], float | VerifierResult | Awaitable[Any]] = instance.score
        return score
    if not callable(found):
        raise ValueError(f"rewards: {config.kind} is neither a function nor a class")
    return partial(found, **config.args) if config.args else found
