"""How far dispatching may run ahead, set during the run by how well the sampled tokens still fit the policy that trains on them.

Two measures of a step, over its trained tokens, with r the current policy's probability over that of the policy that sampled:

- *effective sample size* ``(sum r)^2 / (n sum r^2)``: 1 when the two are one policy, 0.5 when half of the tokens are worth nothing;
- *second moment* ``mean (log r)^2``, which grows with the distance even where r averages out.

Each has a target. What is over its target as a multiple (``strain``) is the larger of the two; small distances go with the square
of the lag or slower, so a lag that is too large by ``strain`` is divided by its square root at most by 2. Below the target the
lag rises by a constant. Pure: no clock, no randomness.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass


@dataclass
class AdaptiveLagConfig:
    """Targets and pace of ``staleness.controller: adaptive``."""

    ess: float = 0.9
    """Effective sample size to stay above."""
    second_moment: float = 0.04
    """Mean squared log-ratio to stay below (the limit that Zheng et al. 2025, arXiv:2510.01161, found to be safe)."""
    raise_by: float = 0.25
    """Versions that the lag rises by when there is room."""
    room: float = 0.7
    """There is room below this share of the target."""
    min_lag: float = 0.0

    def validate(self, max_lag: int) -> None:
        """Raises ``ValueError`` with what is wrong and what would be right."""
        if not 0 < self.ess < 1:
            raise ValueError(f"staleness.adaptive.ess must lie between 0 and 1, got {self.ess}")
        if not self.second_moment > 0:
            raise ValueError(f"staleness.adaptive.second_moment must be > 0, got {self.second_moment}")
        if not self.raise_by > 0:
            raise ValueError(f"staleness.adaptive.raise_by must be > 0 versions, got {self.raise_by}")
        if not 0 < self.room < 1:
            raise ValueError(f"staleness.adaptive.room must lie between 0 and 1, got {self.room}")
        if not 0 <= self.min_lag <= max_lag:
            raise ValueError(
                f"staleness.adaptive.min_lag must lie between 0 and staleness.max_lag={max_lag}, got {self.min_lag}"
            )


class LagController:
    """`observe` the measures of each step; `target_lag` is what dispatching should run ahead by.

    A change shows in the measures only when the groups that it lets start (or holds back) are trained, ``target_lag`` steps later.
    So the controller judges the median of the steps since a change took effect, and changes again only after that.
    """

    def __init__(self, config: AdaptiveLagConfig, target_lag: float, max_lag: int) -> None:
        self._config = config
        self._max = float(max_lag)
        self.target_lag = min(max(target_lag, config.min_lag), self._max)
        self._ignored = 0
        self._strains: deque[float] = deque()

    def observe(self, ess: float, second_moment: float) -> float:
        """The measures of one trained step; returns the target from now on. Steps without trained tokens are not to be told."""
        if self._ignored > 0:
            self._ignored -= 1
            return self.target_lag
        self._strains.append(self.strain(ess, second_moment))
        if len(self._strains) < self._window:
            return self.target_lag
        strain = sorted(self._strains)[len(self._strains) // 2]
        self._strains.clear()
        wanted = self.target_lag
        if strain > 1:
            wanted = self.target_lag / min(2.0, math.sqrt(strain))
        elif strain < self._config.room:
            wanted = self.target_lag + self._config.raise_by
        wanted = min(max(wanted, self._config.min_lag), self._max)
        if wanted != self.target_lag:
            self._ignored = math.ceil(max(wanted, self.target_lag)) + 1
            self.target_lag = wanted
        return self.target_lag

    def strain(self, ess: float, second_moment: float) -> float:
        """The larger of the two measures as a multiple of its target; over 1 is too far."""
        if not (0 < ess <= 1.0 + 1e-6) or not math.isfinite(second_moment):
            return 4.0
        variance, allowed = max(0.0, 1.0 / ess - 1.0), 1.0 / self._config.ess - 1.0
        return max(variance / allowed, second_moment / self._config.second_moment)

    @property
    def _window(self) -> int:
        """Steps that are judged together."""
        return 3
