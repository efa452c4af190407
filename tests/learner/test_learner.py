from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from learner_fixtures import VOCABULARY, make_group, make_groups, make_learner, train_step

from experience.records import Group
from experience.wire import WireFormatError, encode_group
from learner.config import LearnerConfig, ModelConfig
from learner.errors import LearnerError
from learner.learner import Learner


def sample_group(learner: Learner, index: int, rng: np.random.Generator) -> Group:
    """Episodes that answer a fixed prompt with one token of the present policy; even tokens are rewarded."""
    from learner.backends.fsdp import FsdpBackend
    from learner.backends.ranks import OneRank

    ranks = learner._loaded()
    assert isinstance(ranks, OneRank)
    backend = ranks.backend
    assert isinstance(backend, FsdpBackend)
    group = make_group(index, [0.0] * 8, rng, version=learner.version)
    weights = backend._model
    prompt = torch.tensor([[1, 2, 3]])
    from learner.attention import make_layout

    with torch.no_grad():
        logits = weights(input_ids=prompt, use_cache=False, ragged=make_layout([3])).logits[0, -1]
    logp = torch.log_softmax(logits, dim=-1).double().numpy()
    probabilities = np.exp(logp) / np.exp(logp).sum()
    for trajectory in group.trajectories:
        token = int(rng.choice(VOCABULARY, p=probabilities))
        trajectory.tokens = np.array([1, 2, 3, token], dtype=np.int32)
        trajectory.trainable = np.array([False, False, False, True])
        trajectory.logprobs = np.array([0, 0, 0, logp[token]], dtype=np.float32)
        trajectory.versions = np.array([-1, -1, -1, learner.version], dtype=np.int32)
        trajectory.reward = float(token % 2 == 0)
    return group


@pytest.mark.parametrize("correction", ["decoupled", "tis", "none"])
def test_it_learns_what_is_rewarded(model_directory: Path, correction: str) -> None:
    learner = make_learner(model_directory, lr=1e-2, correction=correction)
    rng = np.random.default_rng(0)
    success = []
    for step in range(25):
        groups = [sample_group(learner, step * 4 + i, rng) for i in range(4)]
        metrics = train_step(learner, groups)
        success.append(metrics["success"])
        if "kl/mismatch_lag0" in metrics:
            assert metrics["kl/mismatch_lag0"] < 1e-4
    assert np.mean(success[:3]) < 0.75
    assert np.mean(success[-3:]) > 0.95


def test_add_returns_the_ids_and_finish_moves_the_version(model_directory: Path) -> None:
    learner = make_learner(model_directory)
    groups = make_groups(3)
    learner.begin_step()
    assert learner.add([encode_group(group) for group in groups[:2]]) == ["g0", "g1"]
    assert learner.add([encode_group(groups[2])]) == ["g2"]
    metrics = learner.finish_step()
    assert learner.version == 1
    assert metrics["tokens/trained"] + metrics["tokens/masked"] == sum(group.sampled_tokens for group in groups)
    assert metrics["updates"] == 1


def test_an_unfinished_step_leaves_no_trace(model_directory: Path) -> None:
    groups = make_groups(4)
    clean, interrupted = (make_learner(model_directory, deterministic=True) for _ in range(2))
    interrupted.begin_step()
    interrupted.add([encode_group(group) for group in make_groups(3, seed=8)])
    interrupted.flush()
    assert train_step(clean, groups) == train_step(interrupted, groups)


def test_a_malformed_group_is_a_wire_error(model_directory: Path) -> None:
    learner = make_learner(model_directory)
    learner.begin_step()
    with pytest.raises(WireFormatError):
        learner.add([b"nonsense"])


def test_steps_that_are_not_finite_are_skipped_counted_and_end_the_run(model_directory: Path) -> None:
    learner = make_learner(model_directory, max_bad_steps=3)
    bad = make_groups(3)
    bad[1].trajectories[2].logprobs[:] = np.nan
    before = [tensor.clone() for _, tensor in learner.named_tensors()]
    assert train_step(learner, bad)["step/skipped"] == 1
    assert learner.version == 1
    assert all(torch.equal(a, b) for a, (_, b) in zip(before, learner.named_tensors(), strict=True))
    assert train_step(learner, make_groups(3))["steps/skipped"] == 1
    train_step(learner, bad)
    train_step(learner, bad)
    with pytest.raises(LearnerError, match=r"3 steps in a row, the last of them step 4 .*g1/g1-2"):
        train_step(learner, bad)


def test_calls_out_of_order_say_what_is_missing(model_directory: Path) -> None:
    learner = Learner(LearnerConfig(device="cpu"), ModelConfig(), max_lag=1)
    with pytest.raises(LearnerError, match="call load or restore first"):
        learner.begin_step()
    learner.load(model_directory)
    with pytest.raises(LearnerError, match="call begin_step first"):
        learner.finish_step()


def test_export_is_a_hugging_face_directory(model_directory: Path, tmp_path: Path) -> None:
    learner = make_learner(model_directory)
    train_step(learner, make_groups(3))
    learner.export(tmp_path / "out")
    again = make_learner(tmp_path / "out")
    for (name, ours), (_, theirs) in zip(learner.named_tensors(), again.named_tensors(), strict=True):
        assert torch.equal(ours, theirs), name
    assert (tmp_path / "out" / "tokenizer.json").exists()


def test_settings_are_checked_and_threads_applied() -> None:
    with pytest.raises(ValueError, match=r"learner\.lr"):
        Learner(LearnerConfig(lr=-1.0), ModelConfig(), max_lag=1)
    Learner(LearnerConfig(threads=2), ModelConfig(), max_lag=1)
    assert torch.get_num_threads() == 2
    Learner(LearnerConfig(threads=2), ModelConfig(), max_lag=1, threads=1)
    assert torch.get_num_threads() == 1
