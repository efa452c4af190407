"""Risk-averse advantages over a step: low outcomes count more, outcomes that are good enough count nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]


def mixed_value_at_risk(scores: FloatArray, low: float, high: float, weight: float) -> FloatArray:
    """What each score adds to the gradient of ``(1 + weight) int_0^low F^-1 + int_low^high F^-1``, float64 [n].

    ``F^-1`` is the quantile function of the scores. Since the gradient of ``int_0^a F^-1`` is
    ``E[min(R - F^-1(a), 0) grad log pi]``, the sum is ``weight min(R - F^-1(low), 0) + min(R - F^-1(high), 0)``: never
    positive, steeper below the ``low`` quantile, 0 above the ``high`` one.

    Ren et al. 2025, "RiskPO", arXiv:2510.00911 (mixed value at risk; ``low`` 0.2 and ``high`` 0.8 there).
    """
    at_low, at_high = np.quantile(scores, [low, high], method="inverted_cdf")
    result: FloatArray = weight * np.minimum(scores - at_low, 0.0) + np.minimum(scores - at_high, 0.0)
    return result


def bundled_advantages(
    groups: Sequence[Mapping[str, float]], size: int, low: float, high: float, weight: float
) -> list[dict[str, float]]:
    """Advantages of all episodes of a step, group by group, from their rewards by ``episode_id``.

    ``size`` groups that follow each other make up a set of bundles: bundle j holds the j-th episode of each of them that has so
    many, its score is the mean of their rewards, and its advantage that of every member: so few distinct rewards turn
    into a graded score. The quantiles are those of all bundles of the step; the mean over the bundles is then taken off,
    as a baseline. Ren et al. 2025, "RiskPO", bundling.
    """
    bundles: list[list[tuple[int, str]]] = []
    for start in range(0, len(groups), size):
        members = [(index, list(groups[index])) for index in range(start, min(start + size, len(groups)))]
        longest = max(len(episodes) for _, episodes in members)
        for place in range(longest):
            bundles.append([(index, episodes[place]) for index, episodes in members if place < len(episodes)])
    result: list[dict[str, float]] = [{} for _ in groups]
    if not bundles:
        return result
    scores = np.array([np.mean([groups[index][episode] for index, episode in bundle]) for bundle in bundles])
    found = mixed_value_at_risk(scores, low, high, weight)
    for bundle, advantage in zip(bundles, found - found.mean(), strict=True):
        for index, episode in bundle:
            result[index][episode] = float(advantage)
    return result
