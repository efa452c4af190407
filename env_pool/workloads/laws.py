"""The distributions that workloads are drawn from, with their closed forms."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

_NORMAL = NormalDist()


@dataclass(frozen=True)
class LogNormal:
    """exp(N(mu, sigma)), cut off at ``cap``: what would be larger is ``cap``.

    >>> turns = LogNormal.with_median(35, 0.5, cap=100)
    >>> round(turns.quantile(0.5)), turns.quantile(0.9999)
    (35, 100)
    """

    mu: float
    sigma: float
    cap: float = math.inf

    @classmethod
    def with_mean(cls, mean: float, sigma: float, cap: float = math.inf) -> LogNormal:
        """The law whose mean is ``mean`` before it is cut: mu = ln(mean) - sigma^2 / 2."""
        return cls(math.log(mean) - sigma**2 / 2, sigma, cap)

    @classmethod
    def with_median(cls, median: float, sigma: float, cap: float = math.inf) -> LogNormal:
        """The law with this median: mu = ln(median)."""
        return cls(math.log(median), sigma, cap)

    def sample(self, generator: np.random.Generator, count: int) -> npt.NDArray[np.float64]:
        """``count`` independent draws."""
        return np.minimum(np.exp(generator.normal(self.mu, self.sigma, count)), self.cap)

    def quantile(self, share: float) -> float:
        """The value that a draw does not exceed with probability ``share``."""
        return min(math.exp(self.mu + self.sigma * _NORMAL.inv_cdf(share)), self.cap)

    def mean(self) -> float:
        """Mean after the cut: exp(mu + s^2/2) Phi((ln c - mu - s^2)/s) + c (1 - Phi((ln c - mu)/s)).

        (The limited expected value of the log-normal distribution; Klugman, Panjer and Willmot, Loss Models, appendix A.)
        """
        whole = math.exp(self.mu + self.sigma**2 / 2)
        if math.isinf(self.cap):
            return whole
        at = (math.log(self.cap) - self.mu) / self.sigma
        return whole * _NORMAL.cdf(at - self.sigma) + self.cap * (1 - _NORMAL.cdf(at))
