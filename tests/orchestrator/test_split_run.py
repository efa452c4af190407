"""A whole run whose engines prefill or decode."""

from __future__ import annotations

from pathlib import Path

from run_processes import MillraceProcess, assert_accounted, assert_balanced, summary_of, training_lines

SPLIT = [
    "rollout.groups_per_update=4",
    "rollout.group_size=4",
    "rollout.concurrency=24",
    "tasks.held_out=16",
    "tasks.environment=coin_environment:CoinEnvironment",
    "engines.prefill=1",
    "engines.decode=1",
    "engines.handoff.min_tokens=0",
    "engines.park_mb=8",
]

STEPS = 120
"""Enough that the engine which replaces the killed one still has work to do."""


def test_a_run_with_prefill_and_decode_apart_trains_and_survives_the_loss_of_an_engine(
    tiny_model: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    arguments = ["configs/smoke.yaml", f"model.path={tiny_model}", f"run.dir={run}", *SPLIT, f"run.steps={STEPS}"]
    process = MillraceProcess("train", *arguments, directory=run)
    process.wait_for_step(4)
    process.kill("engine")
    assert process.wait(180) == 0, process.output[-3000:]
    summary = summary_of(run)
    assert (summary["status"], summary["actors_replaced"]) == ("finished", 1)
    assert_balanced(summary)
    assert summary["ledger"]["trained"] == STEPS * 4
    assert len(training_lines(run)) == STEPS
    assert all(abs(line["kl/mismatch"]) < 1e-2 for line in training_lines(run) if line["lag/max"] == 0)
    assert_accounted(run)
    accounting = summary["accounting"]
    prefill, decode = accounting["engine-0.prefill"], accounting["engine-1.decode"]
    assert prefill["prefill"] > prefill.get("decode", 0.0)
    assert decode["decode"] > decode.get("prefill", 0.0)
    assert "other_phase" in prefill
    assert summary["kv"]["handoffs"] > 0
    assert summary["kv"]["kv_received_mb"] > 0
    assert training_lines(run)[-1]["kv/handoffs"] > 0
    log = "".join(path.read_text() for path in (run / "logs").glob("engine-*.log"))
    assert "Traceback" not in log
