"""One ``millrace train`` in a process of its own, with the CPU seconds of all that it starts."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

SAMPLE_S = 1.0
STOP_GRACE_S = 10.0
SHOWN_LOG_LINES = 15


class BenchError(Exception):
    """A run that failed or left nothing usable; the message says which and why."""


@dataclass(frozen=True)
class CpuSample:
    """At Unix time ``at``: CPU seconds that the run's processes had used, and those of the whole machine's cores."""

    at: float
    run_s: float
    machine_s: float


@dataclass(frozen=True)
class FinishedRun:
    """What is left of a run: its directory, how long its command took (seconds) and how busy the cores were."""

    directory: Path
    wall_s: float
    summary: dict[str, Any]
    samples: list[CpuSample]

    def cpu_share(self, began_at: float, ended_at: float) -> tuple[float, float]:
        """Shares of all cores' time (0 to 1) between two Unix times: the run's own, and the whole machine's.

        Samples are a second apart; an interval with fewer than two of them counts as the whole run.
        """
        inside = [sample for sample in self.samples if began_at <= sample.at <= ended_at]
        if len(inside) < 2:
            inside = self.samples
        if len(inside) < 2 or inside[-1].at <= inside[0].at:
            return 0.0, 0.0
        first, last = inside[0], inside[-1]
        available = (last.at - first.at) * (os.cpu_count() or 1)
        return (last.run_s - first.run_s) / available, (last.machine_s - first.machine_s) / available


class CpuMeter:
    """Samples the CPU time of a process and all its descendants, those that have ended included."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._seconds: dict[tuple[int, float], float] = {}
        self.samples: list[CpuSample] = []

    def sample(self) -> None:
        for process in self._family():
            try:
                times = process.cpu_times()
                self._seconds[process.pid, process.create_time()] = times.user + times.system
            except psutil.Error:
                continue
        machine = psutil.cpu_times()
        busy = sum(machine) - machine.idle - getattr(machine, "iowait", 0.0)
        self.samples.append(CpuSample(time.time(), sum(self._seconds.values()), busy))

    def _family(self) -> list[psutil.Process]:
        try:
            parent = psutil.Process(self._pid)
            return [parent, *parent.children(recursive=True)]
        except psutil.Error:
            return []


Beside = Callable[[int, Path, threading.Event], None]
"""Runs on a thread beside a run: its process id, its directory, and an event that is set when it has ended."""


def train(
    config: str, overrides: Sequence[str], directory: Path, timeout_s: float, beside: Beside | None = None
) -> FinishedRun:
    """``millrace train`` in a process group of its own, which a time-out ends as a whole.

    Raises:
        BenchError: It failed, with the end of its output, or did not end within ``timeout_s`` seconds.
    """
    log = directory.with_suffix(".log")
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "orchestrator.cli", "train", config]
    command += [*overrides, f"run.dir={directory}", "run.overwrite=true"]
    began_at = time.monotonic()
    with log.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
    meter, ended = CpuMeter(process.pid), threading.Event()
    helper = threading.Thread(target=beside, args=(process.pid, directory, ended)) if beside is not None else None
    if helper is not None:
        helper.start()
    try:
        code = _watch(process, meter, began_at + timeout_s)
    except TimeoutError:
        _end(process)
        raise BenchError(f"{directory.name} did not end within {timeout_s:.0f} s; its output is in {log}") from None
    except BaseException:
        _end(process)
        raise
    finally:
        ended.set()
        if helper is not None:
            helper.join(STOP_GRACE_S)
    if code != 0:
        tail = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-SHOWN_LOG_LINES:])
        raise BenchError(f"{directory.name} ended with status {code} ({log}):\n{tail}")
    return FinishedRun(directory, time.monotonic() - began_at, read_summary(directory), meter.samples)


def _watch(process: subprocess.Popen[bytes], meter: CpuMeter, deadline: float) -> int:
    while True:
        meter.sample()
        if time.monotonic() >= deadline:
            raise TimeoutError
        try:
            return process.wait(SAMPLE_S)
        except subprocess.TimeoutExpired:
            continue


def _end(process: subprocess.Popen[bytes]) -> None:
    os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(STOP_GRACE_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(STOP_GRACE_S)


def read_summary(directory: Path) -> dict[str, Any]:
    """The summary of a finished run. Raises BenchError naming the file and what is wrong with it."""
    path = directory / "summary.json"
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BenchError(f"{path} does not exist: the run did not come to its end") from None
    except ValueError as error:
        raise BenchError(f"{path} is not valid JSON ({error})") from error
    if not isinstance(summary, dict) or summary.get("status") != "finished":
        status = summary.get("status") if isinstance(summary, dict) else summary
        raise BenchError(f"{path}: status is {status!r}, not 'finished'")
    return summary
