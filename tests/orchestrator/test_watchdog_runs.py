"""One real run in which each stage hangs once; the watchdog must name it, and the actor that everybody waits for."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
from run_processes import ACTORS, MillraceProcess, closed, command_line, summary_of, training_lines
from test_run_survival import settings

STOPPED = [
    ("engine", ("generation", "weight sync"), "engine-0"),
    ("environment", ("environment",), "environment-0"),
    ("reward", ("reward",), "reward-0"),
    ("queue", ("queue",), "queue-0"),
    ("worker", ("dispatch",), "worker-0"),
    ("learner", ("training", "weight sync", "saving"), "learner-0"),
]
"""SIGSTOP to the process of a role; what is named then."""

GATED = [
    ("reward", "reward", "reward-0", True),
    ("transfer", "weight sync", "engine-0.0", False),
    ("training", "training", "learner-0", False),
    ("saving", "saving", "learner-0", False),
    ("environment", "environment", "environment-0", True),
]
"""Closed gates: the stage and the actor that are named then, and whether an episode is."""


@contextmanager
def stopped(run: MillraceProcess, role: str) -> Iterator[None]:
    """The process of a role stands still inside the block."""
    children = psutil.Process(run._process.pid).children(recursive=True)
    process = next(child for child in children if f"ray::{ACTORS[role]}" in command_line(child))
    process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGCONT)


def test_each_stage_hangs_once_and_is_named(tiny_model: Path, tmp_path: Path) -> None:
    gates, run = tmp_path / "gates", tmp_path / "run"
    more = ["tasks.environment=gated_parts:GatedEnvironment", "mode=sync", "run.steps=4000", "run.checkpoint_every=2"]
    more += ["run.stall_warn_floor_s=1", "run.stall_timeout_s=12", "run.view_every_s=0.1"]
    more += ["rewards=[{kind: 'gated_parts:reward', timeout_s: 60}]", "tasks.held_out=4"]
    process = MillraceProcess("train", *settings(tiny_model, run, *more), directory=run, gates=gates)
    try:
        with closed(gates, "evaluation"):  # in mode sync nothing is dispatched while an evaluation runs
            warned(process, 0, ["evaluation: "], "environment-0", timeout_s=120.0)
        for role, stages, actor in STOPPED:
            seen = steps_go_on(process)
            with stopped(process, role):
                warned(process, seen, [f"{stage}: " for stage in stages], actor)
        for gate, stage, actor, of_episode in GATED:
            seen = steps_go_on(process)
            with closed(gates, gate):
                text = warned(process, seen, [f"{stage}: "], actor)
                assert not of_episode or " g0" in text
        steps_go_on(process)
        with closed(gates, "environment"):
            assert process.wait(60) == 1
    finally:
        process.close()
    last = process.output.strip().splitlines()[-1]
    assert "nothing finished for 12 s (run.stall_timeout_s=12)" in last
    assert "Everybody waits for environment: g" in last
    assert "(environment-0)" in last
    summary = summary_of(run)
    assert summary["status"] == "failed"
    assert all(line["lag/max"] == 0 and abs(line["kl/mismatch"]) < 1e-3 for line in training_lines(run))
    assert [stall["stage"] for stall in summary["stalls"]][-6:] == [*(stage for _, stage, _, _ in GATED), "environment"]
    assert all(stall["seconds"] > 1 for stall in summary["stalls"])
    assert summary["actors_replaced"] == 0


def steps_go_on(process: MillraceProcess) -> int:
    """Until two more steps are trained; returns how much output there is."""
    process.wait_for_step(len(training_lines(process.directory)) + 2)
    return len(process.output)


def warned(process: MillraceProcess, seen: int, stages: list[str], actor: str, timeout_s: float = 40.0) -> str:
    """Until a warning after the first ``seen`` characters of output names one of the stages, and the actor; returns it."""

    def said() -> list[str]:
        lines = process.output[seen:].splitlines()
        return [line.partition("Everybody waits for ")[2] for line in lines if "Everybody waits for" in line]

    def named() -> bool:
        return any(text.startswith(tuple(stages)) and actor in text for text in said())

    process.wait_until(named, f"warning that names {stages} and {actor}", timeout_s)
    return said()[-1]
