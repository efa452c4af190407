"""The simulated clock: actions in order of their time, ties in the order in which they were planned."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable

Action = Callable[[], None]


class SimulationStalled(RuntimeError):
    """Nothing is planned any more, or far too much happened, and the end is not reached; the message says what waits."""


class EventLoop:
    """Time in seconds of the modelled cluster, from 0.

    >>> loop, seen = EventLoop(), []
    >>> loop.after(2.0, lambda: seen.append(loop.now)); loop.after(1.0, lambda: seen.append(loop.now))
    >>> loop.run(lambda: len(seen) == 2); seen
    [1.0, 2.0]
    """

    def __init__(self) -> None:
        self.now = 0.0
        self.events = 0
        """How many actions were carried out."""
        self._heap: list[tuple[float, int, Action]] = []
        self._order = itertools.count()

    def at(self, time: float, action: Action) -> None:
        """Carry ``action`` out at ``time`` (in the past: now, after what is planned for now)."""
        heapq.heappush(self._heap, (max(time, self.now), next(self._order), action))

    def after(self, seconds: float, action: Action) -> None:
        """Carry ``action`` out after ``seconds``."""
        self.at(self.now + seconds, action)

    def run(self, ended: Callable[[], bool], waits_for: Callable[[], str] = str, most_events: int = 10**10) -> None:
        """Until ``ended()``. Raises SimulationStalled with ``waits_for()`` when nothing is left to happen before that."""
        heap = self._heap
        while not ended():
            if not heap:
                raise SimulationStalled(f"nothing is left to happen after {self.now:.1f} s; {waits_for()}")
            if self.events >= most_events:
                raise SimulationStalled(f"{most_events} events and no end at {self.now:.1f} s; {waits_for()}")
            self.now, _, action = heapq.heappop(heap)
            self.events += 1
            action()
