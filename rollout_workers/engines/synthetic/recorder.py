"""What a request feels of modelled accelerators: seconds to the first token and between tokens, and how full the KV is."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field, fields

from rollout_workers.engines.synthetic.kv_cache import KvCache

LEAST_S = 1e-5
GROWTH = 1.02
"""Each bin of a histogram is so much wider than the one before: what is read from it is off by at most 1 %."""
BINS = 1400
"""Up to 1e7 seconds."""


class Histogram:
    """Weighted durations in bins of equal ratio.

    >>> histogram = Histogram()
    >>> histogram.add(1.0, 99); histogram.add(10.0, 1)
    >>> round(histogram.quantile(0.5), 1), round(histogram.mean, 2)
    (1.0, 1.09)
    """

    def __init__(self) -> None:
        self._bins = [0.0] * BINS
        self.count = 0.0
        self.total_s = 0.0

    def add(self, seconds: float, weight: float = 1.0) -> None:
        """``weight`` durations of ``seconds``."""
        place = int(math.log(max(seconds, LEAST_S) / LEAST_S) / math.log(GROWTH))
        self._bins[min(place, BINS - 1)] += weight
        self.count += weight
        self.total_s += seconds * weight

    @property
    def mean(self) -> float:
        """0 of an empty one."""
        return self.total_s / self.count if self.count > 0 else 0.0

    def quantile(self, share: float) -> float:
        """The duration that ``share`` of all do not exceed, to 1 %; 0 of an empty histogram."""
        reached, wanted = 0.0, share * self.count
        for place, weight in enumerate(self._bins):
            reached += weight
            if weight > 0 and reached >= wanted * (1 - 1e-12):
                return float(LEAST_S * GROWTH ** (place + 0.5))
        return 0.0

    def since(self, earlier: Histogram) -> Histogram:
        """What was added since ``earlier``, a copy of this one made then."""
        less = Histogram()
        less._bins = [now - before for now, before in zip(self._bins, earlier._bins, strict=True)]
        less.count, less.total_s = self.count - earlier.count, self.total_s - earlier.total_s
        return less


@dataclass
class Use:
    """How much the accelerators that report here did and held; KV in token-seconds."""

    seconds: float = 0.0
    """Accelerator-seconds."""
    busy_s: float = 0.0
    """Those of them in which prompts or tokens were made."""
    sequence_s: float = 0.0
    """Seconds of decoding sequences."""
    kv_capacity: float = 0.0
    kv_running: float = 0.0
    """Reserved by requests."""
    kv_suspended: float = 0.0
    """Of sessions between two turns."""
    evicted_tokens: float = 0.0
    """KV of such sessions that made room."""

    def add(self, elapsed: float, working: bool, decoding: int, kv: KvCache) -> None:
        """An accelerator has spent ``elapsed`` seconds so."""
        self.seconds += elapsed
        self.busy_s += elapsed if working else 0.0
        self.sequence_s += elapsed * decoding
        self.kv_capacity += elapsed * kv.capacity
        self.kv_running += elapsed * kv.reserved_tokens
        self.kv_suspended += elapsed * kv.idle_tokens

    def since(self, earlier: Use) -> Use:
        """What was added since ``earlier``."""
        return Use(*(getattr(self, each.name) - getattr(earlier, each.name) for each in fields(Use)))


@dataclass
class Recorder:
    """One for all accelerators that do the same."""

    first_token: Histogram = field(default_factory=Histogram)
    """From the request to its first token."""
    inter_token: Histogram = field(default_factory=Histogram)
    """From one token of a sequence to its next one."""
    use: Use = field(default_factory=Use)

    def with_own_use(self) -> Recorder:
        """Another one that keeps the same times, and a use of its own."""
        return Recorder(self.first_token, self.inter_token, Use())

    def copy(self) -> Recorder:
        """As it stands now."""
        return copy.deepcopy(self)

    def since(self, earlier: Recorder) -> Recorder:
        """What was added since ``earlier``, a copy of this one made then."""
        return Recorder(
            self.first_token.since(earlier.first_token),
            self.inter_token.since(earlier.inter_token),
            self.use.since(earlier.use),
        )


class TokenClock:
    """The running sequences of one accelerator advance together; this turns their progress into times between tokens."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder
        self._waited = 0.0
        self._progress = 0.0
        self._sequences = 0
        """Those that have waited all the time since the last token."""

    def passed(self, elapsed: float, rate: float, running: int) -> None:
        """For ``elapsed`` seconds ``running`` sequences made ``rate`` tokens a second each (0: they stood still)."""
        if running == 0:
            self._waited = self._progress = 0.0
            self._sequences = 0
            return
        self._sequences = min(self._sequences, running) if self._waited > 0 else running
        needed = (1.0 - self._progress) / rate if rate > 0 else math.inf
        if elapsed < needed:
            self._waited += elapsed
            self._progress += elapsed * rate
            return
        self.recorder.inter_token.add(self._waited + needed, self._sequences)
        left = elapsed - needed
        whole = int(left * rate)
        if whole:
            self.recorder.inter_token.add(1.0 / rate, running * whole)
        self._waited = max(0.0, left - whole / rate)
        self._progress = self._waited * rate
        self._sequences = running
