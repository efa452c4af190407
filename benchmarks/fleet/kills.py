"""A real run whose engines are killed with SIGKILL under load: how soon their requests are elsewhere, and what was lost."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from benchmarks.fleet.loop import LOOP, generated_again, read_turns
from orchestrator.fleet_log import FleetEvent, read_fleet_events
from orchestrator.run_directory import RunDirectory

ACTORS = {
    "torch": "EngineActor",
    "synthetic": "EngineActor",
    "vllm": "ServerEngineActor",
    "sglang": "ServerEngineActor",
}
STOP_LIMIT_S = 60.0
SHOWN_LOG_LINES = 15
LOOK_S = 0.05


class KillsError(Exception):
    """A run that failed, or in which nothing could be killed; the message says which and why."""


@dataclass(frozen=True)
class KillPlan:
    """``kills`` kills, one after another, each once the fleet is whole again, in a run with these engines."""

    kind: str = "torch"
    engines: int = 2
    kills: int = 3
    below: bool = False
    """Kill the server process below its actor (kinds with a server) instead of the actor's own."""
    seed: int = 0
    model: Path | None = None
    limit_s: float = 300.0
    """How long each wait may take: the start, a new place for the requests, the replacement."""

    def settings(self, turns: Path) -> tuple[str, list[str]]:
        """The configuration to start from, and the settings over it."""
        values: dict[str, Any] = {
            "seed": self.seed,
            "run.steps": 1_000_000,
            "run.eval_every": 0,
            "run.checkpoint_every": 0,
            "tasks.held_out": 0,
            "engines.replicas": self.engines,
            "rollout.loop": LOOP,
        }
        if self.model is not None:
            values["model.path"] = self.model
        if self.kind == "synthetic":
            loop = "scripted"
            values |= {"rollout.concurrency": 512, "engines.synthetic.accelerators": 4}
        else:
            loop = "tool_agent"
            values |= {"rollout.concurrency": 48, "rollout.groups_per_update": 4, "rollout.group_size": 4}
        values["rollout.args"] = f"{{loop: {loop}, directory: '{turns}'}}"
        config = {"torch": "quickstart", "synthetic": "synthetic"}.get(self.kind, f"quickstart-{self.kind}")
        return config, [f"{key}={value}" for key, value in values.items()]


