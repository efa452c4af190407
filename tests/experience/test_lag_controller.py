from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experience.lag_controller import AdaptiveLagConfig, LagController


class Plant:
    """A run whose distance grows with the lag as ``scale * lag ** power``; a target works ``ceil(lag)`` steps later."""

    def __init__(self, scale: float, power: float, start: float, noise: float = 0.0, seed: int = 0) -> None:
        self.scale, self.power, self.noise = scale, power, noise
        self.rng = np.random.default_rng(seed)
        self.pipeline = [start] * 20

    def step(self, target: float) -> tuple[float, float]:
        """The measures of the next trained step: normal log-ratios with that second moment have this sample size."""
        self.pipeline.append(target)
        lag = self.pipeline[-1 - int(np.ceil(self.pipeline[-1]))]
        moment = self.scale * lag**self.power * float(np.exp(self.noise * self.rng.standard_normal()))
        return float(np.exp(-moment)), moment


def settle(plant: Plant, config: AdaptiveLagConfig, start: float, max_lag: int, steps: int = 400) -> list[float]:
    controller, target, found = LagController(config, start, max_lag), start, []
    for _ in range(steps):
        target = controller.observe(*plant.step(target))
        found.append(target)
    return found


@given(
    st.floats(0.0005, 0.05), st.sampled_from([1.0, 1.5, 2.0]), st.floats(0, 8), st.floats(0, 0.2), st.integers(0, 99)
)
@settings(max_examples=60, deadline=None)
def test_it_settles_where_the_distance_is_about_its_target(
    scale: float, power: float, start: float, noise: float, seed: int
) -> None:
    config = AdaptiveLagConfig()
    best = min(8.0, (config.second_moment / scale) ** (1 / power))
    targets = settle(Plant(scale, power, start, noise, seed), config, start, 8)
    late = float(np.median(targets[200:]))
    assert 0.45 * best <= late <= 1.25 * best + 2 * config.raise_by
    assert all(0 <= target <= 8 for target in targets)


def test_it_never_leaves_its_bounds() -> None:
    config = AdaptiveLagConfig(min_lag=0.5)
    assert settle(Plant(0.0, 1.0, 2.0), config, 2.0, 4)[-1] == 4.0
    assert settle(Plant(50.0, 1.0, 2.0), config, 2.0, 4)[-1] == 0.5
    assert LagController(config, 9.0, 4).target_lag == 4.0


def test_a_change_is_judged_only_after_it_took_effect() -> None:
    controller = LagController(AdaptiveLagConfig(), 4.0, 8)
    seen = [controller.observe(0.5, 0.01) for _ in range(12)]
    assert seen[:2] == [4.0, 4.0]
    assert seen[2] == 2.0
    assert seen[2:10] == [2.0] * 8, "five steps of the old pipeline, then three to judge"
    assert seen[10] == 1.0


def test_one_wild_step_changes_nothing() -> None:
    controller = LagController(AdaptiveLagConfig(), 2.0, 8)
    for measures in [(0.95, 0.03), (0.01, 9.0), (0.95, 0.03)]:
        assert controller.observe(*measures) == 2.0


@pytest.mark.parametrize(("ess", "moment", "strain"), [(1.0, 0.0, 0.0), (0.9, 0.0, 1.0), (1.0, 0.08, 2.0)])
def test_strain_is_the_multiple_of_the_target(ess: float, moment: float, strain: float) -> None:
    assert LagController(AdaptiveLagConfig(), 1.0, 4).strain(ess, moment) == pytest.approx(strain)


@pytest.mark.parametrize(("ess", "moment"), [(float("nan"), 0.0), (1.0, float("inf")), (0.0, 0.0), (1.0, float("nan"))])
def test_measures_that_make_no_sense_are_a_strain(ess: float, moment: float) -> None:
    assert LagController(AdaptiveLagConfig(), 1.0, 4).strain(ess, moment) > 1


@pytest.mark.parametrize(
    ("field", "value"), [("ess", 1.0), ("second_moment", 0.0), ("raise_by", 0.0), ("room", 1.0), ("min_lag", 9.0)]
)
def test_bad_settings_are_named(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"staleness.adaptive.{field}"):
        AdaptiveLagConfig(**{field: value}).validate(max_lag=4)
