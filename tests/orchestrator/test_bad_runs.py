"""Runs whose parts fail, by the real command: what is told, what survives, and that nothing is left behind."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from run_processes import (
    PATH,
    REPOSITORY,
    MillraceProcess,
    assert_balanced,
    summary_of,
    training_lines,
    without_rays_own,
)

SMALL = [
    "rollout.groups_per_update=4",
    "rollout.group_size=4",
    "rollout.concurrency=24",
    "tasks.held_out=16",
    "tasks.environment=coin_environment:CoinEnvironment",
]
FAULTY_PARTS = Path(__file__).parent / "faulty_parts.py"


def settings(model: Path, run: Path, *more: str) -> list[str]:
    return ["configs/smoke.yaml", f"model.path={model}", f"run.dir={run}", *SMALL, *more]


def last_line(process: MillraceProcess) -> str:
    return process.output.strip().splitlines()[-1]


def test_an_environment_that_hangs_ends_the_run_by_name_and_method(tiny_model: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    more = ["tasks.environment=faulty_parts:HungEnvironment", "environments.step_timeout_s=1"]
    process = MillraceProcess("train", *settings(tiny_model, run, *more), directory=run)
    assert process.wait(120) == 1
    assert "environment_fault" in last_line(process)
    assert "environment 'hung', step: hung: no return within 1 s" in last_line(process)
    assert "A worker died or was killed" not in process.output
    summary = summary_of(run)
    assert summary["status"] == "failed"
    assert summary["episodes"]["environment_fault"] >= 16
    assert summary["ledger"]["trained"] == 0


def test_a_loop_that_always_raises_ends_the_run_with_the_line_it_raised_at(tiny_model: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    more = ["rollout.loop=faulty_parts:raising", "rewards=[]"]
    process = MillraceProcess("train", *settings(tiny_model, run, *more), directory=run)
    assert process.wait(120) == 1
    assert "KeyError: 'the field that is missing'" in last_line(process)
    line = next(number for number, text in enumerate(FAULTY_PARTS.read_text().splitlines(), 1) if "KeyError" in text)
    assert f"faulty_parts.py:{line} in raising" in last_line(process)
    assert summary_of(run)["status"] == "failed"


def test_bad_episodes_do_not_end_a_run_and_a_damaged_checkpoint_has_a_way_back(
    tiny_model: Path, tmp_path: Path
) -> None:
    """One run without reward branches, whose loop fails on some tasks; its last checkpoint is damaged afterwards."""
    run = tmp_path / "run"
    more = ["rollout.loop=faulty_parts:mostly_sound", "rewards=[]", "rollout.episode_timeout_s=2", "run.steps=6"]
    process = MillraceProcess("train", *settings(tiny_model, run, *more), directory=run)
    assert process.wait(150) == 0, process.output[-3000:]
    summary = summary_of(run)
    assert summary["status"] == "finished"
    assert_balanced(summary)
    assert summary["ledger"]["trained"] == 6 * 4
    assert summary["ledger"]["dropped"]
    assert {"loop_fault", "loop_timeout"} <= set(summary["episodes"])
    assert not list((run / "logs").glob("reward-*"))

    newest = run / "checkpoints" / "step-000006" / "optimizer" / "__0_0.distcp"
    newest.write_bytes(newest.read_bytes()[:1000])
    refused = MillraceProcess("resume", str(run), "run.steps=8", directory=run)
    assert refused.wait(60) == 1
    assert f"{newest} is damaged or truncated" in last_line(refused)
    assert "--from step-000004" in last_line(refused)
    resumed = MillraceProcess("resume", str(run), "run.steps=8", "--from", "step-000004", directory=run)
    assert resumed.wait(120) == 0, resumed.output[-3000:]
    assert_balanced(summary_of(run))
    assert summary_of(run)["ledger"]["trained"] == 8 * 4
    assert [line["step"] for line in training_lines(run)] == list(range(1, 9))
    assert (run / "checkpoints" / "step-000006.abandoned").is_dir()

    missing = MillraceProcess("eval", str(run), "--step", "3", directory=run)
    assert missing.wait(60) == 1
    assert "there are step-000006, step-000008" in last_line(missing)
    evaluated = MillraceProcess("eval", str(run), "--step", "6", "--tasks", "4", directory=run)
    assert evaluated.wait(120) == 0, evaluated.output[-3000:]
    result = json.loads((run / "eval-step-000006" / "eval" / "step-000006.json").read_text())
    assert result["tasks"] + result["failed"] == 4
    assert f"step 6: success {result['success']:.3f} on {result['tasks']} held-out tasks" in evaluated.output


class TerminalProcess:
    """`millrace train` in a terminal of its own."""

    def __init__(self, *arguments: str) -> None:
        self._terminal, inner = pty.openpty()
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "120", "TERM": "xterm", "PYTHONPATH": PATH}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "orchestrator.cli", "train", *arguments],
            stdin=inner,
            stdout=inner,
            stderr=inner,
            env=environment,
            cwd=REPOSITORY,
            start_new_session=True,
        )
        os.close(inner)
        self._shown = bytearray()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        while True:
            try:
                data = os.read(self._terminal, 1 << 16)
            except OSError:  # Linux's way to say that the other side is closed
                return
            self._shown += data

    @property
    def shown(self) -> str:
        return self._shown.decode(errors="replace")

    def wait_for_step(self, run: Path, step: int) -> list[psutil.Process]:
        """Until that step is trained; returns all processes that were started."""
        deadline = time.monotonic() + 90
        while len(training_lines(run)) < step:
            assert self.process.poll() is None, self.shown[-3000:]
            assert time.monotonic() < deadline, f"no step {step} within 90 s: {self.shown[-3000:]}"
            time.sleep(0.05)
        return psutil.Process(self.process.pid).children(recursive=True)

    def close(self) -> None:
        if self.process.poll() is None:
            for child in psutil.Process(self.process.pid).children(recursive=True):
                with suppress(psutil.NoSuchProcess):
                    child.kill()
            self.process.kill()
        self.process.wait(30)
        self._reader.join(10)
        os.close(self._terminal)


@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_ends_a_run_in_good_order_and_leaves_nothing_behind(
    times: int, tiny_model: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    terminal = TerminalProcess(*settings(tiny_model, run, "run.steps=4000"))
    started: list[psutil.Process] = []
    try:
        started = terminal.wait_for_step(run, 4)
        expected = started if times == 1 else without_rays_own(started)
        os.killpg(terminal.process.pid, signal.SIGINT)  # as a terminal does: to the command and all it started
        if times == 2:
            time.sleep(0.2)
            os.killpg(terminal.process.pid, signal.SIGINT)
        status = terminal.process.wait(30)
        _, alive = psutil.wait_procs(expected, 20)
        assert alive == []
        assert terminal.shown.rfind("\x1b[?25h") > terminal.shown.rfind("\x1b[?25l"), "the cursor is hidden still"
        assert "Traceback" not in terminal.shown
        if times == 1:
            assert status == 130
            assert "millrace resume" in terminal.shown.strip().splitlines()[-1]
            summary = summary_of(run)
            assert summary["status"] == "interrupted"
            assert_balanced(summary)
            assert list((run / "checkpoints").glob("step-*"))
    finally:
        terminal.close()
        for process in psutil.wait_procs(started, 0)[1]:
            process.kill()


@pytest.mark.slow
def test_groups_without_signal_are_replaced_and_the_books_balance(tiny_model: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = MillraceProcess("train", *settings(tiny_model, run, "queue.require_signal=true"), directory=run)
    assert process.wait(180) == 0, process.output[-2000:]
    summary = summary_of(run)
    assert_balanced(summary)
    ledger = summary["ledger"]
    assert ledger["trained"] == 4 * 4
    assert ledger["dropped"].get("no_signal", 0) > 0
    assert all(line["groups/no_signal"] == 0 for line in training_lines(run))


@pytest.mark.slow
def test_a_run_in_which_no_group_has_signal_ends_with_the_reason(tiny_model: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    more = [
        "tasks.environment=faulty_parts:ConstantEnvironment",
        "queue.require_signal=true",
        "queue.max_without_signal=24",
    ]
    process = MillraceProcess("train", *settings(tiny_model, run, *more), directory=run)
    assert process.wait(180) == 1
    assert "24 groups in a row had no signal" in last_line(process)
    assert_balanced(summary_of(run))
