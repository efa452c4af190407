"""What is generated: seeded lengths and prompts; and when each token came."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Prompt = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Workload:
    """``requests`` requests at once; numbers of new tokens and of prompt tokens are uniform in their ranges."""

    name: str
    requests: int
    new_tokens: tuple[int, int]
    prompt_tokens: tuple[int, int]

    def lengths(self, seed: int) -> list[int]:
        rng = np.random.default_rng(seed)
        return [int(length) for length in rng.integers(*self.new_tokens, self.requests, endpoint=True)]

    def prompts(self, seed: int, vocabulary: int) -> list[Prompt]:
        rng = np.random.default_rng([seed, 1])
        sizes = rng.integers(*self.prompt_tokens, self.requests, endpoint=True)
        return [rng.integers(0, vocabulary, size).astype(np.int32) for size in sizes]


WORKLOADS = (
    Workload("uniform 32 x 64", 32, (64, 64), (20, 20)),
    Workload("uniform 128 x 32", 128, (32, 32), (20, 20)),
    Workload("ragged 32 x 8-128", 32, (8, 128), (20, 20)),
    Workload("ragged 128 x 8-128", 128, (8, 128), (20, 20)),
    Workload("ragged 32 x 8-128, prompts 8-32", 32, (8, 128), (8, 32)),
    Workload("ragged 128 x 8-128, prompts 8-32", 128, (8, 128), (8, 32)),
)


class Arrivals:
    """When the tokens of each request reached the caller, in seconds after all requests were submitted together."""

    def __init__(self, lengths: list[int]) -> None:
        self._lengths = lengths
        self._times: list[list[float]] = [[] for _ in lengths]

    def stamp(self, request: int, total: int, seconds: float) -> None:
        """``total`` tokens of the request are there; those beyond its length (a padded batch goes on) do not count."""
        times = self._times[request]
        times.extend([seconds] * (min(total, self._lengths[request]) - len(times)))

    def counts(self) -> list[int]:
        """Tokens of each request so far."""
        return [len(times) for times in self._times]

    def first_s(self) -> list[float]:
        """Seconds to the first token, of each request."""
        return [times[0] for times in self._times if times]

    def gaps_s(self) -> list[float]:
        """Seconds between a token and the one before it; 0 where both arrived together."""
        return [float(gap) for times in self._times for gap in np.diff(times)]


def percentiles_ms(seconds: list[float]) -> dict[str, float]:
    """The median and the 99th percentile in milliseconds; none of an empty list."""
    if not seconds:
        return {}
    p50, p99 = np.percentile(np.asarray(seconds) * 1000, [50, 99])
    return {"p50": round(float(p50), 3), "p99": round(float(p99), 3)}
