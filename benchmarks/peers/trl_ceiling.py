"""What the engine alone and the learner alone reach on the task of the comparison: one thread, nothing beside them."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np

from benchmarks.peers.trl_task import PROMPT_LENGTH, SPECIAL
from experience.records import Group, GroupHeader, Task, Trajectory
from experience.wire import encode_group
from learner.config import LearnerConfig, ModelConfig
from learner.learner import Learner
from rollout_workers.engines.config import EnginesConfig
from rollout_workers.engines.protocol import GenerateRequest
from rollout_workers.engines.torch_engine import build_engine

VOCABULARY = len(SPECIAL) + 256


def engine_alone(model: Path, *, rows: int, new_tokens: int, requests: int, seed: int = 0) -> float:
    """Sampled tokens a second of the embedded engine with ``rows`` requests in flight, each replaced when it ends.

    The first ``rows`` of ``requests`` requests to end warm up; the rest is timed, as long as all rows are taken.
    """
    rng = np.random.default_rng(seed)
    slots = rows + rows // 2
    config = EnginesConfig(slots=slots, max_len=PROMPT_LENGTH + new_tokens, stream_every=new_tokens, device="cpu")
    engine = build_engine(config, model, threads=1)

    def submit(number: int) -> None:
        prompt = rng.integers(len(SPECIAL), VOCABULARY, PROMPT_LENGTH).astype(np.int32)
        name = str(number)
        engine.submit(
            GenerateRequest(request_id=name, session_id=name, prompt=prompt, max_tokens=new_tokens, seed=number)
        )

    for number in range(rows):
        submit(number)
    submitted, ended, timed, began_at = rows, 0, 0, 0.0
    while submitted < requests:
        for chunk in engine.step():
            timed += len(chunk.tokens) if began_at else 0
            if chunk.finish_reason is not None:
                ended += 1
                engine.release(chunk.request_id)
                submit(submitted)
                submitted += 1
        if not began_at and ended >= rows:
            began_at = time.perf_counter()
    return timed / (time.perf_counter() - began_at)


def learner_alone(
    model: Path, *, groups: int, size: int, new_tokens: int, learning_rate: float, steps: int, seed: int = 0
) -> float:
    """Steps a second of the learner over groups that are all there: decoding, forward, backward and update."""
    rng = np.random.default_rng(seed)
    learner = Learner(LearnerConfig(lr=learning_rate, device="cpu"), ModelConfig(path=str(model)), max_lag=8, threads=1)
    learner.load(model)
    encoded = [encode_group(_group(index, size, new_tokens, rng)) for index in range(groups)]
    warm_up = max(1, steps // 5)
    began_at = 0.0
    for step in range(warm_up + steps):
        if step == warm_up:
            began_at = time.perf_counter()
        learner.version = 0  # the groups are of version 0 in every step
        learner.begin_step()
        learner.add(encoded)
        learner.finish_step()
    return steps / (time.perf_counter() - began_at)


def _group(index: int, size: int, new_tokens: int, rng: np.random.Generator) -> Group:
    """A group of ``size`` episodes with random tokens and rewards."""
    task = Task(task_id=str(index), environment="", payload={})
    header = GroupHeader(group_id=str(index), index=index, task=task, size=size, version_floor=0, seed=index)
    sampled = np.arange(PROMPT_LENGTH + new_tokens) >= PROMPT_LENGTH
    trajectories = [
        Trajectory(
            trajectory_id=f"{episode}/0",
            episode_id=episode,
            group_id=header.group_id,
            task_id=task.task_id,
            tokens=rng.integers(len(SPECIAL), VOCABULARY, len(sampled)).astype(np.int32),
            trainable=sampled,
            logprobs=np.where(sampled, -np.log(VOCABULARY), 0.0).astype(np.float32),
            versions=np.where(sampled, 0, -1).astype(np.int32),
            reward=float(rng.random()),
        )
        for episode in header.episode_ids
    ]
    return Group(header=header, trajectories=trajectories)
