"""Real runs whose engines come, go, die and stand still under load. Nothing is lost, nothing is generated twice."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import psutil
from run_processes import ACTORS, MillraceProcess, assert_balanced, command_line, summary_of, training_lines
from test_run_survival import settings
from test_synthetic_runs import start

from benchmarks.fleet.loop import LOOP, generated_again, read_turns
from orchestrator.fleet_log import FleetEvent, read_fleet_events

REROUTED_S = 5.0


class FleetRun:
    """A run with two engines, and the news of its fleet."""

    def __init__(self, process: MillraceProcess, turns: Path) -> None:
        self.process = process
        self.directory = process.directory
        self.turns = turns

    def events(self) -> list[FleetEvent]:
        return read_fleet_events(self.directory / "fleet.jsonl")

    def wait_for(self, event: str, count: int, timeout_s: float = 90.0) -> FleetEvent:
        """Until that many events of a kind are there; returns the last of them."""

        def found() -> list[FleetEvent]:
            return [entry for entry in self.events() if entry.event == event]

        self.process.wait_until(lambda: len(found()) >= count, f"{count} times {event!r}", timeout_s)
        return found()[count - 1]

    def steps_go_on(self) -> None:
        self.process.wait_for_step(len(training_lines(self.directory)) + 2)

    def scale(self, change: str) -> tuple[int, str]:
        """`millrace scale`: its exit status and output."""
        command = MillraceProcess(
            "scale", str(self.directory), change, directory=self.directory.with_name(f"scale{change}")
        )
        return command.wait(90), command.output

    def engine_process(self) -> psutil.Process:
        children = psutil.Process(self.process._process.pid).children(recursive=True)
        return next(child for child in children if f"ray::{ACTORS['engine']}" in command_line(child))

    def signalled(self, number: signal.Signals) -> float:
        """Signal an engine's process; returns when (Unix seconds)."""
        process, at = self.engine_process(), time.time()
        process.send_signal(number)
        return at

    def kill_one_under_load(self, serving: int) -> int:
        """Kill engines until one had requests in that moment; returns how many. ``serving``: engines that have served so far."""
        for kills in range(1, 6):
            killed_at = self.signalled(signal.SIGKILL)
            event = self.wait_for("rerouted", kills)
            assert 0 <= event.numbers["placed_at"] - killed_at <= REROUTED_S, event
            self.wait_for("serving", serving + kills)
            if event.numbers["requests"] > 0:
                return kills
        raise AssertionError("no engine that was killed had requests in that moment")

    def end(self) -> dict[str, object]:
        """Ctrl-C; returns the summary."""
        self.process.interrupt()
        assert self.process.wait(60) == 130, self.process.output[-3000:]
        return summary_of(self.directory)

    def assert_rerouted(self, since: float, number: int) -> None:
        """The requests of the lost engine had another place soon after ``since``."""
        event = self.wait_for("rerouted", number)
        assert event.numbers["requests"] > 0, "the engine had no requests when it was lost: nothing was tested"
        assert 0 <= event.numbers["placed_at"] - since <= REROUTED_S, event

    def assert_nothing_lost(self) -> None:
        """No episode failed, no complete turn came back twice, and whoever joined held what was current then."""
        summary = summary_of(self.directory)
        assert summary["episodes"].get("failed", 0) == 0, summary["episodes"]
        assert summary["episodes"]["ended"] > 0
        assert_balanced(summary)
        turns = read_turns(self.turns)
        assert len(turns) > summary["episodes"]["ended"]
        assert generated_again(turns) == 0
        lines = training_lines(self.directory)
        for event in self.events():
            if event.event == "serving":
                trained = max((line["step"] for line in lines if line["time"] <= event.at), default=0)
                assert event.version is not None
                assert event.version >= trained - 1, event


def recorded(turns: Path, loop: str = "tool_agent") -> list[str]:
    turns.mkdir()
    return [
        f"rollout.loop={LOOP}",
        f"rollout.args={{loop: {loop}, directory: '{turns}'}}",
        "engines.replicas=2",
        "tasks.held_out=0",
        "run.steps=100000",
        "run.checkpoint_every=0",
    ]


def test_engines_come_and_go_by_command_and_one_is_killed(tiny_model: Path, tmp_path: Path) -> None:
    directory, turns = tmp_path / "run", tmp_path / "turns"
    process = MillraceProcess("train", *settings(tiny_model, directory, *recorded(turns)), directory=directory)
    run = FleetRun(process, turns)
    try:
        process.wait_for_step(2)
        status, output = run.scale("engines=+1")
        assert status == 0, output
        assert "engine-2.0 loading version" in output
        assert "engines: 2 -> 3" in output
        run.steps_go_on()
        kills = run.kill_one_under_load(serving=3)
        status, output = run.scale("engines=-1")
        assert status == 0, output
        assert "engine-2." in output
        assert "draining version" in output
        assert "drained: " in output
        assert "engines: 3 -> 2" in output
        run.steps_go_on()
        for change, told in (
            ("engines=0", "a run needs at least 1 engine, and it has 2"),
            ("workers=+1", "only engines can be scaled"),
        ):
            assert run.scale(change)[0] == 1
            assert told in run.scale(change)[1]
        summary = run.end()
    finally:
        process.close()
    run.assert_nothing_lost()
    assert summary["actors_replaced"] == kills
    fleet = summary["fleet"]
    assert isinstance(fleet, dict)
    assert fleet["counts"]["scaled"] == 2
    assert [event["detail"] for event in fleet["events"] if event["event"] == "scaled"] == [
        "engines: 2 -> 3",
        "engines: 3 -> 2",
    ]
    assert not (directory / "control.json").exists()
    status, output = run.scale("engines=+1")
    assert status == 1
    assert "is not running: its summary says 'interrupted'; `millrace resume" in " ".join(output.split())


def test_synthetic_engines_are_killed_and_stopped(tmp_path: Path) -> None:
    directory, turns = tmp_path / "run", tmp_path / "turns"
    probes = ["fleet.probe_every_s=0.5", "fleet.probe_timeout_s=3", "fleet.probe_misses=2"]
    process = start(directory, *recorded(turns), "staleness.max_lag=8", *probes)
    run = FleetRun(process, turns)
    try:
        process.wait_for_step(2)
        killed_at = run.signalled(signal.SIGKILL)
        run.assert_rerouted(killed_at, 1)
        run.wait_for("serving", 3)
        run.steps_go_on()
        stopped = run.engine_process()
        run.signalled(signal.SIGSTOP)
        condemned = run.wait_for("condemned", 1)
        assert "no answer within" in condemned.detail
        run.assert_rerouted(condemned.at, 2)
        run.wait_for("serving", 4)
        process.wait_until(lambda: not alive(stopped.pid), "end of the process that stood still", 30)
        run.steps_go_on()
        summary = run.end()
    finally:
        process.close()
    run.assert_nothing_lost()
    assert summary["actors_replaced"] == 2
    assert all(line["lag/max"] <= 8 for line in training_lines(directory))


def alive(pid: int) -> bool:
    """Whether a process runs (one that nobody has waited for does not)."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_the_loop_of_these_tests_sees_a_turn_that_comes_back_twice(tmp_path: Path) -> None:
    line = '{"at": 1.0, "task": "train/0", "member": 0, "turn": 0, "tokens": 3}\n'
    (tmp_path / f"turns-{os.getpid()}.jsonl").write_text(line + line + line.replace('"turn": 0', '"turn": 1'))
    assert generated_again(read_turns(tmp_path)) == 1
