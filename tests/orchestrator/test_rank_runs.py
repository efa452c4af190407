"""Runs whose learner has two ranks, by the real command."""

from __future__ import annotations

from pathlib import Path

import pytest
from run_processes import MillraceProcess, assert_balanced, summary_of, training_lines

SMALL = [
    "rollout.groups_per_update=4",
    "rollout.group_size=4",
    "rollout.concurrency=24",
    "tasks.held_out=8",
    "tasks.environment=coin_environment:CoinEnvironment",
    "learner.ranks=2",
]


@pytest.mark.timeout(600)
def test_a_rank_killed_mid_step_ends_the_run_by_name_and_resume_goes_on(tiny_model: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    arguments = ["configs/smoke.yaml", f"model.path={tiny_model}", f"run.dir={run}", *SMALL]
    process = MillraceProcess("train", *arguments, "run.steps=16", "run.checkpoint_every=4", directory=run)
    process.wait_for_step(6, 200)
    process.kill("rank")
    assert process.wait(90) == 1
    told = process.output.strip().splitlines()[-1]
    assert "of 2 of the learner was lost" in told
    assert "rank 0" in told or "rank 1" in told
    assert "`millrace resume` goes on from the last checkpoint" in told
    assert summary_of(run)["status"] == "failed"

    resumed = MillraceProcess("resume", str(run), directory=run)
    assert resumed.wait(240) == 0, resumed.output[-3000:]
    assert "continuing from checkpoint step-0000" in resumed.output
    summary = summary_of(run)
    assert summary["status"] == "finished"
    assert_balanced(summary)
    assert summary["ledger"]["trained"] == 16 * 4
    lines = training_lines(run)
    assert [line["step"] for line in lines] == list(range(1, 17))
    assert all(0.0 <= line["packing/imbalance"] <= 1.0 and 0.0 <= line["packing/padding"] < 1.0 for line in lines)
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"step-000012", "step-000016"}
