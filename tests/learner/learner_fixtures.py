"""Small models and groups for the tests of the learner."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from experience.records import Group, GroupHeader, Status, Task, Trajectory
from experience.wire import encode_group
from learner.config import LearnerConfig, ModelConfig
from learner.learner import Learner

VOCABULARY = 64


def make_model_directory(directory: Path, seed: int = 0, *, tied: bool = True) -> Path:
    """A tiny random Qwen3 with grouped-query attention, and a stand-in tokenizer file."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        tie_word_embeddings=tied,
        max_position_embeddings=256,
        initializer_range=0.2,
    )
    Qwen3ForCausalLM(config).save_pretrained(directory)
    (directory / "tokenizer.json").write_text("{}")
    return directory


def make_trajectory(
    name: str,
    rng: np.random.Generator,
    *,
    length: int | None = None,
    reward: float | None = 0.0,
    version: int = 0,
    episode: str | None = None,
    group: str = "g0",
    temperature: float = 1.0,
    status: Status = Status.FINISHED,
) -> Trajectory:
    """A prompt, then turns of sampled and observed tokens."""
    count = length or int(rng.integers(8, 30))
    trainable = np.zeros(count, dtype=np.bool_)
    trainable[3:] = (np.arange(count - 3) // 3) % 2 == 0
    return Trajectory(
        trajectory_id=name,
        episode_id=episode or name,
        group_id=group,
        task_id="t",
        tokens=rng.integers(0, VOCABULARY, count).astype(np.int32),
        trainable=trainable,
        logprobs=np.where(trainable, -rng.uniform(2.0, 6.0, count), 0).astype(np.float32),
        versions=np.where(trainable, version, -1).astype(np.int32),
        reward=reward,
        temperature=temperature,
        status=status,
    )


def make_group(
    index: int, rewards: Sequence[float | None], rng: np.random.Generator, *, version: int = 0, temperature: float = 1.0
) -> Group:
    """A group with one trajectory per reward."""
    name = f"g{index}"
    trajectories = [
        make_trajectory(f"{name}-{i}", rng, reward=reward, group=name, version=version, temperature=temperature)
        for i, reward in enumerate(rewards)
    ]
    header = GroupHeader(
        group_id=name,
        index=index,
        task=Task(task_id="t", environment="none", payload={}),
        size=len(rewards),
        version_floor=version,
        seed=0,
    )
    return Group(header=header, trajectories=trajectories)


def make_groups(count: int, size: int = 4, seed: int = 0, version: int = 0) -> list[Group]:
    """Groups with mixed rewards; the last one has no signal."""
    rng = np.random.default_rng(seed)
    groups = [
        make_group(i, [float((i + j) % 3 == 0) for j in range(size)], rng, version=version) for i in range(count - 1)
    ]
    return [*groups, make_group(count - 1, [1.0] * size, rng, version=version)]


def with_prompts(groups: Sequence[Group], length: int = 40) -> list[Group]:
    """The same groups, each trajectory behind ``length`` observed tokens that its group has in common."""
    for group in groups:
        prompt = np.random.default_rng(group.header.index).integers(0, VOCABULARY, length).astype(np.int32)
        for trajectory in group.trajectories:
            trajectory.tokens = np.concatenate([prompt, trajectory.tokens])
            trajectory.trainable = np.concatenate([np.zeros(length, np.bool_), trajectory.trainable])
            trajectory.logprobs = np.concatenate([np.zeros(length, np.float32), trajectory.logprobs])
            trajectory.versions = np.concatenate([np.full(length, -1, np.int32), trajectory.versions])
    return list(groups)


def make_learner(directory: Path, *, max_lag: int = 4, deterministic: bool = False, **settings: object) -> Learner:
    config = LearnerConfig(warm_up_steps=0, device="cpu", **settings)  # type: ignore[arg-type]
    learner = Learner(config, ModelConfig(), max_lag=max_lag, deterministic=deterministic, seed=1)
    learner.load(directory)
    return learner


def train_step(learner: Learner, groups: Sequence[Group]) -> dict[str, float]:
    learner.begin_step()
    learner.add([encode_group(group) for group in groups])
    return learner.finish_step()
