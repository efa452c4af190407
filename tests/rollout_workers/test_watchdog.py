"""A blocked event loop is noticed from outside of it."""

from __future__ import annotations

import asyncio
import threading

from rollout_workers.watchdog import LoopWatchdog


async def test_a_blocked_loop_is_reported_once_with_the_line_that_blocks_it() -> None:
    reported = threading.Event()
    reports: list[tuple[float, str]] = []

    def blocked(seconds: float, where: str) -> None:
        reports.append((seconds, where))
        reported.set()

    watchdog = LoopWatchdog(0.2, blocked)
    assert reported.wait(10), "nobody noticed that the loop was blocked"  # blocks the loop until somebody does
    watchdog.close()
    ((seconds, where),) = reports
    assert seconds >= 0.2
    assert "test_watchdog.py" in where
    assert "in test_a_blocked_loop" in where


async def test_a_loop_that_waits_is_not_blocked() -> None:
    reports: list[str] = []
    watchdog = LoopWatchdog(5.0, lambda seconds, where: reports.append(where))
    await asyncio.sleep(1.5)
    watchdog.close()
    assert reports == []
