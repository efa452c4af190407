"""The episodes in flight as a closed queueing network over the engines of a split.

A turn's prompt is computed (m engines), its tokens are decoded (n engines), its tool works, and the next turn begins. With a
fixed number of episodes in flight, what counts for a run is how many turns a second go round:

* prefill takes A engine-seconds a turn on m engines, and the nearer that comes to all their time, the longer the queue;
* engines that decode compute prompts too: those that are best computed there, and those that the engines to prefill have no time
  for (`PairChooser` lets about as many queue at one of these as decode at one of the others). What they spend on prompts they
  cannot decode in;
* decoding of c sequences on n engines takes in proportion to ``c / n + c0`` a token (the law of `CostModel.sequence_rate`), and
  an engine decodes at most ``slots``;
* sessions that wait for tools keep their KV on the engines that decode. The share that n engines cannot hold is computed again
  on the next turn, which adds to A.

Work on prompts is counted in *useful* engine-seconds: those that an engine that decodes would need for what it was sent. An
engine to prefill may need more for the same (it computes answers again that others have decoded), or less (it has what
others have lost).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

BUSIEST = 0.999
"""Share of its limit up to which a stage is thought to be loaded: at the limit itself its queue is infinite."""
SATURATED = 0.85
"""Share of their time from which on engines to prefill leave work to others because they have no time for it."""
HALVINGS = 24
"""Of the interval that holds the turns a second: a precision of 1e-7, where gains of some percent count."""
ROUNDS = 3


@dataclass(frozen=True)
class Circulation:
    """What goes round in engines and tools, per unit of the present number of turns a second."""

    prefill_s: float
    """Engine-seconds a turn that the engines to prefill spend on prompts."""
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
    prefillers: int = 1
    """Engines to prefill now."""
    local_s: float = 0.0
    """Engine-seconds a turn that the engines that decode spend on prompts."""
    useful: float = 1.0
    """Useful seconds in each second of an engine to prefill."""
    local_cost: float = 1.0
    """Seconds of decoding that each second of prompts costs an engine that decodes."""
    patience: float = 1.0
    """Requests that queue at one engine to prefill before others take over, over those that decode at one engine."""
    again: float = 0.0
    """Useful engine-seconds a turn that go into contexts which did not fit into the KV."""

    def lost_share(self, decode: int) -> float:
        """Share of the KV that ``decode`` engines cannot hold."""
        return max(0.0, 1.0 - decode * self.kv_capacity / self.kv_wanted) if self.kv_wanted > 0 else 0.0

    def turns(self, prefill: int, decode: int, lost_share: float | None = None) -> float:
        """Turns a second, over the present ones, with so many engines in each role.

        ``lost_share``: take this share of the KV for evicted, not what ``decode`` engines cannot hold.
        """
        lost = self.lost_share(decode) if lost_share is None else lost_share
        prompt_s = self._lasting_s + lost * self.context_s
        if prompt_s <= 0 and self._token_cost <= 0:
            return 1.0
        everybody = self.queued + self.decoding + self.suspended

        def goes_round(turns: float) -> bool:
            in_stages = self._in_stages(turns, prefill, decode, prompt_s)
            return in_stages is not None and in_stages + turns * self.suspended <= everybody

        low, high = 0.0, 1.0
        while goes_round(high) and high < 1e6:
            low, high = high, 2 * high
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            low, high = (middle, high) if goes_round(middle) else (low, middle)
        return low

    @cached_property
    def _lasting_s(self) -> float:
        """Useful engine-seconds of prompts a turn, whoever computes them, without what lost KV costs."""
        return max(0.0, self.useful * self.prefill_s + self.local_s - self.again)

    @cached_property
    def _sent_share(self) -> float:
        """Of the work on prompts, what goes to engines to prefill as long as they have time."""
        work = self.useful * self.prefill_s + self.local_s
        saturated = self.prefill_s >= SATURATED * self.prefillers
        return 1.0 if saturated or work <= 0 else self.useful * self.prefill_s / work

    @cached_property
    def _token_cost(self) -> float:
        """Engine-seconds of decoding a turn, of engines that decode infinitely many sequences."""
        if self.decoding <= 0:
            return 0.0
        per_engine = self.decoding / self.engines
        time = max(0.05 * self.engines, self.engines - self.local_cost * self.local_s)
        return time * per_engine / (per_engine + self.half_concurrency)

    def _longest_queue(self, decoding: float) -> float:
        """Requests at one engine to prefill when others, with so many sequences each, take over what is more."""
        return max(1.0, self.patience * decoding, self.queued / self.prefillers)

    def _in_stages(self, turns: float, prefill: int, decode: int, prompt_s: float) -> float | None:
        """Requests in prefill and decoding when ``turns`` go round; None: more than the engines can do."""
        work, each = turns * prompt_s, self.decoding / self.engines
        queue = load = 0.0
        for _ in range(ROUNDS):  # how much queues depends on how many decode, and they on how much is left to them
            longest = self._longest_queue(each)
            busiest = min(1.0, max(longest / (1.0 + longest), self.prefill_s / self.prefillers))
            sent = min(work * self._sent_share, prefill * self.useful * busiest)
            time = decode - self.local_cost * (work - sent)
            if time <= 0 or turns * self._token_cost > self._limit * time:
                return None
            busy, load = sent / (prefill * self.useful), turns * self._token_cost / time
            queue = min(longest, busy / (1.0 - busy)) if busy < 1.0 else longest
            each = (each + self.half_concurrency * load / (1.0 - load)) / 2
        return prefill * queue + decode * self.half_concurrency * load / (1.0 - load)

    @cached_property
    def _limit(self) -> float:
        """Share of their time that engines which decode can decode."""
        return min(BUSIEST, self.slots / (self.slots + self.half_concurrency)) if math.isfinite(self.slots) else BUSIEST
