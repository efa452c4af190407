"""Two and three real ranks in processes of their own, over gloo, compared with one."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
import ray
import torch
from hypothesis import given
from hypothesis import strategies as st
from learner_fixtures import make_groups, make_learner, train_step, with_prompts
from rank_fixtures import learner_on, make_group, settings_of
from safetensors.torch import load_file

from experience.records import Group
from learner.backends.rank_group import RankGroup
from learner.errors import LearnerError, ModelError
from learner.learner import Learner
from learner.lora_config import LoraConfig

SAME = ("loss", "grad_norm", "entropy", "tokens/trained", "ratio/mean")


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    found = os.pathsep.join(
        [str(Path(__file__).parent), str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    )
    variables = {"OMP_NUM_THREADS": "1", "PYTHONPATH": found}
    ray.init(
        address="local",
        num_cpus=4,
        include_dashboard=False,
        log_to_driver=False,
        runtime_env={"env_vars": variables},
    )
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def pair(cluster: None) -> RankGroup:
    return make_group(2)


@pytest.fixture(scope="module")
def three(cluster: None) -> RankGroup:
    return make_group(3)


def assert_same_steps(alone: Learner, ranked: Learner, steps: int, rel: float = 1e-4) -> None:
    for step in range(steps):
        groups = make_groups(5, seed=step, version=alone.version)
        expected, found = train_step(alone, groups), train_step(ranked, groups)
        for name in SAME:
            assert found[name] == pytest.approx(expected[name], rel=rel, abs=1e-7), (step, name)


def assert_same_weights(ours: Learner, theirs: Learner, rtol: float, atol: float) -> None:
    expected, found = dict(ours.named_tensors()), dict(theirs.named_tensors())
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=rtol, atol=atol, msg=name)


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_train_as_one(request: pytest.FixtureRequest, model_directory: Path, world: int) -> None:
    """Losses and gradient norms over 20 updates of Adam to 1e-4."""
    group = request.getfixturevalue({2: "pair", 3: "three"}[world])
    alone, ranked = make_learner(model_directory, lr=1e-3), learner_on(group, model_directory, lr=1e-3)
    assert_same_steps(alone, ranked, 20)
    assert_same_weights(alone, ranked, rtol=1e-3, atol=2e-4)


def test_ranks_share_prefixes_too(pair: RankGroup, model_directory: Path) -> None:
    alone = make_learner(model_directory, lr=1e-3, prefix_sharing="off")
    ranked = learner_on(pair, model_directory, lr=1e-3, prefix_sharing="on")
    for step in range(3):
        groups = with_prompts(make_groups(5, seed=step, version=alone.version))
        expected, found = train_step(alone, groups), train_step(ranked, groups)
        for name in ("loss", "grad_norm", "entropy", "tokens/trained", "ratio/mean"):
            assert found[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-7), (step, name)
        assert found["packing/prefix_saved"] > 0.3


def test_weights_after_a_step_of_gradient_descent_are_those_of_one_rank(pair: RankGroup, model_directory: Path) -> None:
    settings: dict[str, Any] = {"lr": 1e-1, "optimizer": "sgd", "clip_grad": 0.0}
    alone, ranked = make_learner(model_directory, **settings), learner_on(pair, model_directory, **settings)
    before = {name: tensor.clone() for name, tensor in alone.named_tensors()}
    assert_same_steps(alone, ranked, 1)
    assert any(not torch.allclose(tensor, before[name], atol=1e-4) for name, tensor in alone.named_tensors())
    assert_same_weights(alone, ranked, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("setting", ["gradient_checkpointing", "cpu_offload"])
def test_what_saves_memory_changes_no_number(pair: RankGroup, model_directory: Path, setting: str) -> None:
    alone = make_learner(model_directory, lr=1e-3)
    assert_same_steps(alone, learner_on(pair, model_directory, lr=1e-3, **{setting: True}), 3, rel=1e-5)


def test_bfloat16_layers_with_float32_weights(pair: RankGroup, model_directory: Path) -> None:
    alone = make_learner(model_directory, lr=1e-3)
    ranked = learner_on(pair, model_directory, "bfloat16", lr=1e-3)
    assert {tensor.dtype for _, tensor in ranked.named_tensors()} == {torch.bfloat16}
    assert_same_steps(alone, ranked, 2, rel=0.1)


def test_checkpoints_move_between_numbers_of_ranks(
    pair: RankGroup, three: RankGroup, model_directory: Path, tmp_path: Path
) -> None:
    ranked = learner_on(pair, model_directory, lr=1e-3)
    for step in range(3):
        train_step(ranked, make_groups(4, seed=step, version=step))
    ranked.begin_save(tmp_path / "two", {"cursor": 7})
    groups = make_groups(4, seed=9, version=3)
    expected = train_step(ranked, groups)  # while the checkpoint is written
    path = ranked.finish_save()
    after = dict(ranked.named_tensors())

    alone = make_learner(model_directory, lr=1e-3)
    alone.restore(path)
    assert (alone.version, alone.extra) == (3, {"cursor": 7})
    back = alone.save(tmp_path / "one")
    for learner, source in ((alone, None), (learner_on(pair, path), back), (learner_on(three, path), path)):
        if source is not None:
            learner.restore(source)
        found = train_step(learner, groups)
        assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)
        assert found["updates"] == 4
    alone_now = dict(alone.named_tensors())
    for name, tensor in after.items():
        torch.testing.assert_close(alone_now[name], tensor, rtol=1e-4, atol=1e-6, msg=name)


def broken(kind: str) -> list[Group]:
    """One trajectory, which one of the ranks gets, has a loss or a gradient that is not finite."""
    groups = make_groups(4, seed=3)
    culprit = groups[1].trajectories[2]
    where = np.flatnonzero(culprit.trainable)[1]
    culprit.logprobs[where] = {"loss": np.nan, "gradient": -88.0}[kind]
    return groups


@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_what_is_not_finite_on_one_rank_is_skipped_on_all(pair: RankGroup, model_directory: Path, kind: str) -> None:
    settings: dict[str, Any] = {"lr": 1e-3, "max_bad_steps": 2, "correction": "none", "surrogate": "plain"}
    alone, ranked = make_learner(model_directory, **settings), learner_on(pair, model_directory, **settings)
    before = dict(ranked.named_tensors())
    found = train_step(ranked, broken(kind))
    assert (found["step/skipped"], found["steps/skipped"], found["updates"]) == (1, 1, 0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in ranked.named_tensors())
    alone.version = ranked.version
    assert_same_steps(alone, ranked, 1)
    train_step(ranked, broken(kind))
    with pytest.raises(LearnerError, match=r"2 steps in a row, the last of them step 3 .*g1/g1-2 tokens \d+ to \d+"):
        train_step(ranked, broken(kind))


def test_steps_of_nothing_and_of_less_than_there_are_ranks(pair: RankGroup, model_directory: Path) -> None:
    alone, ranked = make_learner(model_directory), learner_on(pair, model_directory)
    for learner in (alone, ranked):
        learner.begin_step()
        assert learner.finish_step()["updates"] == 0
    one = make_groups(2, seed=1, version=1)[:1]
    for trajectory in one[0].trajectories[1:]:
        trajectory.trainable[:] = False
    expected, found = train_step(alone, one), train_step(ranked, one)
    assert found["packing/imbalance"] == 1.0, "one rank waits for the other"
    assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)


@given(st.integers(0, 40), st.integers(1, 9))
def test_all_ranks_get_equally_many_bins(count: int, world: int) -> None:
    group = RankGroup([None] * world, settings_of(world), 1.0)
    bins: list[Any] = [[index] for index in range(count)]
    shares = group._shared(bins)
    assert len({len(share) for share in shares}) == 1
    taken = [one for turn in zip(*shares, strict=True) for one in turn]
    assert taken[:count] == bins
    assert not any(taken[count:])


def test_what_one_rank_cannot_do_is_told_as_it_is(pair: RankGroup, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such directory"):
        pair.load(tmp_path / "nowhere", None)


def test_a_rank_that_is_killed_ends_the_step_at_once(cluster: None, model_directory: Path) -> None:
    learner = learner_on(group := make_group(2), model_directory)
    first, second = (ray.get(rank.where.remote())[1] for rank in group._ranks)
    os.kill(second, signal.SIGSTOP)  # the other one waits for it, in the middle of a pass
    found: list[BaseException] = []

    def step() -> None:
        try:
            train_step(learner, make_groups(3))
        except BaseException as error:  # noqa: BLE001 - the test looks at it
            found.append(error)

    thread = Thread(target=step)
    thread.start()
    thread.join(1.0)
    assert thread.is_alive()
    os.kill(second, signal.SIGKILL)
    thread.join(20.0)
    assert isinstance(found[0], LearnerError)
    assert "rank 1 of 2 of the learner was lost during" in str(found[0])
    os.kill(first, signal.SIGKILL)


def test_a_rank_that_hangs_is_given_up(cluster: None, model_directory: Path) -> None:
    group = make_group(2)
    group.load(model_directory, None)
    second = ray.get(group._ranks[1].where.remote())[1]
    os.kill(second, signal.SIGSTOP)
    group._timeout_s = 1.0
    with pytest.raises(LearnerError, match=r"discard_gradient: no answer from rank 1 of the learner in 1 s"):
        group.discard_gradient()
    os.kill(second, signal.SIGKILL)


@pytest.mark.gpu
@pytest.mark.parametrize("cpu_offload", [False, True])
def test_ranks_on_gpus_train_as_one_on_a_cpu(cluster: None, model_directory: Path, cpu_offload: bool) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    settings: dict[str, Any] = {"lr": 1e-3, "device": "cuda", "cpu_offload": cpu_offload}
    ranked = learner_on(make_group(2, **settings), model_directory, **settings)
    assert_same_steps(make_learner(model_directory, lr=1e-3), ranked, 3, rel=1e-3)


def test_adapters_on_two_ranks_train_as_on_one(pair: RankGroup, model_directory: Path, tmp_path: Path) -> None:
    """Losses, gradient norms and weights; a checkpoint moves from two ranks to one, and what is published is the same."""
    settings: dict[str, Any] = {"lr": 1e-2, "lora": LoraConfig(rank=3)}
    alone, ranked = make_learner(model_directory, **settings), learner_on(pair, model_directory, **settings)
    begun = {name: tensor.clone() for name, tensor in alone.named_tensors()}
    assert_same_steps(alone, ranked, 6)
    assert all("lora_" in name and not torch.equal(tensor, begun[name]) for name, tensor in alone.named_tensors())
    assert_same_weights(alone, ranked, rtol=1e-3, atol=2e-4)
    path = ranked.save(tmp_path)
    ranked.export(tmp_path / "merged")
    later = make_learner(model_directory, **settings)
    later.restore(path)
    assert_same_weights(later, ranked, rtol=0, atol=0)
    later.export(tmp_path / "of one")
    merged, of_one = (load_file(tmp_path / name / "model.safetensors") for name in ("merged", "of one"))
    assert merged.keys() == of_one.keys()
    assert all(torch.allclose(merged[name], of_one[name], atol=1e-6) for name in merged)
    expected, found = (train_step(learner, make_groups(4, seed=9, version=6)) for learner in (ranked, later))
    assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)
