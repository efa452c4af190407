"""A run whose learner is a Megatron-Core model on two ranks, by the real command."""

from __future__ import annotations

from pathlib import Path

import pytest
from run_processes import MillraceProcess, assert_balanced, summary_of, training_lines
from safetensors import safe_open

SMALL = [
    "rollout.groups_per_update=4",
    "rollout.group_size=4",
    "rollout.concurrency=24",
    "tasks.held_out=8",
    "tasks.environment=coin_environment:CoinEnvironment",
    "run.steps=6",
    "run.eval_every=0",
    "run.checkpoint_every=3",
    "run.startup_timeout_s=400",
]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_quickstart_with_megatron_trains_publishes_and_saves(tiny_model: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    arguments = ["configs/quickstart-megatron.yaml", f"model.path={tiny_model}", f"run.dir={run}", *SMALL]
    process = MillraceProcess("train", *arguments, directory=run)
    assert process.wait(800) == 0, process.output[-3000:]
    summary = summary_of(run)
    assert summary["status"] == "finished"
    assert_balanced(summary)
    assert [line["step"] for line in training_lines(run)] == list(range(1, 7))
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"step-000003", "step-000006"}
    with safe_open(run / "checkpoints" / "step-000006" / "model.safetensors", framework="pt") as file:
        assert "model.layers.1.self_attn.q_norm.weight" in file.keys()  # noqa: SIM118
