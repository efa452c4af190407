from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from learner_fixtures import make_group, make_groups, with_prompts

from experience.records import Group
from learner.backends.fsdp import FsdpBackend
from learner.backends.ranks import OneRank
from learner.config import LearnerConfig
from learner.objectives.advantages import normalised_over_step
from learner.objectives.config import ObjectiveConfig
from learner.streaming import StepResult, StepSettings, StreamingStep

SETTINGS = StepSettings(objective=ObjectiveConfig(), max_lag=4)
OBJECTIVE_FIELDS = {field.name for field in fields(ObjectiveConfig)}


class RecordingBackend(FsdpBackend):
    """Keeps the normalised gradient of its last step."""

    gradient: dict[str, torch.Tensor]

    def step(self, normaliser: float) -> float | None:
        self.gradient = {
            name: p.grad.double() / normaliser for name, p in self._parameters.items() if p.grad is not None
        }
        return super().step(normaliser)


def run_step(
    directory: Path, arrivals: list[list[Group]], flush: bool = False, version: int = 0, **settings: Any
) -> tuple[StepResult, RecordingBackend]:
    sharing = settings.pop("prefix_sharing", "auto")
    backend = RecordingBackend(directory, LearnerConfig(device="cpu", warm_up_steps=0, prefix_sharing=sharing))
    objective = ObjectiveConfig(**{key: settings.pop(key) for key in OBJECTIVE_FIELDS & settings.keys()})
    step = StreamingStep(OneRank(backend), replace(SETTINGS, objective=objective, **settings), version)
    for groups in arrivals:
        step.add(groups)
        if flush:
            step.flush()
    return step.finish(), backend


def assert_same_gradient(ours: RecordingBackend, theirs: RecordingBackend, tolerance: float = 1e-6) -> None:
    assert ours.gradient.keys() == theirs.gradient.keys()
    for name, gradient in ours.gradient.items():
        torch.testing.assert_close(gradient, theirs.gradient[name], rtol=1e-5, atol=tolerance, msg=name)


@pytest.mark.parametrize("aggregation", ["token", "sequence"])
def test_streaming_changes_no_result(model_directory: Path, aggregation: str) -> None:
    groups = make_groups(6)
    whole, reference = run_step(model_directory, [groups], aggregation=aggregation)
    shuffled = [[groups[i]] for i in (3, 0, 5, 1, 4, 2)]
    for pass_tokens, flush in ((100_000, True), (150, False), (60, False), (1, False)):
        result, backend = run_step(model_directory, shuffled, flush, aggregation=aggregation, pass_tokens=pass_tokens)
        assert_same_gradient(backend, reference)
        assert result.metrics["passes"] > whole.metrics["passes"]
        for name in whole.metrics.keys() - {
            "passes",
            "packing/padding",
            "packing/imbalance",
            "packing/prefix_saved",
        }:  # how it was done
            assert result.metrics[name] == pytest.approx(whole.metrics[name], rel=1e-5, abs=1e-6), name


def test_passes_run_before_the_step_is_complete(model_directory: Path) -> None:
    backend = RecordingBackend(model_directory, LearnerConfig(device="cpu"))
    step = StreamingStep(OneRank(backend), replace(SETTINGS, pass_tokens=100), 0)
    groups = make_groups(6)
    step.add(groups[:3])
    assert step._passes > 0
    assert any(p.grad is not None for p in backend._parameters.values())


def test_deterministic_steps_do_not_depend_on_arrival_bit_for_bit(model_directory: Path) -> None:
    groups = make_groups(6)
    orders = [[groups], [[g] for g in reversed(groups)], [groups[3:], groups[:3]]]
    results = [
        run_step(model_directory, arrivals, deterministic=True, pass_tokens=100, flush=True) for arrivals in orders
    ]
    (first, reference), *others = results
    for result, backend in others:
        assert result.metrics == first.metrics
        for (name, ours), (_, theirs) in zip(backend.named_tensors(), reference.named_tensors(), strict=True):
            assert torch.equal(ours, theirs), name


def test_groups_without_signal_run_no_pass_and_do_not_count(model_directory: Path) -> None:
    rng = np.random.default_rng(5)
    useful, useless = make_group(0, [1.0, 0.0], rng), make_group(1, [1.0, 1.0, 1.0], rng)
    with_both, backend = run_step(model_directory, [[useful, useless]])
    alone, reference = run_step(model_directory, [[useful]])
    assert_same_gradient(backend, reference, tolerance=0)
    assert with_both.metrics["groups/no_signal"] == 1
    assert with_both.metrics["tokens/with_signal"] == alone.metrics["tokens/trained"]
    assert with_both.metrics["tokens/trained"] == useful.sampled_tokens + useless.sampled_tokens
    kept, diluted = run_step(model_directory, [[useful, useless]], skip_no_signal=False)
    scale = useful.sampled_tokens / (useful.sampled_tokens + useless.sampled_tokens)
    for name, gradient in diluted.gradient.items():
        torch.testing.assert_close(gradient, reference.gradient[name] * scale, rtol=1e-4, atol=1e-7)
    assert kept.metrics["entropy"] != with_both.metrics["entropy"]


def test_a_step_without_any_signal_leaves_the_weights(model_directory: Path) -> None:
    group = make_group(0, [0.0, 0.0], np.random.default_rng(0))
    result, backend = run_step(model_directory, [[group]])
    assert result.applied
    assert backend.updates == 0
    assert result.metrics["success"] == 0.0
    assert result.metrics["loss"] == 0.0


