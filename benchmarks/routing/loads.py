"""How evenly engines are loaded, over windows of time."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

MEASURES = ("sessions", "requests", "tokens")
WINDOW_S = 60.0


@dataclass
class Imbalance:
    """Load of the most loaded engine divided by the mean, for one measure of load."""

    moment: float
    """At one moment, on average over the moments looked at."""
    minute: float
    """Averaged over a minute, on average over the minutes."""
    ten_minutes: float
    whole: float
    """Averaged over the whole time."""


class Loads:
    """Sessions, requests in flight and resident tokens of each engine, integrated over time. Time is an argument."""

    def __init__(self, engines: int, now: float) -> None:
        self.now = np.zeros((len(MEASURES), engines))
        """The present values, ``[measure, engine]``."""
        self._since = np.full(engines, now)
        self._integral = np.zeros((len(MEASURES), engines))
        self.window_ends = now + WINDOW_S
        self.averages: list[npt.NDArray[np.float64]] = []
        """Of each window that has ended, ``[measure, engine]``."""
        self.moments: list[npt.NDArray[np.float64]] = []
        """The values at the end of each window."""

    def change(self, engine: int, now: float, sessions: int = 0, requests: int = 0, tokens: int = 0) -> None:
        """Add to an engine's present values."""
        self._integral[:, engine] += self.now[:, engine] * (now - self._since[engine])
        self._since[engine] = now
        self.now[:, engine] += (sessions, requests, tokens)

    def pass_to(self, now: float) -> None:
        """Close the windows that end before ``now``."""
        while self.window_ends <= now:
            end = self.window_ends
            self._integral += self.now * (end - self._since)
            self._since[:] = end
            self.averages.append(self._integral / WINDOW_S)
            self.moments.append(self.now.copy())
            self._integral[:] = 0
            self.window_ends = end + WINDOW_S

    def restart(self) -> None:
        """Forget the windows so far (the warm-up)."""
        self.averages.clear()
        self.moments.clear()

    def imbalance(self) -> dict[str, Imbalance]:
        """By measure. Raises ValueError before ten minutes have passed."""
        if len(self.averages) < 10:
            raise ValueError(f"{len(self.averages)} windows of {WINDOW_S:g} s: loads are compared over ten, at least")
        minutes = np.stack(self.averages)
        tens = minutes[: len(minutes) // 10 * 10].reshape(-1, 10, *minutes.shape[1:]).mean(1)
        found = [
            _most(np.stack(self.moments)),
            _most(minutes),
            _most(tens),
            _most(minutes.mean(0, keepdims=True)),
        ]
        return {measure: Imbalance(*(float(each[place]) for each in found)) for place, measure in enumerate(MEASURES)}


def _most(loads_WME: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Largest over mean of the engines, averaged over W windows; one figure for each of M measures."""
    mean_WM = np.maximum(loads_WME.mean(-1), 1e-12)
    ratio: npt.NDArray[np.float64] = (loads_WME.max(-1) / mean_WM).mean(0)
    return ratio
