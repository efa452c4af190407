"""Real runs of the real command, disturbed from outside."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest
from run_processes import (
    MillraceProcess,
    assert_accounted,
    assert_balanced,
    assert_traced,
    closed,
    summary_of,
    training_lines,
)

SMALL = [
    "rollout.groups_per_update=4",
    "rollout.group_size=4",
    "rollout.concurrency=24",
    "tasks.held_out=16",
    "tasks.environment=coin_environment:CoinEnvironment",
]


def settings(model: Path, run: Path, *more: str) -> list[str]:
    return ["configs/smoke.yaml", f"model.path={model}", f"run.dir={run}", *SMALL, *more]


def test_kill_9_of_each_kind_of_actor_does_not_end_the_run(tiny_model: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = MillraceProcess("train", *settings(tiny_model, run, "run.steps=60"), directory=run)
    for step, role in ((3, "worker"), (13, "engine"), (23, "environment"), (33, "reward")):
        process.wait_for_step(step)
        process.kill(role)
    assert process.wait(180) == 0, process.output[-3000:]
    summary = summary_of(run)
    assert summary["status"] == "finished"
    assert summary["actors_replaced"] == 4
    assert_balanced(summary)
    assert summary["ledger"]["trained"] == 60 * 4
    assert summary["ledger"]["live"] == 0
    assert summary["lag_max"] <= summary["max_lag"]
    assert len(training_lines(run)) == 60
    assert_accounted(run, killed=("worker", "engine", "environment", "reward"))
    assert_traced(run, 60 * 4)
    for role in ("worker", "engine", "environment", "reward"):
        assert f"{role}-0 is back" in process.output or "replacing it" in process.output
        assert (run / "logs" / f"{role}-0-1.log").exists()


def test_kill_9_of_the_command_ends_its_actors_and_resume_trains_every_group_once(
    tiny_model: Path, tmp_path: Path
) -> None:
    run, gates = tmp_path / "run", tmp_path / "gates"
    arguments = settings(tiny_model, run, "run.steps=24", "run.checkpoint_every=8")
    process = MillraceProcess("train", *arguments, directory=run, gates=gates)
    process.wait_for_step(8)
    with closed(gates, "training"):  # no further checkpoint before the actors have noticed
        process.wait_until((run / "checkpoints" / "step-000008").exists, "the checkpoint of step 8", 30)
        started = process.kill_command()
        assert len(started) >= 9  # seven actors and Ray's daemons
        assert psutil.wait_procs(started, 30)[1] == []
    assert not (run / "summary.json").exists()
    resumed = MillraceProcess("resume", str(run), directory=run)
    assert resumed.wait(120) == 0, resumed.output[-3000:]
    summary = summary_of(run)
    assert summary["status"] == "finished"
    assert_balanced(summary)
    assert summary["ledger"]["trained"] == 24 * 4
    assert [line["step"] for line in training_lines(run)] == list(range(1, 25))
    assert "continuing from checkpoint step-000008" in resumed.output
    again = MillraceProcess("resume", str(run), directory=run)
    assert again.wait(60) == 1
    assert "it is finished" in again.output


def test_in_mode_one_step_no_token_is_older_than_one_update(tiny_model: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = MillraceProcess("train", *settings(tiny_model, run, "mode=one_step", "run.steps=6"), directory=run)
    assert process.wait(120) == 0, process.output[-3000:]
    summary = summary_of(run)
    assert summary["tokens"]["masked"] == 0
    assert_balanced(summary)
    assert all(line["lag/max"] <= 1 for line in training_lines(run))
    assert summary["lag_max"] <= 1


def test_runs_in_mode_sync_are_on_policy_and_deterministic_ones_identical_bit_for_bit(
    tiny_model: Path, tmp_path: Path
) -> None:
    curves = []
    for name in ("first", "second"):
        run = tmp_path / name
        arguments = settings(tiny_model, run, "mode=sync", "run.deterministic=true", "run.steps=6", "run.eval_every=3")
        process = MillraceProcess("train", *arguments, directory=run)
        assert process.wait(120) == 0, process.output[-3000:]
        summary, lines = summary_of(run), training_lines(run)
        assert (summary["lag_max"], summary["tokens"]["masked"]) == (0, 0)
        assert_balanced(summary)
        assert all(line["lag/max"] == 0 for line in lines)
        assert all(max(abs(line["kl/mismatch"]), line["kl/mismatch_lag0"]) < 1e-3 for line in lines)
        keys = ("loss", "reward/mean", "grad_norm", "kl/mismatch", "entropy", "tokens/trained")
        curves.append([[line[key] for key in keys] for line in lines])
    assert len(curves[0]) == 6
    assert curves[0] == curves[1]


def test_two_engines_by_broadcast_and_one_of_them_killed(tiny_model: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    more = ["engines.replicas=2", "rollout.workers=2", "weights.transport=collective", "weights.timeout_s=10"]
    process = MillraceProcess("train", *settings(tiny_model, run, "run.steps=30", *more), directory=run)
    process.wait_for_step(5)
    process.kill("engine")
    assert process.wait(180) == 0, process.output[-3000:]
    summary = summary_of(run)
    assert summary["status"] == "finished"
    assert summary["ledger"]["trained"] == 30 * 4
    assert summary["lag_max"] <= summary["max_lag"]
    assert_balanced(summary)


@pytest.mark.slow
def test_changes_by_stagers_every_second_step_with_an_engine_and_a_stager_killed(
    tiny_model: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    more = ["engines.replicas=2", "weights.transport=relay", "weights.delta=true", "weights.every=2"]
    process = MillraceProcess("train", *settings(tiny_model, run, "run.steps=31", *more), directory=run)
    process.wait_for_step(4, 240)
    process.kill("engine")
    process.wait_for_step(10, 240)
    process.kill("stager")
    assert process.wait(240) == 0, process.output[-3000:]
    summary = summary_of(run)
    assert summary["status"] == "finished"
    assert summary["ledger"]["trained"] == 31 * 4
    assert summary["lag_max"] <= summary["max_lag"]
    assert "is replaced" in process.output
    assert_balanced(summary)
