"""Optimizer state, frozen models, half precision, and what happens when a rank breaks."""

from __future__ import annotations

import os
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from learner_fixtures import make_groups, make_learner, train_step
from megatron_fixtures import Ranks, make_model_of

from learner.errors import CheckpointError, LearnerError, ModelError
from learner.learner import Learner


def steps(learner: Learner, first: int, last: int) -> None:
    for step in range(first, last):
        train_step(learner, make_groups(4, seed=step, version=step))


@pytest.mark.parametrize(
    ("architecture", "division"),
    [
        ("qwen2", {"tensor_parallel": 2}),
        ("qwen2", {"pipeline_parallel": 2}),
        ("qwen3_moe", {"expert_parallel": 2, "distributed_optimizer": True}),
    ],
)
def test_checkpoints_move_from_and_to_the_plain_backend(
    two: Ranks, models: dict[str, Path], tmp_path: Path, architecture: str, division: dict[str, Any]
) -> None:
    """plain, then Megatron-Core, then plain again: the next step's gradient is that of the run that never moved."""
    path = models[architecture]
    stayed = make_learner(path, lr=1e-3)
    steps(stayed, 0, 2)
    moved = two.learner(path, lr=1e-3, **division)
    moved.restore(stayed.save(tmp_path / "first"))
    for learner in (stayed, moved):
        steps(learner, 2, 4)
    back = make_learner(path, lr=1e-3)
    back.restore(moved.save(tmp_path / "second"))
    groups = make_groups(4, seed=9, version=4)
    expected = train_step(stayed, groups)
    for learner in (moved, back):
        found = train_step(learner, groups)
        assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)
        assert found["updates"] == 5
    for name, tensor in stayed.named_tensors():
        torch.testing.assert_close(dict(back.named_tensors())[name], tensor, rtol=1e-3, atol=1e-4, msg=name)


def test_the_state_of_another_model_is_refused(two: Ranks, models: dict[str, Path]) -> None:
    two.learner(models["qwen2"], tensor_parallel=2)
    with pytest.raises(CheckpointError, match="the optimizer state is not this model's"):
        two.do(lambda backend: backend.load_optimizer_state({"exp_avg/strange": torch.zeros(1)}, 1))


@pytest.mark.parametrize("division", [{"tensor_parallel": 2}, {"pipeline_parallel": 2}])
def test_reference_teacher_entropy_and_mask_are_those_of_the_plain_backend(
    two: Ranks, models: dict[str, Path], tmp_path: Path, division: dict[str, int]
) -> None:
    """The reference moves after the second update; it travels with a checkpoint."""
    teacher = make_model_of("qwen2", tmp_path / "teacher", seed=5)
    settings: dict[str, Any] = {
        "lr": 1e-3,
        "kl_coef": 0.1,
        "reference_reset_every": 2,
        "teacher": str(teacher),
        "distill_coef": 0.5,
        "entropy_coef": 0.01,
        "second_moment_limit": 0.5,
    }
    alone = make_learner(models["qwen2"], **settings)
    ranked = two.learner(models["qwen2"], **division, **settings)
    for step in range(4):
        groups = make_groups(4, seed=step, version=step)
        expected, found = train_step(alone, groups), train_step(ranked, groups)
        for name in ("loss", "grad_norm", "ratio/clip_fraction"):
            assert found[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-6), (step, name)
    path = ranked.save(tmp_path / "checkpoints")
    resumed = two.learner(models["qwen2"], **division, **settings)
    resumed.restore(path)
    alone_again = make_learner(models["qwen2"], **settings)
    alone_again.restore(path)
    groups = make_groups(4, seed=7, version=4)
    expected = train_step(alone, groups)
    for learner in (resumed, alone_again):
        assert train_step(learner, groups)["loss"] == pytest.approx(expected["loss"], rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("distributed", [False, True])
def test_bfloat16_trains_float32_weights_and_publishes_bfloat16(
    two: Ranks, models: dict[str, Path], tmp_path: Path, distributed: bool
) -> None:
    division = {"distributed_optimizer": True} if distributed else {"tensor_parallel": 2}
    exact = make_learner(models["qwen3"], lr=1e-3)
    rough = two.learner(models["qwen3"], "bfloat16", lr=1e-3, **division)
    assert {tensor.dtype for _, tensor in rough.named_tensors()} == {torch.bfloat16}
    first = rough.save(tmp_path / "first")
    kept = dict(make_learner(first).named_tensors())
    for name, tensor in exact.named_tensors():
        assert torch.equal(kept[name], tensor), name
    for step in range(3):
        groups = make_groups(4, seed=step, version=step)
        expected, found = train_step(exact, groups), train_step(rough, groups)
        assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=0.1)
    second = rough.save(tmp_path / "second")
    again = two.learner(models["qwen3"], "bfloat16", lr=1e-3, **division)  # on the same ranks: the one before is gone
    again.restore(second)
    after = dict(make_learner(again.save(tmp_path / "third")).named_tensors())
    for name, tensor in make_learner(second).named_tensors():
        assert torch.equal(after[name], tensor), name


