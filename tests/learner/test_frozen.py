from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from learner_fixtures import make_groups, make_learner, make_model_directory, train_step

from learner.backends.fsdp import FsdpBackend
from learner.batching import MicroBatch, collate, make_samples, pack
from learner.config import LearnerConfig
from learner.errors import CheckpointError, ModelError
from learner.objectives.config import ObjectiveConfig


def one_batch() -> MicroBatch:
    samples = [s for group in make_groups(4) for s in make_samples(group, 0, 0, "grpo").samples]
    (packed,) = pack(samples, 100_000)
    return collate(packed, "token")


def gradients(backend: FsdpBackend, **settings: Any) -> dict[str, torch.Tensor]:
    backend.discard_gradient()
    backend.forward_backward(one_batch(), ObjectiveConfig(**settings))
    return {name: p.grad.clone() for name, p in backend._parameters.items() if p.grad is not None}


def backend_of(directory: Path, **settings: Any) -> FsdpBackend:
    return FsdpBackend(directory, LearnerConfig(device="cpu", **settings))


def test_the_distance_to_oneself_has_no_gradient(model_directory: Path) -> None:
    with_kl = gradients(backend_of(model_directory, kl_coef=0.5, kl_kind="k2"), kl_coef=0.5, kl_kind="k2")
    without = gradients(backend_of(model_directory))
    for name, gradient in without.items():
        torch.testing.assert_close(with_kl[name], gradient, rtol=1e-4, atol=1e-5)


def test_the_distance_to_another_model_has_one(model_directory: Path, tmp_path: Path) -> None:
    other = make_model_directory(tmp_path / "other", seed=9)
    settings: dict[str, Any] = {"kl_coef": 10.0, "kl_kind": "k2", "reference": str(other)}
    backend = backend_of(model_directory, lr=1e-2, warm_up_steps=0, **settings)
    assert backend._reference is not None
    batch = one_batch()
    reference = backend._reference.logprobs(batch)

    def distance() -> float:
        return float((backend.forward(batch) - reference).square().mean())

    before = distance()
    for _ in range(3):
        backend.forward_backward(batch, ObjectiveConfig(**settings))
        backend.step(batch.normaliser)
    assert distance() < before


def test_a_teacher_pulls_the_policy_to_itself(model_directory: Path, tmp_path: Path) -> None:
    teacher = make_model_directory(tmp_path / "teacher", seed=5)
    settings: dict[str, Any] = {"teacher": str(teacher), "distill_coef": 10.0}
    backend = backend_of(model_directory, lr=1e-2, warm_up_steps=0, **settings)
    batch = one_batch()

    def distance() -> float:
        logits = backend._logits(batch)
        found = backend._distillation(batch, logits, ObjectiveConfig(**settings))
        assert found is not None
        return float(found.detach().mean())

    before = distance()
    for _ in range(10):
        backend.forward_backward(batch, ObjectiveConfig(**settings))
        backend.step(batch.normaliser)
    assert distance() < 0.7 * before


def test_a_teacher_of_another_vocabulary_is_refused(model_directory: Path, tmp_path: Path) -> None:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8,
    )  # fmt: skip
    Qwen3ForCausalLM(config).save_pretrained(tmp_path / "small")
    with pytest.raises(ModelError, match="has a vocabulary of 32 tokens and the trained model one of 64"):
        backend_of(model_directory, teacher=str(tmp_path / "small"), distill_coef=1.0)
    with pytest.raises(ModelError, match=r"learner\.teacher: model\.path=.*no such directory"):
        backend_of(model_directory, teacher=str(tmp_path / "nowhere"), distill_coef=1.0)


def test_a_reference_that_was_reset_comes_back_with_the_checkpoint(model_directory: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"kl_coef": 0.1, "reference_reset_every": 2, "lr": 1e-2}
    learner = make_learner(model_directory, **settings)
    rng = np.random.default_rng(0)
    for _ in range(3):
        train_step(learner, make_groups(3, seed=int(rng.integers(1000)), version=learner.version))
    path = learner.save(tmp_path)
    backend = learner._loaded().backend
    state = backend.reference_state()
    now = dict(backend.named_tensors())
    assert any(not torch.equal(state[name], now[name]) for name in state), "two updates, then one more"
    resumed = make_learner(model_directory, **settings)
    resumed.restore(path)
    for name, tensor in resumed._loaded().backend.reference_state().items():
        assert torch.equal(tensor, state[name])
    without = make_learner(model_directory)
    with pytest.raises(CheckpointError, match=r"learner\.kl_coef=0 uses none"):
        without.restore(path)