def test_old_tokens_are_masked_and_counted(model_directory: Path) -> None:
    groups = make_groups(3, version=2)
    old = make_group(9, [1.0, 0.0], np.random.default_rng(1), version=1)
    result, _ = run_step(model_directory, [[*groups, old]], version=6)
    metrics = result.metrics
    assert metrics["lag/max"] == metrics["lag/mean"] == 4
    assert metrics["tokens/masked"] == old.sampled_tokens
    assert metrics["tokens/trained"] == sum(group.sampled_tokens for group in groups)


def test_rewards_success_and_version_spans_are_reported(model_directory: Path) -> None:
    rng = np.random.default_rng(2)
    group = make_group(0, [1.0, 0.5, None], rng)
    sampled = np.flatnonzero(group.trajectories[0].trainable)
    group.trajectories[0].versions[sampled[-1]] = 1
    metrics = run_step(model_directory, [[group]], version=1)[0].metrics
    assert metrics["reward/mean"] == 0.75
    assert metrics["reward/std"] == 0.25
    assert metrics["success"] == 0.5
    assert metrics["episodes/unrewarded"] == 1
    assert metrics["trajectory_spans"] == pytest.approx(4 / 3)


def test_a_bad_trajectory_skips_the_step(model_directory: Path) -> None:
    groups = make_groups(3)
    groups[0].trajectories[0].logprobs[:] = np.nan
    result, backend = run_step(model_directory, [groups])
    assert not result.applied
    assert result.bad_samples == ["g0/g0-0 tokens 3 to 23"]
    assert backend.updates == 0
    assert result.metrics["tokens/trained"] == 0
    assert result.metrics["tokens/masked"] == sum(group.sampled_tokens for group in groups)


@pytest.mark.parametrize(
    "objective", [{"advantage": "reinforce_pp"}, {"second_moment_limit": 0.5, "correction": "none"}]
)
def test_what_depends_on_the_whole_step_waits_for_it(model_directory: Path, objective: dict[str, Any]) -> None:
    groups = make_groups(6)
    whole, reference = run_step(model_directory, [groups], **objective)
    parts, backend = run_step(
        model_directory, [[groups[i]] for i in (3, 0, 5, 1, 4, 2)], True, pass_tokens=100, **objective
    )
    assert parts.metrics["passes"] > whole.metrics["passes"]
    assert_same_gradient(backend, reference)


def test_the_second_moment_mask_takes_tokens_out(model_directory: Path) -> None:
    groups = make_groups(6)
    loose, _ = run_step(model_directory, [groups], second_moment_limit=1e6, correction="none")
    tight, _ = run_step(model_directory, [groups], second_moment_limit=0.5, correction="none")
    assert loose.metrics["ratio/clip_fraction"] == 0.0
    assert 0.1 < tight.metrics["ratio/clip_fraction"] < 0.9


def test_advantages_over_the_step_have_mean_zero_and_deviation_one_over_its_tokens() -> None:
    advantages, counts = np.array([1.0, 0.0, 0.5]), np.array([10, 30, 20])
    normalised = normalised_over_step(advantages, counts)
    tokens = np.repeat(normalised, counts)
    assert tokens.mean() == pytest.approx(0.0, abs=1e-12)
    assert tokens.std() == pytest.approx(1.0, rel=1e-4)
    assert not normalised_over_step(np.array([0.3, 0.3]), np.array([1, 2])).any()


def test_a_constant_length_divides_by_trajectories_and_that_length(model_directory: Path) -> None:
    groups = make_groups(4)
    _, token = run_step(model_directory, [groups], aggregation="token")
    _, constant = run_step(model_directory, [groups], aggregation="constant", constant_length=50)
    trained = [t for g in groups if len({t.reward for t in g.trajectories}) > 1 for t in g.trajectories]
    scale = sum(t.sampled_tokens for t in trained) / (50 * len(trained))
    for name, gradient in constant.gradient.items():
        torch.testing.assert_close(gradient, token.gradient[name] * scale, rtol=1e-4, atol=1e-7, msg=name)


def test_a_gradient_that_is_not_finite_is_traced_to_its_trajectory(model_directory: Path) -> None:
    """The loss is finite, the gradient overflows."""
    groups = make_groups(3)
    culprit = groups[1].trajectories[2]
    culprit.logprobs[np.flatnonzero(culprit.trainable)[1]] = -88.0
    settings = {"correction": "none", "surrogate": "plain", "pass_tokens": 100}
    result, backend = run_step(model_directory, [groups], **settings)
    assert not result.applied
    assert [found.split(" tokens ")[0] for found in result.bad_samples] == ["g1/g1-2"]
    assert backend.updates == 0
    assert all(parameter.grad is None for parameter in backend._parameters.values())


@pytest.mark.parametrize("objective", [{}, {"second_moment_limit": 0.5, "correction": "none"}])
def test_shared_prefixes_change_no_result(model_directory: Path, objective: dict[str, Any]) -> None:
    groups = with_prompts(make_groups(6))
    plain, reference = run_step(model_directory, [groups], prefix_sharing="off", **objective)
    assert plain.metrics["packing/prefix_saved"] == 0.0
    arrivals = [[groups[i]] for i in (3, 0, 5, 1, 4, 2)]
    for sharing, pass_tokens in (("on", 100_000), ("on", 150), ("auto", 300)):
        result, backend = run_step(
            model_directory, arrivals, True, prefix_sharing=sharing, pass_tokens=pass_tokens, **objective
        )
        assert_same_gradient(backend, reference)
        assert 0.3 < result.metrics["packing/prefix_saved"] < 0.75
        for name in plain.metrics.keys() - {"passes", "packing/padding", "packing/imbalance", "packing/prefix_saved"}:
            assert result.metrics[name] == pytest.approx(plain.metrics[name], rel=1e-5, abs=1e-6), name
