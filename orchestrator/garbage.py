"""When Python looks for cyclic garbage among long-lived objects: seldom, because it holds up the event loop.

A worker with 10,000 episodes keeps some millions of objects; a full collection walks over all of them, 0.7 s of CPU time,
and by default comes every few seconds while episodes begin. Nearly everything is freed by reference counts anyway.
"""

from __future__ import annotations

import gc

FULL_EVERY_S = 600.0
YOUNG = (2000, 10)
"""Net allocations between collections of the youngest generation, and how many of those make one of the middle one."""
NEVER = 1 << 30


class RareCollections:
    """Takes over the full collections of this process: one every ``FULL_EVERY_S`` seconds, when `tick` is called."""

    def __init__(self, now: float) -> None:
        self._collected_at = now
        gc.set_threshold(*YOUNG, NEVER)

    def tick(self, now: float) -> bool:
        """Collect if it is time; says whether it was."""
        if now - self._collected_at < FULL_EVERY_S:
            return False
        self._collected_at = now
        gc.collect()
        return True
