"""One run of synthetic episodes through the real control plane, watched while it works."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.control_plane.usage import RAY, Usage, usage_by_role
from env_pool.workloads.scripts import REFERENCE_TOKENS_PER_S, SWE_MODEL_S, SWE_TOOL_S
from experience.vitals import DISPATCH, LOOP_LAG, SUBMIT, TURNS, ActorVitals, Histogram, read_vitals
from orchestrator.run_directory import RunDirectory

TOKEN_SCALE = 50
"""Modelled tokens in a carried token: 2,000 episodes of 60,000 tokens would not fit into this machine's memory."""
TURN_S = SWE_MODEL_S.mean() + SWE_TOOL_S.mean()
"""Modelled seconds of a turn at the reference decode rate."""
SEQUENCES_PER_ACCELERATOR = 16
LEARNER_ACCELERATORS_PER_EPISODE = 0.02
"""So many keep up with what the episodes yield."""
RAMP_LIMIT_S = 300.0
SETTLE_S = 5.0
STOP_LIMIT_S = 60.0
SHOWN_LOG_LINES = 15


class ControlPlaneError(Exception):
    """A run that failed or did not get going; the message says which and why."""


@dataclass(frozen=True)
class Load:
    """So many concurrent episodes of `swe`, as fast as makes about ``turns_per_s`` turns a wall second in all."""

    episodes: int
    turns_per_s: float
    seconds: float
    seed: int = 0
    workers: int = 1

    @property
    def time_scale(self) -> float:
        """Modelled seconds in a wall second."""
        return round(self.turns_per_s * TURN_S / self.episodes, 3)


def overrides(load: Load) -> list[str]:
    """Settings over the configuration `synthetic`."""
    scale = load.time_scale
    settings = {
        "seed": load.seed,
        "run.steps": 1_000_000,
        "run.stall_timeout_s": 100_000,
        "tasks.options.suite": "swe",
        "tasks.options.time_scale": scale,
        "tasks.options.token_scale": TOKEN_SCALE,
        "rollout.concurrency": load.episodes,
        "rollout.workers": load.workers,
        "rollout.group_size": 8,
        "rollout.groups_per_update": 16,
        "rollout.episode_timeout_s": 1_000_000,
        "engines.replicas": 1,
        "engines.synthetic.accelerators": math.ceil(load.episodes / SEQUENCES_PER_ACCELERATOR),
        "engines.synthetic.time_scale": scale,
        "engines.synthetic.token_scale": TOKEN_SCALE,
        "environments.actors": 1,
        "environments.step_timeout_s": 60 + 1000 / scale,
        "staleness.target_lag": math.ceil(load.episodes / 128) + 1,
        "staleness.max_lag": 1000,
        "learner.synthetic.accelerators": math.ceil(load.episodes * LEARNER_ACCELERATORS_PER_EPISODE),
        "learner.synthetic.time_scale": scale,
        "learner.synthetic.token_scale": TOKEN_SCALE,
    }
    return [f"{key}={value}" for key, value in settings.items()]


