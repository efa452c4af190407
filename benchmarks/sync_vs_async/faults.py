"""Kills an engine process every now and then, as suite `fault` asks, and tells how long its replacement took."""

from __future__ import annotations

import logging
import os
import random
import signal
import threading
import time
from pathlib import Path
from typing import Any

import psutil

from experience.accounting import Cause, read_timeline

logger = logging.getLogger(__name__)

ENGINE_PROCESS = "ray::EngineActor"


class EngineKiller:
    """Sends SIGKILL to a random engine process of a run every ``every_s`` wall seconds, once training has begun."""

    def __init__(self, every_s: float, seed: int = 0) -> None:
        self._every_s = every_s
        self._random = random.Random(seed)
        self.killed_at: list[float] = []

    def watch(self, pid: int, directory: Path, ended: threading.Event) -> None:
        """Runs beside the run until ``ended``."""
        metrics = directory / "metrics.jsonl"
        while not _has_steps(metrics):
            if ended.wait(0.5):
                return
        while not ended.wait(self._every_s):
            victim = self._choose(pid)
            if victim is not None:
                logger.info("engine process %d is killed", victim)
                os.kill(victim, signal.SIGKILL)
                self.killed_at.append(time.time())

    def _choose(self, pid: int) -> int | None:
        """An engine process, unless it is the only one: then the last kill is still being repaired."""
        try:
            family = psutil.Process(pid).children(recursive=True)
        except psutil.Error:
            return None
        engines = sorted(process.pid for process in family if _is_engine(process))
        return self._random.choice(engines) if len(engines) > 1 else None

    def report(self, directory: Path, time_scale: float) -> dict[str, Any]:
        """``kills``, and the seconds that engines were out of service for each (wall and modelled): mean and longest."""
        spans = [
            span.ended_at - span.began_at
            for span in read_timeline(directory / "timeline")
            if span.lane.startswith("engine") and span.cause is Cause.FAILURE
        ]
        report: dict[str, Any] = {"kills": len(self.killed_at)}
        if spans:
            report["recovery_wall_s"] = {"mean": sum(spans) / len(spans), "max": max(spans)}
            report["recovery_s"] = sum(spans) / len(spans) * time_scale
        return report


def _has_steps(metrics: Path) -> bool:
    try:
        return metrics.stat().st_size > 0
    except OSError:
        return False


def _is_engine(process: psutil.Process) -> bool:
    try:
        return ENGINE_PROCESS in " ".join(process.cmdline())
    except psutil.Error:
        return False