def test_recomputed_layers_change_no_number(two: Ranks, models: dict[str, Path]) -> None:
    found = [
        train_step(two.learner(models["llama"], pipeline_parallel=2, gradient_checkpointing=recompute), make_groups(4))
        for recompute in (False, True)
    ]
    assert found[1]["grad_norm"] == pytest.approx(found[0]["grad_norm"], rel=1e-6)


def spoil(backend: Any, *, rank: int) -> None:
    if torch.distributed.get_rank() == rank:
        next(iter(backend._optimizer.model.parameters())).main_grad.fill_(float("nan"))


@pytest.mark.parametrize(
    "division", [{"tensor_parallel": 2}, {"pipeline_parallel": 2}, {"distributed_optimizer": True}]
)
def test_a_bad_gradient_of_one_rank_is_skipped_by_all(
    two: Ranks, models: dict[str, Path], division: dict[str, int]
) -> None:
    learner = two.learner(models["qwen3"], **division)
    before = dict(learner.named_tensors())
    learner.begin_step()
    two.do(partial(spoil, rank=1))
    assert two.do(lambda backend: backend.gradient_is_finite()) == [False, False]
    assert learner._loaded().step(10.0) is None
    assert two.do(lambda backend: backend.updates) == [0, 0]
    for name, tensor in learner.named_tensors():
        assert torch.equal(tensor, before[name]), name
    assert train_step(learner, make_groups(4))["grad_norm"] > 0


def test_a_loss_that_is_not_finite_names_its_trajectory(two: Ranks, models: dict[str, Path]) -> None:
    learner = two.learner(models["qwen2"], pipeline_parallel=2)
    groups = make_groups(4)
    bad = groups[1].trajectories[0]
    bad.logprobs[bad.trainable] = float("nan")
    before = dict(learner.named_tensors())
    assert train_step(learner, groups)["step/skipped"] == 1
    for name, tensor in learner.named_tensors():
        assert torch.equal(tensor, before[name]), name


def test_a_model_that_cannot_be_divided_is_told_as_it_is(two: Ranks, tmp_path: Path) -> None:
    odd = make_model_of("llama", tmp_path, num_hidden_layers=3)
    with pytest.raises(ModelError, match="pipeline_parallel=2 does not divide the model's 3 layers"):
        two.group(pipeline_parallel=2).load(odd, None)


def test_a_rank_that_is_killed_ends_the_step_at_once(two: Ranks, models: dict[str, Path]) -> None:
    """The other rank waits in the pipeline meanwhile. Last: the ranks are of no use afterwards."""
    learner = two.learner(models["qwen2"], pipeline_parallel=2)
    train_step(learner, make_groups(3))
    os.kill(ray.get(two.actors[1].where.remote())[1], signal.SIGKILL)
    with pytest.raises(LearnerError, match=r"rank 1 of 2 of the learner was lost during '\w+'"):
        train_step(learner, make_groups(3))
