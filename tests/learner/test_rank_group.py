"""Two and three real ranks in processes of their own, over gloo, compared with one."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from learner_fixtures import make_groups, make_learner, train_step, with_prompts

from learner.backends.rank_actor import RankActor, RankSettings
from learner.backends.rank_group import RankGroup, imbalance
from learner.config import LearnerConfig, ModelConfig
from learner.errors import LearnerError, ModelError
from learner.learner import Learner


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def make_group(world: int, timeout_s: float = 60.0, **settings: Any) -> RankGroup:
    config = LearnerConfig(warm_up_steps=0, device="cpu", ranks=world, **settings)
    kind = ray.remote(RankActor).options(num_cpus=0)
    ranks = [kind.remote(RankSettings(rank, world, config, "float32", 1, 1, timeout_s)) for rank in range(world)]
    return RankGroup(ranks, config, timeout_s)


def make_ranked(directory: Path, world: int, **settings: Any) -> Learner:
    group = make_group(world, **settings)
    config = LearnerConfig(warm_up_steps=0, device="cpu", ranks=world, **settings)
    learner = Learner(config, ModelConfig(), max_lag=4, seed=1, group=group)
    learner.load(directory)
    return learner


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_train_as_one(cluster: None, model_directory: Path, world: int) -> None:
    """Losses and gradient norms over 20 updates of Adam to 1e-4."""
    alone, ranked = make_learner(model_directory, lr=1e-3), make_ranked(model_directory, world, lr=1e-3)
    for step in range(20):
        groups = make_groups(5, seed=step, version=alone.version)
        expected, found = train_step(alone, groups), train_step(ranked, groups)
        for name in ("loss", "grad_norm", "entropy", "tokens/trained", "ratio/mean"):
            assert found[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-7), (step, name)
    mine, theirs = dict(alone.named_tensors()), dict(ranked.named_tensors())
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        torch.testing.assert_close(theirs[name], tensor, rtol=1e-3, atol=2e-4, msg=name)


def test_ranks_share_prefixes_too(cluster: None, model_directory: Path) -> None:
    alone = make_learner(model_directory, lr=1e-3, prefix_sharing="off")
    ranked = make_ranked(model_directory, 2, lr=1e-3, prefix_sharing="on")
    for step in range(3):
        groups = with_prompts(make_groups(5, seed=step, version=alone.version))
        expected, found = train_step(alone, groups), train_step(ranked, groups)
        for name in ("loss", "grad_norm", "entropy", "tokens/trained", "ratio/mean"):
            assert found[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-7), (step, name)
        assert found["packing/prefix_saved"] > 0.3


def test_checkpoints_move_between_numbers_of_ranks(cluster: None, model_directory: Path, tmp_path: Path) -> None:
    ranked = make_ranked(model_directory, 2, lr=1e-3)
    for step in range(3):
        train_step(ranked, make_groups(4, seed=step, version=step))
    path = ranked.save(tmp_path / "two")
    alone = make_learner(model_directory, lr=1e-3)
    alone.restore(path)
    assert alone.version == 3
    again = make_ranked(model_directory, 2, lr=1e-3)
    again.restore(alone.save(tmp_path / "one"))
    groups = make_groups(4, seed=9, version=3)
    expected = train_step(ranked, groups)
    for learner in (alone, again):
        found = train_step(learner, groups)
        assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)
    for (name, mine), (_, theirs) in zip(sorted(alone.named_tensors()), sorted(again.named_tensors()), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6, msg=name)


def test_a_rank_that_is_killed_ends_the_step_at_once(cluster: None, model_directory: Path) -> None:
    group = make_group(2)
    group.load(model_directory, None)
    os.kill(ray.get(group._ranks[1].where.remote())[1], signal.SIGKILL)
    with pytest.raises(LearnerError, match="rank 1 of 2 of the learner was lost during 'discard_gradient'"):
        group.discard_gradient()


def test_what_one_rank_cannot_do_is_told_as_it_is(cluster: None, tmp_path: Path) -> None:
    group = make_group(2)
    with pytest.raises(ModelError, match="no such directory"):
        group.load(tmp_path / "nowhere", None)


def test_imbalance() -> None:
    assert imbalance([100, 100]) == 0.0
    assert imbalance([]) == 0.0
    assert imbalance([120, 80]) == pytest.approx(0.2)