def measure(load: Load, directory: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """Run ``load`` in ``directory``; returns one row of results. Raises ControlPlaneError with the end of the log."""
    vitals = RunDirectory(directory).vitals
    began_at = time.time()
    with _running(load, directory) as process:
        _ramp(process, vitals, began_at, load, say)
        _wait(process, SETTLE_S)
        ramp_s = time.time() - began_at
        before, since = usage_by_role(process.pid, memory=False), time.time()
        say(f"{load.episodes} episodes: measuring for {load.seconds:g} s")
        _wait(process, load.seconds)
        after, until = usage_by_role(process.pid, memory=False), time.time()
        memory = usage_by_role(process.pid, memory=True)
    used = {role: after[role].cpu_s - before.get(role, Usage()).cpu_s for role in after}
    return row(load, read_vitals(vitals, began_at), read_vitals(vitals, since, until), used, memory, until - since) | {
        "ramp_s": round(ramp_s, 1)
    }


def row(
    load: Load,
    whole: dict[str, ActorVitals],
    window: dict[str, ActorVitals],
    cpu_s: dict[str, float],
    memory: dict[str, Usage],
    seconds: float,
) -> dict[str, Any]:
    """The results of one run: ``whole`` from its beginning, ``window`` and ``cpu_s`` of the ``seconds`` measured."""
    workers = [found for actor, found in window.items() if actor.startswith("worker")]
    turns_per_s = sum(found.counters.get(TURNS, 0) / found.seconds for found in workers if found.seconds)
    if not turns_per_s:
        raise ControlPlaneError(f"{load.episodes} episodes: no turn came back while it was measured; measure longer")
    thousands = turns_per_s * seconds / 1000
    return {
        "episodes": load.episodes,
        "time_scale": load.time_scale,
        "token_scale": TOKEN_SCALE,
        "turns_per_s": round(turns_per_s, 1),
        "dispatch_ms": {"ramp": _quantiles(whole, DISPATCH), "steady": _quantiles(window, DISPATCH)},
        "submit_ms": _quantiles(window, SUBMIT),
        "loop_lag_ms": {actor: _quantiles({actor: found}, LOOP_LAG) for actor, found in window.items()},
        "cpu_s_per_1000_turns": {role: round(used / thousands, 4) for role, used in sorted(cpu_s.items())}
        | {"total": round(sum(cpu_s.values()) / thousands, 4)},
        "memory_mib": {role: round(usage.pss_bytes / 2**20, 1) for role, usage in sorted(memory.items())}
        | {"total": round(sum(usage.pss_bytes for usage in memory.values()) / 2**20, 1)},
        "cores_used": round(sum(cpu_s.values()) / seconds, 3),
        "loop_lag_p99_max_ms": max(
            (_quantiles({actor: found}, LOOP_LAG)["p99"] for actor, found in window.items()), default=math.nan
        ),
        "memory_without_ray_mib": round(
            sum(usage.pss_bytes for role, usage in memory.items() if role != RAY) / 2**20, 1
        ),
        "model_tokens_per_s": REFERENCE_TOKENS_PER_S,
    }


def _quantiles(actors: dict[str, ActorVitals], name: str) -> dict[str, float]:
    """Milliseconds; None is written as nan where nothing was seen."""
    total = Histogram()
    for found in actors.values():
        if name in found.delays:
            total.merge(found.delays[name])
    return {
        "p50": round(total.quantile(0.5) * 1000, 3),
        "p99": round(total.quantile(0.99) * 1000, 3),
        "count": total.count,
    }


@contextmanager
def _running(load: Load, directory: Path) -> Iterator[subprocess.Popen[bytes]]:
    log = directory.with_suffix(".log")
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "orchestrator.cli", "train", "synthetic", *overrides(load)]
    command += [f"run.dir={directory}", "run.overwrite=true"]
    with log.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        yield process
        process.send_signal(signal.SIGINT)
        process.wait(STOP_LIMIT_S)
    except subprocess.TimeoutExpired as error:
        raise ControlPlaneError(f"the run of {directory} did not end within {error.timeout:g} s of Ctrl-C") from None
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(STOP_LIMIT_S)


def _ramp(
    process: subprocess.Popen[bytes], vitals: Path, began_at: float, load: Load, say: Callable[[str], None]
) -> None:
    """Until every episode has begun: as many dispatches as episodes were seen (by this run, not by an earlier one there)."""
    deadline = time.monotonic() + RAMP_LIMIT_S
    while (begun := _begun(vitals, began_at)) < load.episodes:
        say(f"{load.episodes} episodes: {begun} have begun")
        if time.monotonic() > deadline:
            raise ControlPlaneError(
                f"only {begun} of {load.episodes} episodes had begun within {RAMP_LIMIT_S:g} s; the log is "
                f"{vitals.parent.with_suffix('.log')}"
            )
        _wait(process, 1.0)


def _begun(vitals: Path, since: float) -> int:
    return sum(
        found.delays[DISPATCH].count for found in read_vitals(vitals, since).values() if DISPATCH in found.delays
    )


def _wait(process: subprocess.Popen[bytes], seconds: float) -> None:
    """So long, unless the run ends before: that is an error."""
    try:
        status = process.wait(seconds)
    except subprocess.TimeoutExpired:
        return
    arguments = process.args if isinstance(process.args, list) else []
    directory = next((str(a).removeprefix("run.dir=") for a in arguments if str(a).startswith("run.dir=")), "")
    log = Path(directory).with_suffix(".log")
    tail = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-SHOWN_LOG_LINES:])
    raise ControlPlaneError(f"the run ended with status {status} ({log}):\n{tail}")
