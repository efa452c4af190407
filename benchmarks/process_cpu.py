"""CPU seconds of the processes that this one started, by role, over any part of the time that was watched."""

from __future__ import annotations

import threading
import time
from bisect import bisect_left, bisect_right
from collections import defaultdict
from types import TracebackType

import psutil

INTERVAL_S = 0.25
OTHER = "Ray and command line"


class CpuWatch:
    """Samples all descendants of this process while the ``with`` block runs. Times are Unix time in seconds.

    >>> with CpuWatch() as watch:
    ...     pass
    >>> watch.between(0.0, 1.0)
    {}
    """

    def __init__(self) -> None:
        self._samples: list[tuple[float, dict[str, float]]] = []
        self._roles: dict[int, str] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="cpu-watch", daemon=True)

    def __enter__(self) -> CpuWatch:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join(10.0)

    def between(self, began_at: float, ended_at: float) -> dict[str, float]:
        """CPU seconds by role from ``began_at`` to ``ended_at``, in proportion to what the samples within saw.

        Samples after the end are not used: processes that have ended by then are no longer counted.
        """
        times = [at for at, _ in self._samples]
        first, last = bisect_left(times, began_at), bisect_right(times, ended_at) - 1
        if last <= first:
            return {}
        share = (ended_at - began_at) / (times[last] - times[first])
        before, after = self._samples[first][1], self._samples[last][1]
        used = {role: (seconds - before.get(role, 0.0)) * share for role, seconds in after.items()}
        return {role: seconds for role, seconds in used.items() if seconds > 0}

    def _watch(self) -> None:
        me = psutil.Process()
        while not self._stop.wait(INTERVAL_S):
            seconds: dict[str, float] = defaultdict(float)
            for process in me.children(recursive=True):
                try:
                    times = process.cpu_times()
                    seconds[self._role(process)] += times.user + times.system
                except psutil.Error:
                    continue
            self._samples.append((time.time(), seconds))

    def _role(self, process: psutil.Process) -> str:
        """``LearnerActor`` for the Ray actor of that class; Ray renames a process when its actor is made."""
        known = self._roles.get(process.pid)
        if known is not None:
            return known
        title = " ".join(process.cmdline())
        if not title.startswith("ray::") or title.startswith("ray::IDLE"):
            return OTHER
        role = title.removeprefix("ray::").split(".")[0].split("(")[0].strip()
        self._roles[process.pid] = role
        return role