def measure_kills(plan: KillPlan, directory: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """Run, kill, and count. Raises KillsError with the end of the run's output."""
    turns = directory.with_name(f"{directory.name}-turns")
    turns.mkdir(parents=True, exist_ok=True)
    run = RunDirectory(directory)
    rows = []
    with _running(plan, directory, turns) as watch:
        say(f"{plan.kind}: starting {plan.engines} engines")
        watch.until("the first step", lambda: _last_step(run.metrics) > 0)
        for number in range(plan.kills):
            say(f"{plan.kind}: kill {number + 1} of {plan.kills}")
            rows.append(_one_kill(plan, run, watch))
            watch.until("two more steps", partial(_has_trained, run.metrics, _last_step(run.metrics) + 2))
    summary = run.read_json(run.summary)
    return report(plan, rows, summary, read_turns(turns))


def report(
    plan: KillPlan, rows: list[dict[str, Any]], summary: dict[str, Any], turns: list[dict[str, Any]]
) -> dict[str, Any]:
    """The figures of one run."""
    episodes = summary.get("episodes", {})
    ledger = summary.get("ledger", {})
    dropped = sum(ledger.get("dropped", {}).values())
    balance = ledger.get("dispatched", 0) - ledger.get("trained", 0) - dropped - ledger.get("live", 0)
    return {
        "kind": plan.kind,
        "engines": plan.engines,
        "killed": "the server below the actor" if plan.below else "the engine's actor",
        "kills": rows,
        "rerouted_s_max": max((row["rerouted_s"] for row in rows), default=None),
        "requests_moved": sum(row["requests_moved"] for row in rows),
        "episodes_ended": episodes.get("ended", 0),
        "episodes_lost": episodes.get("failed", 0),
        "groups_unaccounted": balance,
        "turns": len(turns),
        "turns_generated_again": generated_again(turns),
        "served_old_weights": sum(not row["joined_current"] for row in rows),
        "steps": summary.get("steps"),
    }


def _one_kill(plan: KillPlan, run: RunDirectory, watch: _Watch) -> dict[str, Any]:
    """Kill an engine, and wait until its requests have another place and another engine has taken its own."""
    seen = len(read_fleet_events(run.fleet_events))
    victim = _server(plan, run.logs) if plan.below else _actor(plan, watch.process.pid)
    killed_at = time.time()
    os.kill(victim, signal.SIGKILL)

    def news(event: str) -> list[FleetEvent]:
        return [found for found in read_fleet_events(run.fleet_events)[seen:] if found.event == event]

    watch.until("a new place for the requests", lambda: bool(news("rerouted")))
    watch.until("the replacement", lambda: bool(news("serving")))
    moved, serving = news("rerouted"), news("serving")[0]
    trained = _last_step(run.metrics, before=serving.at)
    return {
        "noticed_s": round(max(found.numbers["noticed_at"] for found in moved) - killed_at, 3),
        "rerouted_s": round(max(found.numbers["placed_at"] for found in moved) - killed_at, 3),
        "requests_moved": int(sum(found.numbers["requests"] for found in moved)),
        "replaced_s": round(serving.at - killed_at, 3),
        "joined_version": serving.version,
        "newest_version": trained,
        # a version counts as current until the next one has begun to reach the engines, after the step that made it
        "joined_current": serving.version is not None and serving.version >= trained - 1,
    }


def _actor(plan: KillPlan, pid: int) -> int:
    """The process of an engine's actor, below the run's command ``pid``."""
    title = f"ray::{ACTORS[plan.kind]}"
    engines = sorted(
        (child for child in psutil.Process(pid).children(recursive=True) if title in _command(child)),
        key=lambda child: child.pid,
    )
    if not engines:
        raise KillsError(f"no process of {title} is there")
    return int(engines[0].pid)


def _server(plan: KillPlan, logs: Path) -> int:
    """The largest process that writes to the log of a server of this run."""
    ending = f"-{plan.kind}.log"
    sizes: dict[int, int] = {}
    for process in psutil.process_iter():
        try:
            paths = [Path(file.path) for file in process.open_files()]
            if any(path.parent == logs and path.name.endswith(ending) for path in paths):
                sizes[process.pid] = process.memory_info().rss
        except psutil.Error:
            continue
    if not sizes:
        raise KillsError(
            f"no process writes to {logs}/*{ending}: engines of kind {plan.kind} have no server below them"
        )
    return max(sizes, key=lambda pid: sizes[pid])


def _command(process: psutil.Process) -> str:
    """Empty when the process has just ended."""
    try:
        return " ".join([process.name(), *process.cmdline()])
    except psutil.Error:
        return ""


def _has_trained(metrics: Path, version: int) -> bool:
    return _last_step(metrics) >= version


def _last_step(metrics: Path, before: float = float("inf")) -> int:
    """The newest version that the metrics tell of, made before a time (Unix seconds); 0 when there is none."""
    if not metrics.exists():
        return 0
    newest = 0
    for text in metrics.read_text(encoding="utf-8").splitlines(keepends=True):
        if text.endswith("\n"):
            line = json.loads(text)
            if "time/step_s" in line and line["time"] <= before:
                newest = max(newest, int(line["step"]))
    return newest


@dataclass
class _Watch:
    """The run's process; `until` waits for what its files tell."""

    process: subprocess.Popen[bytes]
    log: Path
    limit_s: float

    def until(self, what: str, condition: Callable[[], bool]) -> None:
        """Look again and again, until then; the run may not end before."""
        deadline = time.monotonic() + self.limit_s
        while not condition():
            if self.process.poll() is not None:
                raise KillsError(f"the run ended before {what}:\n{self.tail()}")
            if time.monotonic() > deadline:
                raise KillsError(f"no {what} within {self.limit_s:g} s:\n{self.tail()}")
            time.sleep(LOOK_S)

    def tail(self) -> str:
        return "\n".join(self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-SHOWN_LOG_LINES:])


@contextmanager
def _running(plan: KillPlan, directory: Path, turns: Path) -> Iterator[_Watch]:
    log = directory.with_suffix(".log")
    log.parent.mkdir(parents=True, exist_ok=True)
    config, overrides = plan.settings(turns)
    command = [sys.executable, "-m", "orchestrator.cli", "train", config, *overrides]
    command += [f"run.dir={directory}", "run.overwrite=true"]
    with log.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        yield _Watch(process, log, plan.limit_s)
        process.send_signal(signal.SIGINT)
        process.wait(STOP_LIMIT_S)
    except subprocess.TimeoutExpired as error:
        raise KillsError(f"the run of {directory} did not end within {error.timeout:g} s of Ctrl-C") from None
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(STOP_LIMIT_S)
