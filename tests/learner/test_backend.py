from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from learner_fixtures import make_groups, make_model_directory

from learner.backends.fsdp import FsdpBackend
from learner.backends.model import check_attention
from learner.batching import MicroBatch, collate, make_samples, pack
from learner.config import LearnerConfig
from learner.errors import CheckpointError, ModelError
from learner.objectives.config import ObjectiveConfig

OBJECTIVE = ObjectiveConfig()


def make_backend(directory: Path, dtype: str = "float32", **settings: Any) -> FsdpBackend:
    return FsdpBackend(directory, LearnerConfig(device="cpu", **settings), dtype)


def one_batch(aggregation: str = "token", **changes: Any) -> MicroBatch:
    samples = [s for group in make_groups(4, **changes) for s in make_samples(group, 0, 0, "grpo").samples]
    (packed,) = pack(samples, 100_000)
    return collate(packed, aggregation)


def plain_logprobs(directory: Path, batch: MicroBatch) -> torch.Tensor:
    """Every sample by itself through an unchanged Hugging Face model."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager")
    parts = []
    for sample in batch.samples:
        with torch.no_grad():
            logits = model(input_ids=torch.from_numpy(sample.inputs.astype(np.int64))[None]).logits[0]
        logp = torch.log_softmax(logits / sample.temperature, dim=-1)
        parts.append(logp[torch.from_numpy(sample.positions), torch.from_numpy(sample.targets)])
    return torch.cat(parts)


@pytest.mark.parametrize("tied", [True, False])
def test_logprobs_are_those_of_the_plain_model(tmp_path: Path, tied: bool) -> None:
    make_model_directory(tmp_path, seed=3, tied=tied)
    batch = one_batch()
    ours, _ = make_backend(tmp_path).logprobs(batch)
    torch.testing.assert_close(ours.detach(), plain_logprobs(tmp_path, batch), rtol=0, atol=2e-5)


def test_gradient_checkpointing_changes_no_number(model_directory: Path) -> None:
    batch = one_batch()
    gradients = []
    for checkpointing in (False, True):
        backend = make_backend(model_directory, gradient_checkpointing=checkpointing)
        backend.forward_backward(batch, OBJECTIVE)
        gradients.append({name: p.grad for name, p in backend._parameters.items()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


def test_the_gradient_is_that_of_the_summed_loss(model_directory: Path) -> None:
    backend = make_backend(model_directory)
    batch = one_batch()
    result = backend.forward_backward(batch, OBJECTIVE)
    ours = {name: p.grad.clone() for name, p in backend._parameters.items() if p.grad is not None}
    backend.discard_gradient()
    logp, _ = backend.logprobs(batch)
    weight = (logp.detach() - batch.behaviour).exp().clamp(max=2.0)
    loss = -(weight * batch.advantages * logp).sum()
    loss.backward()
    for name, parameter in backend._parameters.items():
        torch.testing.assert_close(ours[name], parameter.grad, rtol=1e-4, atol=1e-5)
    assert result.sums.tokens == result.sums.normaliser == len(batch.targets)
    assert result.sums.loss == pytest.approx(float(-(weight * batch.advantages).sum()), rel=1e-4)


def test_the_entropy_bonus_raises_entropy(model_directory: Path) -> None:
    backend = make_backend(model_directory, lr=1e-2, warm_up_steps=0)
    batch = one_batch()
    only_entropy = ObjectiveConfig(entropy_coef=100.0)
    before = backend.forward_backward(batch, only_entropy).sums.entropy
    backend.step(1.0)
    assert backend.forward_backward(batch, only_entropy).sums.entropy > before


def test_clipping_and_warm_up(model_directory: Path) -> None:
    backend = make_backend(model_directory, lr=1e-2, warm_up_steps=4, clip_grad=1e-3)
    assert [backend.learning_rate(k) for k in range(6)] == pytest.approx([0.0025, 0.005, 0.0075, 0.01, 0.01, 0.01])
    backend.forward_backward(one_batch(), OBJECTIVE)
    clipped: list[float] = []
    update = backend._optimizer.step

    def observe() -> None:
        gradients = [p.grad for p in backend._parameters.values() if p.grad is not None]
        clipped.append(float(torch.nn.utils.get_total_norm(gradients)))
        update()

    backend._optimizer.step = observe  # type: ignore[method-assign, assignment]
    norm = backend.step(10.0)
    assert norm is not None
    assert norm > 1e-3
    assert clipped == pytest.approx([1e-3], rel=1e-4)


def test_a_loss_that_is_not_finite_names_its_trajectory_and_adds_no_gradient(model_directory: Path) -> None:
    backend = make_backend(model_directory)
    batch = one_batch()
    behaviour = batch.behaviour.clone()
    behaviour[batch.sample_of == 2] = float("nan")
    broken = MicroBatch(**{**vars(batch), "behaviour": behaviour})
    result = backend.forward_backward(broken, OBJECTIVE)
    sample = batch.samples[2]
    first, last = sample.positions[[0, -1]] + 1
    assert result.bad_samples == (f"{sample.group_id}/{sample.trajectory_id} tokens {first}-{last}",)
    assert all(p.grad is None for p in backend._parameters.values())


def test_a_gradient_that_is_not_finite_changes_nothing(model_directory: Path) -> None:
    backend = make_backend(model_directory)
    before = {name: tensor.clone() for name, tensor in backend.named_tensors()}
    backend.forward_backward(one_batch(), OBJECTIVE)
    next(iter(backend._parameters.values())).grad.fill_(float("inf"))  # type: ignore[union-attr]
    assert backend.step(1.0) is None
    assert backend.updates == 0
    for name, tensor in backend.named_tensors():
        assert torch.equal(tensor, before[name])


def test_published_names_are_those_of_hugging_face_and_tied_weights_come_once(model_directory: Path) -> None:
    backend = make_backend(model_directory)
    names = [name for name, _ in backend.named_tensors()]
    assert "model.embed_tokens.weight" in names
    assert "lm_head.weight" not in names
    assert len(names) == len(set(names))


def test_bfloat16_trains_float32_weights_and_publishes_bfloat16(model_directory: Path) -> None:
    exact, rough = make_backend(model_directory), make_backend(model_directory, dtype="bfloat16")
    batch = one_batch()
    ours, _ = rough.logprobs(batch)
    difference = (ours - exact.logprobs(batch)[0]).detach().abs().mean()
    assert float(difference) < 0.05
    rough.forward_backward(batch, OBJECTIVE)
    assert rough.step(100.0) is not None
    assert {p.dtype for p in rough._parameters.values()} == {torch.float32}
    assert {tensor.dtype for _, tensor in rough.named_tensors()} == {torch.bfloat16}


def test_the_optimizer_state_of_another_model_is_refused(model_directory: Path, tmp_path: Path) -> None:
    backend = make_backend(model_directory)
    backend.forward_backward(one_batch(), OBJECTIVE)
    backend.step(1.0)
    state = backend.optimizer_state()
    other = make_backend(make_model_directory(tmp_path, tied=False))
    with pytest.raises(CheckpointError, match="optimizer state is not this model's"):
        other.load_optimizer_state(state, 1)
    state[next(iter(state))] = torch.zeros(1)
    with pytest.raises(CheckpointError, match="does not have the shape"):
        make_backend(model_directory).load_optimizer_state(state, 1)


def test_a_missing_model_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"model\.path=.*nowhere: no such directory"):
        make_backend(tmp_path / "nowhere")
    with pytest.raises(ModelError, match=r"holds no config\.json"):
        make_backend(tmp_path)


def test_a_model_that_is_no_causal_language_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5"}))
    with pytest.raises(ModelError, match="t5 model, which is not a causal language model"):
        make_backend(tmp_path)


def test_a_truncated_weight_file_is_a_model_error(tmp_path: Path) -> None:
    make_model_directory(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelError, match="cannot be loaded"):
        make_backend(tmp_path)


def test_sliding_windows_are_refused() -> None:
    from transformers import MistralConfig, Qwen3Config

    check_attention(Qwen3Config(num_hidden_layers=2))
    windowed = Qwen3Config(num_hidden_layers=2, use_sliding_window=True, sliding_window=8, max_window_layers=0)
    for config in (windowed, MistralConfig(sliding_window=128)):
        with pytest.raises(ModelError, match="cannot be trained yet"):
            check_attention(config)


def test_cuda_without_a_gpu_is_named(model_directory: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ModelError, match="torch sees no GPU"):
        FsdpBackend(model_directory, LearnerConfig(device="cuda"))
