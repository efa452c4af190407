"""How far dispatching runs ahead: as the configuration says, or set anew by the measures of each step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from experience.config import LagControl, StalenessConfig
from experience.lag_controller import LagController
from experience.staleness import StalenessPolicy, make_policy


class Pacer:
    """``policy`` is what the dispatcher follows; `trained` may replace it."""

    def __init__(self, staleness: StalenessConfig, groups_per_update: int) -> None:
        self._staleness = staleness
        self._groups_per_update = groups_per_update
        self._controller: LagController | None = None
        if staleness.controller is LagControl.adaptive:
            self._controller = LagController(staleness.adaptive, staleness.target_lag, staleness.max_lag)
            staleness = replace(staleness, target_lag=self._controller.target_lag)
        self.policy: StalenessPolicy = make_policy(staleness, groups_per_update)

    def trained(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Judge the metrics of a trained step; returns the metric that tells what came of it."""
        controller = self._controller
        if controller is None:
            return {}
        if "staleness/ess" in metrics:
            before = controller.target_lag
            after = controller.observe(metrics["staleness/ess"], metrics["staleness/second_moment"])
            if after != before:
                self.policy = make_policy(replace(self._staleness, target_lag=after), self._groups_per_update)
        return {"staleness/target_lag": controller.target_lag}
