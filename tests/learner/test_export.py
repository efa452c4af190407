from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from learner_fixtures import make_groups, make_learner, train_step

from learner.errors import CheckpointError
from learner.export import export_checkpoint
from orchestrator.cli import main


@pytest.fixture
def run(model_directory: Path, tmp_path: Path) -> Path:
    learner = make_learner(model_directory)
    train_step(learner, make_groups(3))
    learner.save(tmp_path / "run" / "checkpoints")
    return tmp_path / "run"


def test_transformers_loads_what_is_exported(run: Path, model_directory: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    checkpoint = run / "checkpoints" / "step-000001"
    export_checkpoint(checkpoint, tmp_path / "whole")
    done = CliRunner().invoke(main, ["export", str(run), str(tmp_path / "half"), "--dtype", "bfloat16"])
    assert done.exit_code == 0, done.output
    assert f"{checkpoint} -> {tmp_path / 'half'}" in done.output
    trained = dict(AutoModelForCausalLM.from_pretrained(checkpoint).named_parameters())
    whole = dict(AutoModelForCausalLM.from_pretrained(tmp_path / "whole").named_parameters())
    half = AutoModelForCausalLM.from_pretrained(tmp_path / "half")
    assert half.dtype is torch.bfloat16
    before = dict(AutoModelForCausalLM.from_pretrained(model_directory).named_parameters())
    assert any(not torch.equal(tensor, before[name]) for name, tensor in trained.items())
    for name, tensor in half.named_parameters():
        assert torch.equal(whole[name], trained[name]), name
        assert torch.equal(tensor, trained[name].to(torch.bfloat16)), name
    assert {path.name for path in (tmp_path / "half").iterdir()} >= {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    }
    assert not (tmp_path / "half" / "optimizer").exists()


def test_models_of_several_files(model_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr("learner.backends.checkpoint_files.FILE_BYTES", 20_000)
    checkpoint = make_learner(model_directory).save(tmp_path)
    nbytes = export_checkpoint(checkpoint, tmp_path / "out", "bfloat16")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == nbytes == 2 * sum(p.numel() for p in model.parameters())


def test_what_cannot_be_exported(run: Path, tmp_path: Path) -> None:
    checkpoint = run / "checkpoints" / "step-000001"
    (tmp_path / "there").mkdir()
    with pytest.raises(CheckpointError, match="is there already"):
        export_checkpoint(checkpoint, tmp_path / "there")
    with pytest.raises(CheckpointError, match=r"holds no config\.json, so it is no export"):
        export_checkpoint(checkpoint, tmp_path / "there", overwrite=True)
    with pytest.raises(CheckpointError, match="is the checkpoint itself"):
        export_checkpoint(checkpoint, checkpoint, overwrite=True)
    weights = checkpoint / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    done = CliRunner().invoke(main, ["export", str(run), str(tmp_path / "out")])
    assert done.exit_code == 1
    assert "model.safetensors is damaged or truncated" in done.output
    assert not (tmp_path / "out").exists()
    empty = CliRunner().invoke(main, ["export", str(tmp_path / "nowhere"), str(tmp_path / "out")])
    assert "does not exist" in empty.output
