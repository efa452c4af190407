"""How good is good: the bound that no schedule beats, and how far a run is from it. Pure formulas.

Write w and tau for the accelerator-seconds that rollout and training of one trajectory take with each role alone and
saturated, N for the accelerators and B for the trajectories of a step. Work is conserved, so no schedule makes a step
shorter than ``T* = B (w + tau) / N``. A synchronous system that time-shares the same N accelerators takes
``T_sync = phi B w / N + B tau / N + o`` with phi the rollout's makespan over its ideal ``B w / N``, and o the seconds
of a step spent on changing roles and moving weights. Hence, with ``rho = w / (w + tau)`` and ``sigma = o / T*``,
``T_sync / T* = 1 + rho (phi - 1) + sigma``: the largest gain that any asynchronous system can have.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Calibration:
    """What one trajectory costs, in accelerator-seconds, on ``accelerators`` accelerators."""

    w_s: float
    """Rollout of one trajectory."""
    tau_s: float
    """Training on one trajectory."""
    accelerators: float

    def __post_init__(self) -> None:
        if self.w_s < 0 or self.tau_s < 0 or self.w_s + self.tau_s <= 0:
            raise ValueError(f"w_s and tau_s must be >= 0 and not both 0, got {self.w_s} and {self.tau_s}")
        if self.accelerators <= 0:
            raise ValueError(f"accelerators must be positive, got {self.accelerators}")

    @property
    def rho(self) -> float:
        """Share of the work that is rollout."""
        return self.w_s / (self.w_s + self.tau_s)

    def ideal_step_s(self, trajectories: float) -> float:
        """T*: the shortest step with ``trajectories`` trajectories, in seconds."""
        return trajectories * (self.w_s + self.tau_s) / self.accelerators

    def efficiency(self, step_s: float, trajectories: float) -> float:
        """E = T* / T_step."""
        return efficiency(self.ideal_step_s(trajectories), step_s)

    def makespan_ratio(self, makespan_s: float, trajectories: float) -> float:
        """phi: a rollout of ``trajectories`` on all accelerators that took ``makespan_s``, over its ideal; at least 1."""
        ideal = trajectories * self.w_s / self.accelerators
        return max(1.0, makespan_s / ideal) if ideal > 0 else 1.0

    def overhead_ratio(self, overhead_s: float, trajectories: float) -> float:
        """sigma: seconds of a step spent on changing roles and moving weights, over T*."""
        return overhead_s / self.ideal_step_s(trajectories)

    def synchronous_step_s(self, phi: float, overhead_s: float, trajectories: float) -> float:
        """What the formula says that a synchronous step takes: ``(phi w + tau) B / N + o``."""
        return trajectories * (phi * self.w_s + self.tau_s) / self.accelerators + overhead_s


def ideal_step_s(calibration: Calibration, trajectories: float) -> float:
    """T* = B (w + tau) / N, in seconds."""
    return calibration.ideal_step_s(trajectories)


def efficiency(ideal_s: float, step_s: float) -> float:
    """E = T* / T_step; 0.0 for a step that never ended."""
    return ideal_s / step_s if step_s > 0 else 0.0


def useful_efficiency(e: float, trained_tokens: float, generated_tokens: float) -> float:
    """E times the share of generated tokens that carried loss: masked and wasted tokens count against it."""
    return e * trained_tokens / generated_tokens if generated_tokens > 0 else 0.0


def speedup_bound(rho: float, phi: float, sigma: float) -> float:
    """S_max = 1 + rho (phi - 1) + sigma: the largest gain of any asynchronous system over the synchronous one.

    >>> speedup_bound(rho=0.75, phi=3.0, sigma=0.1)
    2.6
    """
    return 1.0 + rho * (phi - 1.0) + sigma


def split_of(calibration: Calibration, unit: int = 1) -> tuple[int, int]:
    """(rollout, learner) accelerators of an asynchronous run that balance both: rho N and the rest, in whole ``unit``s.

    The split with the shortest step ``max(w / rollout, tau / learner)``; each side gets at least one unit.

    Raises:
        ValueError: There are fewer than two units.
    """
    total = int(calibration.accelerators)
    if unit < 1 or total < 2 * unit:
        raise ValueError(f"{total} accelerators do not make two groups of at least {unit}")
    candidates = range(unit, total - unit + 1, unit)
    rollout = min(candidates, key=lambda n: (max(calibration.w_s / n, calibration.tau_s / (total - n)), n))
    return rollout, total - rollout


def weighted_quantile(histogram: Mapping[int, float], share: float) -> int:
    """The smallest value up to which at least ``share`` (0 to 1) of the weight lies; 0 for an empty histogram.

    >>> weighted_quantile({0: 60, 1: 30, 5: 10}, 0.5), weighted_quantile({0: 60, 1: 30, 5: 10}, 0.99)
    (0, 5)
    """
    total = sum(histogram.values())
    reached = 0.0
    for value in sorted(histogram):
        reached += histogram[value]
        if histogram[value] > 0 and reached >= share * total * (1 - 1e-12):
            return value
    return 0


@dataclass(frozen=True)
class LagStatistics:
    """Lags of trained tokens, in versions."""

    mean: float = 0.0
    p50: int = 0
    p99: int = 0
    largest: int = 0

    @classmethod
    def of(cls, histogram: Mapping[int, float]) -> LagStatistics:
        """From a histogram ``lag -> trained tokens``."""
        total = sum(histogram.values())
        if total <= 0:
            return cls()
        return cls(
            mean=sum(lag * tokens for lag, tokens in histogram.items()) / total,
            p50=weighted_quantile(histogram, 0.5),
            p99=weighted_quantile(histogram, 0.99),
            largest=max(lag for lag, tokens in histogram.items() if tokens > 0),
        )


@dataclass(frozen=True)
class ModeRow:
    """One mode of ``sync-vs-async``, measured or simulated. Shares are 0 to 1, seconds are those of the modelled cluster."""

    mode: str
    step_s: float
    """Mean seconds a step, the first ones (until the pipeline is full) left out."""
    efficiency: float
    """E."""
    useful_efficiency: float
    """E_useful."""
    speedup: float
    """S: the synchronous step over this one."""
    speedup_bound: float
    """S_max, from the synchronous run's phi and sigma."""
    phi: float
    rho: float
    lag: LagStatistics
    waste: float
    """Share of generated tokens in groups that were dropped."""
    masked: float
    """Share of generated tokens that reached a step and carried no loss."""
    ks: float
    """Distance between the lengths of dispatched and of trained episodes."""
    prefix_hit: float
    """Share of prompt tokens found in the KV cache."""
    exposed_sync: float
    """Share of the step that engines stood still for weights."""
    idle: dict[str, float] = field(default_factory=dict)
    """Share of all accelerator-seconds by the cause of standing still."""

    def to_dict(self) -> dict[str, Any]:
        """With the keys of the JSON file."""
        return {
            "mode": self.mode,
            "step_s": self.step_s,
            "E": self.efficiency,
            "E_useful": self.useful_efficiency,
            "S": self.speedup,
            "S_max": self.speedup_bound,
            "phi": self.phi,
            "rho": self.rho,
            "lag_mean": self.lag.mean,
            "lag_p50": self.lag.p50,
            "lag_p99": self.lag.p99,
            "lag_max": self.lag.largest,
            "waste": self.waste,
            "masked": self.masked,
            "ks": self.ks,
            "prefix_hit": self.prefix_hit,
            "exposed_sync": self.exposed_sync,
            "idle": dict(self.idle),
        }


def steady_step_s(ended_at: Sequence[float], began_at: float, skip: int) -> float:
    """Mean seconds a step after the first ``skip`` steps, from the times at which steps ended.

    With too few steps, ``skip`` is lowered so that at least one step counts. Raises ValueError without any step.
    """
    if not ended_at:
        raise ValueError("no step ended: there is no step time to tell")
    first = min(skip, len(ended_at) - 1)
    start = began_at if first == 0 else ended_at[first - 1]
    return (ended_at[-1] - start) / (len(ended_at) - first)
