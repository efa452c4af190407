"""An adapter is trained instead of the weights, and travels alone; what an engine serves of it is what is trained."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from learner_fixtures import make_groups, make_learner, train_step

from experience.records import Group
from learner.adapter_files import base_of
from learner.backends.fsdp import FsdpBackend
from learner.batching import collate, make_samples, pack
from learner.config import LearnerConfig
from learner.errors import CheckpointError, ModelError
from learner.export import export_checkpoint, export_served
from learner.learner import Learner
from learner.lora_config import LoraConfig
from learner.objectives.config import ObjectiveConfig
from learner.publishing import OwnPublisher, SendingPlace
from orchestrator.cli import main
from rollout_workers.engines.config import EnginesConfig
from rollout_workers.engines.protocol import GenerateRequest
from rollout_workers.engines.torch_engine import build_engine
from weight_sync.base_weights import BaseWeights
from weight_sync.config import WeightsConfig
from weight_sync.transports.protocol import decode_offer
from weight_sync.transports.select import AnyReceiver

RANK_4 = LoraConfig(rank=4, alpha=6.0)


def lora_learner(directory: Path, lora: LoraConfig = RANK_4, **settings: Any) -> Learner:
    return make_learner(directory, lr=2e-2, lora=lora, **settings)


def backend_of(learner: Learner) -> FsdpBackend:
    backend = learner._ranks.backend  # type: ignore[union-attr]
    assert isinstance(backend, FsdpBackend)
    return backend


def own_logprobs(learner: Learner, groups: list[Group]) -> torch.Tensor:
    samples = [s for group in groups for s in make_samples(group, 0, 9, "grpo").samples]
    (packed,) = pack(samples, 100_000)
    return backend_of(learner).forward(collate(packed, "token"))


@pytest.fixture(scope="module")
def trained(model_directory: Path) -> Learner:
    learner = lora_learner(model_directory)
    for step in range(3):
        train_step(learner, make_groups(3, seed=step, version=step))
    return learner


def test_a_step_changes_the_adapter_and_nothing_else(model_directory: Path) -> None:
    learner = lora_learner(model_directory)
    groups = make_groups(3)
    untrained = make_learner(model_directory)
    torch.testing.assert_close(own_logprobs(learner, groups), own_logprobs(untrained, groups), rtol=0, atol=0)
    model = backend_of(learner)._model
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for step in range(2):  # B begins at zero, so A moves in the second one
        metrics = train_step(learner, make_groups(3, seed=step, version=step))
        assert metrics["grad_norm"] > 0
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == {name for name in before if ".lora_" in name}
    assert {name for name, parameter in model.named_parameters() if parameter.grad is not None} == set()


def test_the_gradient_is_that_of_the_merged_weights(model_directory: Path) -> None:
    """dL/dB = s dL/dW A^T and dL/dA = s B^T dL/dW, of the model that has the adapter merged in."""
    learner = lora_learner(model_directory, LoraConfig(rank=3, targets=["q_proj", "down_proj"]))
    train_step(learner, make_groups(3))
    backend = backend_of(learner)
    merged = dict(backend._whole_model())
    whole = FsdpBackend(model_directory, LearnerConfig(device="cpu"))
    with torch.no_grad():
        for name, parameter in whole._parameters.items():
            parameter.copy_(merged[name])
    samples = [s for group in make_groups(3, seed=5) for s in make_samples(group, 0, 9, "grpo").samples]
    (packed,) = pack(samples, 100_000)
    for one in (backend, whole):
        one.forward_backward(collate(packed, "token"), ObjectiveConfig())
    adapter = backend._parameters
    for name in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"):
        low, high = (adapter[f"base_model.model.{name}.lora_{half}.weight"] for half in "AB")
        gradient = whole._parameters[f"{name}.weight"].grad
        assert gradient is not None
        assert float(gradient.abs().max()) > 1e-3
        torch.testing.assert_close(high.grad, 2.0 * gradient @ low.T, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(low.grad, 2.0 * high.T @ gradient, rtol=1e-4, atol=1e-5)


def test_gradient_checkpointing_changes_no_number(model_directory: Path) -> None:
    found = [
        train_step(lora_learner(model_directory, gradient_checkpointing=checkpointing), make_groups(3))["grad_norm"]
        for checkpointing in (False, True)
    ]
    assert found[1] == pytest.approx(found[0], rel=1e-5)
    assert found[0] > 0


def published(learner: Learner, engine: Any, directory: Path, version: int, base: Path) -> int:
    """Have an engine serve the learner's weights; returns the bytes that it was sent."""
    place = SendingPlace(WeightsConfig(), "disk", ("here",), str(directory))
    publisher = OwnPublisher(place, "cpu", learner.named_tensors)
    publisher.prepare(version)
    offer = publisher.offer(["e0"])
    sending = threading.Thread(target=publisher.send)
    sending.start()
    receiver = AnyReceiver("e0", base=BaseWeights(base))
    engine.stage_begin(version)
    receiver.fetch(offer, engine.stage_tensor)
    engine.stage_end()
    engine.commit(version)
    sending.join(20)
    publisher.close()
    return decode_offer(offer).manifest.total_bytes


