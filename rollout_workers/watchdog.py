"""Notices that an event loop stands still: code that blocks in an `async def` stops every episode of its worker."""

from __future__ import annotations

import asyncio
import sys
import sysconfig
import threading
import time
import traceback
from collections.abc import Callable

TICK_S = 1.0
LIBRARIES = (sysconfig.get_path("stdlib"), sysconfig.get_path("purelib"))
"""Code below these folders only does what somebody's code asked for."""


class LoopWatchdog:
    """Calls ``blocked(seconds, where)`` from a thread of its own, once, when the running loop has stood still for ``limit_s``.

    ``where`` names the innermost lines, libraries left out, that the loop's thread is executing.
    """

    def __init__(self, limit_s: float, blocked: Callable[[float, str], None]) -> None:
        self._limit_s = limit_s
        self._blocked = blocked
        self._loop = asyncio.get_running_loop()
        self._thread_id = threading.get_ident()
        self._ticked_at = time.monotonic()
        self._ended = threading.Event()
        self._tick()
        threading.Thread(target=self._watch, name="loop-watchdog", daemon=True).start()

    def close(self) -> None:
        self._ended.set()

    def _tick(self) -> None:
        self._ticked_at = time.monotonic()
        if not self._ended.is_set():
            self._loop.call_later(TICK_S, self._tick)

    def _watch(self) -> None:
        while not self._ended.wait(min(TICK_S, self._limit_s / 4)):
            still = time.monotonic() - self._ticked_at
            if still >= self._limit_s:
                self._blocked(still, self._where())
                return

    def _where(self) -> str:
        frames = list(reversed(traceback.extract_stack(sys._current_frames().get(self._thread_id))))
        own = [frame for frame in frames if not frame.filename.startswith(LIBRARIES)] or frames
        return "; ".join(f"{frame.filename}:{frame.lineno} in {frame.name}: {frame.line}" for frame in own[:2])
