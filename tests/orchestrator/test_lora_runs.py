"""A run that trains an adapter, by the real command: what moves, what is kept, and that resuming serves what was trained."""

from __future__ import annotations

from pathlib import Path

import pytest
from run_processes import MillraceProcess, assert_balanced, summary_of, training_lines
from safetensors.torch import load_file

SETTINGS = [
    "mode=sync",
    "tasks.held_out=8",
    "tasks.environment=coin_environment:CoinEnvironment",
    "learner.lora.rank=4",
    "learner.lr=2e-2",
    "learner.warm_up_steps=0",
    "run.checkpoint_every=3",
]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_engines_serve_the_trained_adapter_also_after_a_resume(tiny_model: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    arguments = ["configs/smoke.yaml", f"model.path={tiny_model}", f"run.dir={run}", *SETTINGS, "run.steps=3"]
    process = MillraceProcess("train", *arguments, directory=run)
    assert process.wait(240) == 0, process.output[-3000:]
    kept = {path.name for path in (run / "checkpoints" / "step-000003").iterdir()}
    assert "adapter_model.safetensors" in kept
    assert "model.safetensors" not in kept

    resumed = MillraceProcess("resume", str(run), "run.steps=6", directory=run)
    assert resumed.wait(240) == 0, resumed.output[-3000:]
    assert_balanced(summary_of(run))
    lines = training_lines(run)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert all(line["kl/mismatch_lag0"] < 1e-6 for line in lines), "engines sample with what is trained"
    assert all(0 < line["weights/moved_share"] < 0.25 for line in lines[1:3] + lines[4:])
    adapter = load_file(run / "checkpoints" / "step-000003" / "adapter_model.safetensors")
    assert all(float(tensor.abs().max()) > 1e-2 for tensor in adapter.values()), "which is far from the base model"
    evaluated = MillraceProcess("eval", str(run), directory=run)
    assert evaluated.wait(240) == 0, evaluated.output[-3000:]