def test_an_engine_samples_with_what_is_trained(model_directory: Path, tmp_path: Path) -> None:
    """At lag 0 the engine's log-probabilities are the learner's to 1e-4, version after version."""
    learner = lora_learner(model_directory)
    config = EnginesConfig(slots=16, max_len=96, trace=False)
    engine = build_engine(config, _without_tokenizer(model_directory, tmp_path / "plain"), "float32", 1, 0)
    for step in range(3):
        train_step(learner, make_groups(3, seed=step, version=step))
        moved = published(learner, engine, tmp_path / "versions", step + 1, model_directory)
        prompt = np.arange(3, 15, dtype=np.int32)
        engine.submit(GenerateRequest(request_id=f"r{step}", session_id=f"s{step}", prompt=prompt, max_tokens=40))
        tokens, logprobs = [], []
        while engine.has_work:
            for chunk in engine.step():
                tokens.extend(chunk.tokens.tolist())
                logprobs.extend(chunk.logprobs.tolist())
        assert len(tokens) == 40
        whole = torch.tensor([*prompt.tolist(), *tokens])
        expected = _logprobs(learner, whole)[len(prompt) - 1 :]
        np.testing.assert_allclose(logprobs, expected, rtol=0, atol=1e-4)
        base = _logprobs(make_learner(model_directory), whole)[len(prompt) - 1 :]
        assert np.abs(np.array(logprobs) - base).max() > 1e-2, "the adapter matters"
    full = learner.model_bytes
    sent = sum(tensor.nbytes for _, tensor in learner.named_tensors())
    assert sent <= moved < 1.6 * sent, "the adapter alone, in lines of 64 bytes"
    assert moved < 0.5 * full


def _without_tokenizer(model: Path, target: Path) -> Path:
    target.mkdir()
    for file in ("config.json", "generation_config.json", "model.safetensors"):
        (target / file).symlink_to(model / file)
    return target


def _logprobs(learner: Learner, tokens: torch.Tensor) -> np.ndarray:
    """Of every token after the first, under the learner's present weights."""
    groups = make_groups(2)[:1]
    trajectory = groups[0].trajectories[0]
    count = len(tokens)
    trajectory.tokens = tokens.numpy().astype(np.int32)
    trajectory.trainable = np.arange(count) > 0
    trajectory.logprobs = np.where(trajectory.trainable, -1.0, 0.0).astype(np.float32)
    trajectory.versions = np.where(trajectory.trainable, 0, -1).astype(np.int32)
    (sample,) = [
        s for s in make_samples(groups[0], 0, 9, "grpo").samples if s.trajectory_id == trajectory.trajectory_id
    ]
    return backend_of(learner).forward(collate([sample], "token")).numpy()


def test_a_checkpoint_holds_the_adapter_and_goes_on_as_if_nothing_had_been(
    trained: Learner, model_directory: Path, tmp_path: Path
) -> None:
    path = trained.save(tmp_path / "checkpoints", {"cursor": 1})
    assert {file.name for file in path.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "config.json",
        "generation_config.json",
        "optimizer",
        "state.json",
        "tokenizer.json",
    }
    assert base_of(path) == model_directory.resolve()
    again = lora_learner(model_directory)
    again.restore(path)
    assert (again.version, again.extra) == (trained.version, {"cursor": 1})
    for (name, ours), (other, theirs) in zip(trained.named_tensors(), again.named_tensors(), strict=True):
        assert name == other
        assert torch.equal(ours, theirs)
    for state, restored in zip(
        backend_of(trained).optimizer_state().items(), backend_of(again).optimizer_state().items(), strict=True
    ):
        assert state[0] == restored[0]
        assert torch.equal(state[1], restored[1])
    with pytest.raises(ModelError, match=r"holds a LoRA adapter, and learner\.lora\.rank=0: set it to 4"):
        make_learner(model_directory).restore(path)
    with pytest.raises(CheckpointError, match=r"another adapter than learner\.lora describes"):
        lora_learner(model_directory, LoraConfig(rank=2)).restore(path)


