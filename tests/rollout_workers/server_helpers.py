"""Waiting for what other processes do."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from rollout_workers.engines.servers.process import log_tail


async def until(condition: Callable[[], object], what: str, within_s: float = 20.0) -> None:
    """Wait for something that nothing announces."""
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {within_s:g} s for {what}"
        await asyncio.sleep(0.01)


def lines_of(log: Path, count: int, within_s: float = 20.0) -> list[str]:
    """The log's lines once there are ``count``."""
    deadline = time.monotonic() + within_s
    while len(lines := log_tail(log, 100)) < count:
        assert time.monotonic() < deadline, f"{log} holds {lines}, and not {count} lines"
        time.sleep(0.02)
    return lines


def all_gone(pids: list[int], within_s: float) -> bool:
    """Whether these processes end in time."""
    deadline = time.monotonic() + within_s
    while any(_lives(pid) for pid in pids):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def _lives(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
