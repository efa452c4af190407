"""The episodes in flight as a closed queueing network over the engines of a split.

A turn's prompt is computed (m engines), its tokens are decoded (n engines), its tool works, and the next turn begins. With a
fixed number of episodes in flight, what counts for a run is how many turns a second go round:

* prefill takes A engine-seconds a turn on m engines, so at most m / A turns, and the nearer to that the longer the queue;
* decoding of c sequences on n engines takes in proportion to ``c / n + c0`` a token (the law of `CostModel.sequence_rate`), and
  an engine decodes at most ``slots``;
* sessions that wait for tools keep their KV on the engines that decode. The share that n engines cannot hold is computed again
  on the next turn, which adds to A.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

BUSIEST = 0.999
"""Share of its limit up to which a stage is thought to be loaded: at the limit itself its queue is infinite."""
HALVINGS = 60


@dataclass(frozen=True)
class Circulation:
    """What goes round in engines and tools, per unit of the present number of turns a second."""

    prefill_s: float
    """Engine-seconds of prefill a turn, without what evicted KV costs."""
    queued: float
    """Requests in the prefill stage."""
    decoding: float
    """Sequences that decode."""
    suspended: float
    """Sessions in their tools."""
    engines: int
    """That decode now."""
    half_concurrency: float
    slots: float
    """Of one engine that decodes."""
    kv_wanted: float
    """KV of all sessions, evicted or not."""
    kv_capacity: float
    """Of one engine that decodes."""
    context_s: float
    """Engine-seconds to compute the mean context of a session."""

    def lost_share(self, decode: int) -> float:
        """Share of the KV that ``decode`` engines cannot hold."""
        return max(0.0, 1.0 - decode * self.kv_capacity / self.kv_wanted) if self.kv_wanted > 0 else 0.0

    def turns(self, prefill: int, decode: int, lost_share: float | None = None) -> float:
        """Turns a second, over the present ones, with so many engines in each role.

        ``lost_share``: take this share of the KV for evicted, not what ``decode`` engines cannot hold.
        """
        lost = self.lost_share(decode) if lost_share is None else lost_share
        prompt_s = self.prefill_s + lost * self.context_s
        per_engine = self.decoding / self.engines
        token_cost = self.decoding / (per_engine + self.half_concurrency) if self.decoding > 0 else 0.0
        most = [prefill / prompt_s] if prompt_s > 0 else []
        if token_cost > 0:
            most.append(decode / token_cost)
            if math.isfinite(self.slots):
                most.append(decode * self.slots / (token_cost * (self.slots + self.half_concurrency)))
        if not most:
            return 1.0
        everybody = self.queued + self.decoding + self.suspended

        def in_flight(turns: float) -> float:
            waits = prompt_s / (1.0 - turns * prompt_s / prefill)
            decodes = token_cost * self.half_concurrency / (1.0 - token_cost * turns / decode)
            return turns * (self.suspended + waits + decodes)

        low, high = 0.0, min(most) * BUSIEST
        if in_flight(high) <= everybody:
            return high
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            low, high = (middle, high) if in_flight(middle) <= everybody else (low, middle)
        return low