def test_exports_of_an_adapter(trained: Learner, model_directory: Path, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    checkpoint = trained.save(tmp_path / "run" / "checkpoints")
    done = CliRunner().invoke(main, ["export", str(tmp_path / "run"), str(tmp_path / "adapter"), "--adapter"])
    assert done.exit_code == 0, done.output
    export_checkpoint(checkpoint, tmp_path / "merged")
    trained.export(tmp_path / "present")
    tokens = torch.arange(1, 40)[None]
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(tokens).logits
    assert not (tmp_path / "merged" / "adapter_config.json").exists()
    present = AutoModelForCausalLM.from_pretrained(tmp_path / "present")(tokens).logits
    torch.testing.assert_close(present, expected, rtol=0, atol=1e-5)
    plain = AutoModelForCausalLM.from_pretrained(model_directory)
    assert float((plain(tokens).logits - expected).abs().max()) > 1e-2
    for directory in (tmp_path / "adapter", tmp_path / "present" / "adapter"):
        base = AutoModelForCausalLM.from_pretrained(model_directory)
        by_peft = PeftModel.from_pretrained(base, str(directory)).eval()(tokens).logits
        torch.testing.assert_close(by_peft, expected, rtol=0, atol=1e-5)
    whole = make_learner(model_directory).save(tmp_path / "whole")
    with pytest.raises(CheckpointError, match="whole weights and no adapter"):
        export_checkpoint(whole, tmp_path / "nothing", adapter=True)


def test_what_engines_begin_with_after_a_resume_takes_later_versions(
    trained: Learner, model_directory: Path, tmp_path: Path
) -> None:
    checkpoint = trained.save(tmp_path / "checkpoints")
    export_served(checkpoint, model_directory, tmp_path / "served", "float32")
    export_served(checkpoint, model_directory, tmp_path / "served", "float32")
    merged = dict(backend_of(trained)._whole_model())
    (tmp_path / "served" / "tokenizer.json").unlink()
    engine = build_engine(EnginesConfig(slots=2, max_len=64, trace=False), tmp_path / "served", "float32", 1, 3)
    for name, parameter in engine.model.named_parameters():
        torch.testing.assert_close(parameter.data, merged[name], rtol=0, atol=1e-6)
    published(trained, engine, tmp_path / "versions", 4, tmp_path / "served")
    for name, parameter in engine.model.named_parameters():
        torch.testing.assert_close(parameter.data, merged[name], rtol=0, atol=1e-6)


def test_dropout_is_for_training_alone(model_directory: Path) -> None:
    learner = lora_learner(model_directory, LoraConfig(rank=4, dropout=0.5))
    assert backend_of(learner).sharing is None
    train_step(learner, make_groups(3))
    groups = make_groups(3, seed=7)
    assert torch.equal(own_logprobs(learner, groups), own_logprobs(learner, groups))
    samples = [s for group in groups for s in make_samples(group, 0, 9, "grpo").samples]
    (packed,) = pack(samples, 100_000)
    batch = collate(packed, "token")
    first, second = (backend_of(learner).logprobs(batch)[0].detach() for _ in range(2))
    assert not torch.equal(first, second)


def test_the_reference_policy_can_be_reset_to_the_merged_one(model_directory: Path) -> None:
    learner = lora_learner(model_directory, kl_coef=0.1, reference_reset_every=2)
    for step in range(2):
        train_step(learner, make_groups(3, seed=step, version=step))
    state, merged = backend_of(learner).reference_state(), dict(backend_of(learner)._whole_model())
    assert state.keys() == merged.keys()
    assert all(torch.equal(state[name], merged[name]) for name in merged)


@pytest.mark.parametrize(
    ("lora", "settings", "message"),
    [
        (LoraConfig(rank=-1), {}, "must be at least 1, or 0"),
        (LoraConfig(alpha=8.0), {}, r"learner\.lora\.rank=0 trains no adapter"),
        (LoraConfig(rank=4, alpha=0.0), {}, r"learner\.lora\.alpha=0.0 must be greater than 0"),
        (LoraConfig(rank=4, dropout=1.0), {}, "less than 1"),
        (LoraConfig(rank=4, targets=[]), {}, "targets is empty"),
        (LoraConfig(rank=4, targets=["q_proj", "lm_head"]), {}, "names lm_head, which is not in a layer"),
        (LoraConfig(rank=4), {"backend": "megatron", "ranks": 2}, r"works with learner\.backend=fsdp, not megatron"),
    ],
)
def test_settings_that_cannot_be(lora: LoraConfig, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LearnerConfig(lora=lora, **settings).validate()


def test_targets_that_the_model_does_not_have(model_directory: Path) -> None:
    with pytest.raises(ModelError, match=r"no linear modules wo; it has q_proj, k_proj, .*down_proj"):
        lora_learner(model_directory, LoraConfig(rank=4, targets=["wo", "q_proj"]))


def test_a_base_that_is_gone_and_an_adapter_given_as_a_model(
    trained: Learner, model_directory: Path, tmp_path: Path
) -> None:
    path = trained.save(tmp_path)
    with pytest.raises(ModelError, match=r"is an adapter of the model in .*nowhere, which is not there"):
        base_of(path, tmp_path / "nowhere")
    with pytest.raises(ModelError, match="merge it into its model with `millrace export`"):
        FsdpBackend(model_directory, LearnerConfig(device="cpu", kl_coef=0.1, reference=str(path)))
