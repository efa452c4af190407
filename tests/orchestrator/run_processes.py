"""Runs of the real `millrace` command in a process of its own, watched and disturbed from outside."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from trace_checks import check_trace

from experience.accounting import Span, read_timeline

REPOSITORY = Path(__file__).resolve().parents[2]
PATH = os.pathsep.join([str(REPOSITORY), str(Path(__file__).parent)])
GATES = Path(__file__).parent / "gates"
ACTORS = {
    "worker": "RolloutWorkerActor",
    "engine": "EngineActor",
    "environment": "EnvironmentActor",
    "reward": "RewardActor",
    "learner": "LearnerActor",
    "queue": "QueueActor",
    "controller": "Controller",
}
"""Of every run; each keeps books of its seconds."""
RAYS_OWN_AGENTS = ("DashboardAgent", "RuntimeEnvAgent")
"""They end by themselves when they have noticed, a minute or two later, that Ray's daemon is gone."""
SOMETIMES = {"rank": "RankActor", "stager": "StagerActor"}


class MillraceProcess:
    """One `millrace` command. Leaves no process behind. With ``gates`` (a directory), `closed` ones hold its actors up."""

    def __init__(self, *arguments: str, directory: Path, cwd: Path | None = None, gates: Path | None = None) -> None:
        self.directory = directory
        self._output = directory.with_suffix(".output")
        path = PATH if gates is None else os.pathsep.join([str(GATES), PATH])
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "160", "PYTHONPATH": path}
        if gates is not None:
            gates.mkdir()
            environment["MILLRACE_TEST_GATES"] = str(gates)
        with self._output.open("wb") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "orchestrator.cli", *arguments],
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                cwd=cwd or REPOSITORY,
                start_new_session=True,
            )

    def wait(self, timeout_s: float = 120.0) -> int:
        """Exit status; kills everything and fails when it takes longer."""
        try:
            return self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"not over after {timeout_s} s:\n{self.output[-4000:]}") from None
        finally:
            self.close()

    @property
    def output(self) -> str:
        return self._output.read_text(errors="replace")

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    def wait_for_step(self, step: int, timeout_s: float = 90.0) -> None:
        """Until the metrics tell of learner step ``step``."""
        self.wait_until(lambda: len(training_lines(self.directory)) >= step, f"step {step}", timeout_s)

    def kill(self, role: str) -> int:
        """kill -9 the actor of a role; returns its process id."""
        title = f"ray::{(ACTORS | SOMETIMES)[role]}"
        children = psutil.Process(self._process.pid).children(recursive=True)
        found = [process for process in children if title in command_line(process)]
        assert found, f"no process of {title}"
        found[0].send_signal(signal.SIGKILL)
        return found[0].pid

    def interrupt(self) -> None:
        self._process.send_signal(signal.SIGINT)

    def kill_command(self) -> list[psutil.Process]:
        """kill -9 the command alone; returns what it had started and should end too."""
        started = without_rays_own(psutil.Process(self._process.pid).children(recursive=True))
        self._process.kill()
        self._process.wait(30)
        return started

    def close(self) -> None:
        try:
            processes = psutil.Process(self._process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            processes = []
        if self.running:
            self._process.kill()
        for process in processes:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        self._process.wait(30)

    def wait_until(self, condition: Callable[[], bool], what: str, timeout_s: float) -> None:
        """Until the condition holds, while the run goes on."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert self.running, f"the run ended before {what}:\n{self.output[-4000:]}"
            assert time.monotonic() < deadline, f"no {what} within {timeout_s} s:\n{self.output[-4000:]}"
            time.sleep(0.05)


@contextmanager
def closed(gates: Path, name: str) -> Iterator[None]:
    """Code of the run that comes to the gate waits there until the block is left, see `gates.gate`."""
    (gates / name).touch()
    try:
        yield
    finally:
        (gates / name).unlink()


def command_line(process: psutil.Process) -> str:
    """Empty when the process has just ended."""
    try:
        return " ".join([process.name(), *process.cmdline()])
    except psutil.NoSuchProcess:
        return ""


def without_rays_own(processes: list[psutil.Process]) -> list[psutil.Process]:
    return [process for process in processes if not any(name in command_line(process) for name in RAYS_OWN_AGENTS)]


def training_lines(directory: Path) -> list[dict[str, Any]]:
    """The metrics of the learner steps so far."""
    path = directory / "metrics.jsonl"
    if not path.exists():
        return []
    lines = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
    return [line for line in lines if "time/step_s" in line]


def summary_of(directory: Path) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads((directory / "summary.json").read_text())
    return summary


def assert_accounted(directory: Path, killed: tuple[str, ...] = ()) -> None:
    """Every actor's seconds add up to its wall-clock, in the timeline and in the summary; those killed lost some."""
    lanes: dict[str, list[Span]] = {}
    for span in read_timeline(directory / "timeline"):
        lanes.setdefault(span.lane, []).append(span)
    accounting = summary_of(directory)["accounting"]
    assert {lane.partition("-")[0] for lane in lanes} == set(ACTORS)
    assert accounting.keys() == lanes.keys()
    for lane, spans in lanes.items():
        wall_s = max(span.ended_at for span in spans) - min(span.began_at for span in spans)
        assert abs(sum(span.ended_at - span.began_at for span in spans) - wall_s) < 0.01 * wall_s, lane
        told_s = sum(accounting[lane].values())
        assert abs(told_s - wall_s) < 0.01 * wall_s + 1.5, lane  # the timeline goes on after the summary
        if lane.partition("-")[0] in killed:
            assert accounting[lane]["failure"] > 0, lane


def assert_traced(directory: Path, groups: int) -> None:
    """`millrace trace` makes a sound file of the run, with an arrow for each trained group."""
    assert MillraceProcess("trace", str(directory), directory=directory.with_name("trace")).wait(60) == 0
    events = check_trace(directory / "trace.json")["traceEvents"]
    assert sum(event["ph"] == "f" for event in events) == groups


def assert_balanced(summary: dict[str, Any]) -> None:
    """Every dispatched group was trained, dropped with a reason, or is live; the same in tokens."""
    ledger, tokens = summary["ledger"], summary["tokens"]
    assert ledger["dispatched"] == ledger["trained"] + sum(ledger["dropped"].values()) + ledger["live"]
    if not ledger["live"]:
        assert tokens["generated"] == tokens["trained"] + tokens["masked"] + tokens["wasted"]
