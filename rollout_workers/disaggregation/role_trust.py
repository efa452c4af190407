"""How far promises of flips are believed: what the last flip brought, and which ones were taken back. Pure; time is an argument."""

from __future__ import annotations

import math

from rollout_workers.engines.protocol import EngineRole

MISTRUST = 2.0
"""So many times what it brought must be promised to take a flip back, and so many times what was promised and did not come to
make it again."""
FORGIVEN_WINDOWS = 240.0
"""In so many windows half of that is forgotten."""
MOST_REVERSALS = 5
"""To take back a flip that took one back, loads must be averaged twice as long as for that: at most 2 to this power windows."""


class FlipTrust:
    """Told of every flip; asked before one whether what it promises is enough. A gain is a share of further turns a second."""

    def __init__(self, gain: float, window_s: float) -> None:
        self._gain, self._window_s = gain, window_s
        self._towards: EngineRole | None = None
        """What the last flip made of an engine."""
        self._at = -math.inf
        self._promise = 0.0
        self._before = 0.0
        """Turns a second before the last flip."""
        self._brought: float | None = None
        """Share of further turns a second after it, as measured when that first mattered."""
        self._broken: dict[EngineRole, tuple[float, float]] = {}
        """What a flip to a role must promise since one to it was taken back, and since when."""
        self._reversals = 0
        """Flips in a row of which each took back the one before."""

    def least_gain(self, to: EngineRole, now: float) -> float:
        """What a flip to this role must promise."""
        least, at = self._broken.get(to, (0.0, now))
        return max(self._gain, least * self._remembered(at, now))

    def allows(self, to: EngineRole, promise: float, turns: float, averaged_s: float, now: float) -> bool:
        """Whether to make a flip for this promise; ``turns`` a second go round now, by loads averaged over ``averaged_s``."""
        if promise < self.least_gain(to, now):
            return False
        if self._towards is None or to is self._towards:
            return True
        if self._brought is None:
            self._brought = turns / self._before - 1.0 if self._before > 0 else 0.0
        brought = min(self._promise, self._brought) * self._remembered(self._at, now)
        return promise >= MISTRUST * brought and averaged_s >= self._window_s * 2**self._reversals

    def flipped(self, to: EngineRole, promise: float, turns: float, now: float) -> None:
        """An engine was given this role for that promise while ``turns`` a second went round."""
        last = self._towards
        back = last is not None and to is not last
        if last is not None and back and (self._brought or 0.0) < self._promise / 2:
            self._broken[last] = (MISTRUST * max(self._promise, self.least_gain(last, now)), now)
        self._reversals = min(MOST_REVERSALS, self._reversals + 1) if back else 0
        self._towards, self._at, self._promise, self._before, self._brought = to, now, promise, turns, None

    def _remembered(self, at: float, now: float) -> float:
        return float(0.5 ** ((now - at) / (FORGIVEN_WINDOWS * self._window_s)))
