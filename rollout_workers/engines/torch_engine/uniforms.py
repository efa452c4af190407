"""Random numbers that depend on nothing but (seed, position).

So a token depends neither on the other requests of its batch nor on timing (up to the rounding of its logits), and a
request that goes on elsewhere from its last token goes on as it would have here.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def mix(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The finaliser of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014): a bijection in which each bit affects all."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def uniforms(seeds: npt.NDArray[np.uint64] | np.uint64, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """One number in [0, 1 - 2^-52] for each (seed, position)."""
    counters = mix(np.atleast_1d(seeds) + _GOLDEN) + (positions.astype(np.uint64) + np.uint64(1)) * _GOLDEN
    return (mix(counters) >> np.uint64(12)).astype(np.float64) * 2.0**-52
