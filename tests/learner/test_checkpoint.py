from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from learner_fixtures import make_groups, make_learner, train_step

from learner.checkpoint import STATE_FILE, all_checkpoints, latest, read_checkpoint
from learner.config import LearnerConfig, ModelConfig
from learner.errors import CheckpointError, LearnerError
from learner.learner import Learner


def resumed(path: Path, **settings: object) -> Learner:
    config = LearnerConfig(warm_up_steps=0, device="cpu")
    learner = Learner(config, ModelConfig(), max_lag=4, deterministic=True, seed=99, **settings)  # type: ignore[arg-type]
    learner.restore(path)
    return learner


@pytest.fixture
def two_checkpoints(model_directory: Path, tmp_path: Path) -> Path:
    learner = make_learner(model_directory, deterministic=True)
    for seed in range(2):
        train_step(learner, make_groups(3, seed=seed))
        learner.save(tmp_path / "checkpoints", {"cursor": seed})
    return tmp_path / "checkpoints"


def test_resuming_is_continuing_bit_for_bit(model_directory: Path, tmp_path: Path) -> None:
    original = make_learner(model_directory, deterministic=True)
    for step in range(2):
        train_step(original, make_groups(4, seed=step, version=step))
    path = original.save(tmp_path, {"cursor": 12})
    copy = resumed(path)
    assert (copy.version, copy.extra) == (2, {"cursor": 12})
    for step in range(2, 4):
        groups = make_groups(4, seed=step, version=step)
        assert train_step(original, groups) == train_step(copy, groups)
    for (name, ours), (_, theirs) in zip(original.named_tensors(), copy.named_tensors(), strict=True):
        assert torch.equal(ours, theirs), name
    assert copy.version == 4


def test_the_random_numbers_go_on_where_they_were(model_directory: Path, tmp_path: Path) -> None:
    learner = make_learner(model_directory)
    torch.rand(7)
    path = learner.save(tmp_path)
    expected = torch.rand(5)
    resumed(path)
    assert torch.equal(torch.rand(5), expected)


def test_a_checkpoint_is_a_hugging_face_directory(two_checkpoints: Path) -> None:
    from transformers import AutoModelForCausalLM

    path = latest(two_checkpoints)
    assert path is not None
    assert path.name == "step-000002"
    model = AutoModelForCausalLM.from_pretrained(path)
    learner = resumed(path)
    published = dict(learner.named_tensors())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, published[name]), name
    assert (path / "tokenizer.json").read_text() == "{}"


def test_a_checkpoint_before_the_first_update_can_be_resumed(model_directory: Path, tmp_path: Path) -> None:
    path = make_learner(model_directory).save(tmp_path)
    learner = resumed(path)
    assert learner.version == 0
    assert train_step(learner, make_groups(3))["grad_norm"] > 0


def test_only_the_newest_are_kept(model_directory: Path, tmp_path: Path) -> None:
    learner = make_learner(model_directory)
    for step in range(4):
        learner.version = step * 50
        learner.save(tmp_path)
    assert [path.name for path in all_checkpoints(tmp_path)] == ["step-000100", "step-000150"]


def test_checkpoints_after_a_resumed_one_keep_the_tokenizer_when_that_one_has_gone(two_checkpoints: Path) -> None:
    learner = resumed(two_checkpoints / "step-000002")
    for step in range(2, 6):
        train_step(learner, make_groups(2, seed=step, version=step))
        written = learner.save(two_checkpoints)
    assert not (two_checkpoints / "step-000002").exists()
    assert (written / "tokenizer.json").is_file()


def test_saving_the_same_step_again_replaces_it(model_directory: Path, tmp_path: Path) -> None:
    learner = make_learner(model_directory)
    learner.save(tmp_path, {"try": 1})
    path = learner.save(tmp_path, {"try": 2})
    assert read_checkpoint(path).extra == {"try": 2}


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer/__0_0.distcp", "optimizer/.metadata", "config.json"])
def test_a_truncated_file_is_named_with_the_checkpoint_to_use(two_checkpoints: Path, name: str) -> None:
    path = two_checkpoints / "step-000002"
    file = path / name
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match=rf"{name} is damaged or truncated .*use the checkpoint .*step-000001"):
        resumed(path)


def test_a_missing_file_is_named(two_checkpoints: Path) -> None:
    path = two_checkpoints / "step-000002"
    (path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"lacks its file model\.safetensors; use the checkpoint"):
        resumed(path)
    (path / STATE_FILE).unlink()
    with pytest.raises(CheckpointError, match=r"lacks its file state\.json; use the checkpoint"):
        resumed(path)


@pytest.mark.parametrize("content", ["{", "[]", "{}", json.dumps({"step": 1})])
def test_a_damaged_state_file_is_named(two_checkpoints: Path, content: str) -> None:
    (two_checkpoints / "step-000001" / STATE_FILE).write_text(content)
    with pytest.raises(CheckpointError, match=r"state\.json is damaged .*use the checkpoint .*step-000002"):
        resumed(two_checkpoints / "step-000001")


def test_a_missing_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="step-000007 does not exist; there is no other checkpoint"):
        resumed(tmp_path / "step-000007")
    assert latest(tmp_path / "nowhere") is None


def test_an_interrupted_write_is_no_checkpoint_and_is_cleaned_up(two_checkpoints: Path, model_directory: Path) -> None:
    left_over = two_checkpoints / "step-000003.writing"
    left_over.mkdir()
    (left_over / "model.safetensors").write_bytes(b"half")
    assert latest(two_checkpoints) == two_checkpoints / "step-000002"
    learner = make_learner(model_directory)
    learner.version = 4
    learner.save(two_checkpoints)
    assert not left_over.exists()


def test_an_unwritable_directory_is_named(model_directory: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"cannot write checkpoints to .*file"):
        make_learner(model_directory).save(tmp_path / "file" / "checkpoints")


def test_state_that_is_not_json_is_a_clear_error_and_leaves_no_checkpoint(
    model_directory: Path, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match="cannot write checkpoint"):
        make_learner(model_directory).save(tmp_path, {"handle": object()})
    assert latest(tmp_path) is None


def test_training_goes_on_while_a_checkpoint_is_written(model_directory: Path, tmp_path: Path) -> None:
    """What is written is what was there when it began, whatever happens to the weights meanwhile."""
    learner = make_learner(model_directory, lr=1e-2)
    train_step(learner, make_groups(3))
    at_begin = {name: tensor.clone() for name, tensor in learner.named_tensors()}
    learner.begin_save(tmp_path, {"cursor": 1})
    with pytest.raises(LearnerError, match="is still being written: call finish_save first"):
        learner.begin_save(tmp_path)
    train_step(learner, make_groups(3, seed=1, version=1))
    path = learner.finish_save()
    assert path.name == "step-000001"
    copy = resumed(path)
    assert copy.version == 1
    for name, tensor in copy.named_tensors():
        assert torch.equal(tensor, at_begin[name]), name
    assert any(not torch.equal(tensor, at_begin[name]) for name, tensor in learner.named_tensors())


@contextmanager
def full_disk(nbytes: int) -> Iterator[None]:
    """Files cannot grow beyond ``nbytes``, as on a disk without room (the error is another one of the same kind)."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, previous)


@pytest.mark.parametrize("share", [0.05, 1.3])
def test_a_full_disk_is_a_clear_error_and_leaves_the_checkpoint_before(two_checkpoints: Path, share: float) -> None:
    """With room for a part of the weights, and for the weights but not for the optimizer."""
    learner = resumed(two_checkpoints / "step-000002")
    train_step(learner, make_groups(3, seed=5, version=2))
    nbytes = int((two_checkpoints / "step-000002" / "model.safetensors").stat().st_size * share)
    with full_disk(nbytes), pytest.raises(CheckpointError, match=r"cannot write a checkpoint to .*; free space there"):
        learner.save(two_checkpoints)
    assert {path.name for path in two_checkpoints.iterdir()} == {"step-000001", "step-000002"}
    assert latest(two_checkpoints) == two_checkpoints / "step-000002"
    assert train_step(learner, make_groups(3, seed=6, version=3))["updates"] == 4
    assert learner.save(two_checkpoints).name == "step-000004"


CRASH = """
import os, sys
from pathlib import Path
import learner.backends.checkpoint_files as files
from learner_fixtures import make_groups, make_learner, train_step

learner = make_learner(Path(sys.argv[1]))
learner.save(sys.argv[2])
train_step(learner, make_groups(3))
files._tidy = lambda directory: os._exit(9)  # all tensors are written, the checkpoint is not whole
learner.save(sys.argv[2])
"""


def test_a_crash_in_the_middle_leaves_the_checkpoint_before(model_directory: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CRASH, str(model_directory), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([*sys.path])},
        timeout=120,
        check=False,
    )
    assert done.returncode == 9
    assert (tmp_path / "step-000001.writing" / "optimizer").is_dir()
    path = latest(tmp_path)
    assert path is not None
    assert path.name == "step-000000"
    learner = resumed(path)
    train_step(learner, make_groups(3))
    assert learner.save(tmp_path).name == "step-000001"
    assert not list(tmp_path.glob("*.writing"))


def test_large_models_are_written_to_several_files(
    model_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr("learner.backends.checkpoint_files.FILE_BYTES", 20_000)
    learner = make_learner(model_directory)
    path = learner.save(tmp_path)
    assert len(list(path.glob("model-*.safetensors"))) > 1
    model = AutoModelForCausalLM.from_pretrained(path)
    published = dict(resumed(path).named_tensors())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, published[name]), name
