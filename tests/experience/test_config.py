from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from omegaconf import OmegaConf

from experience.config import LagControl, OnViolation, QueueConfig, QueueOrder, StalenessConfig


def test_defaults_are_valid() -> None:
    StalenessConfig().validate()
    QueueConfig().validate()


def test_settings_read_from_yaml_become_typed() -> None:
    staleness = OmegaConf.merge(OmegaConf.structured(StalenessConfig), {"on_violation": "drop_group", "target_lag": 2})
    queue = OmegaConf.merge(OmegaConf.structured(QueueConfig), {"order": "windowed", "close_after_s": 3})
    typed_staleness, typed_queue = OmegaConf.to_object(staleness), OmegaConf.to_object(queue)
    assert typed_staleness == StalenessConfig(target_lag=2.0, on_violation=OnViolation.drop_group)
    assert typed_queue == QueueConfig(order=QueueOrder.windowed, close_after_s=3.0)


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [
        ({"target_lag": -0.5}, "staleness.target_lag.*-0.5"),
        ({"target_lag": float("nan")}, "staleness.target_lag"),
        ({"max_lag": -1}, "staleness.max_lag"),
        ({"controller": LagControl.adaptive, "max_lag": 0, "target_lag": 0.0}, "needs staleness.max_lag >= 1"),
        ({"on_violation": OnViolation.wait, "target_lag": 5.0}, "target_lag <= staleness.max_lag, got 5.0 > 4"),
    ],
)
def test_wrong_staleness_settings_are_explained(wrong: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        replace(StalenessConfig(), **wrong).validate()


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [
        ({"window": 0}, "queue.window"),
        ({"budget_mb": 0.0}, "queue.budget_mb"),
        ({"min_size": 0}, "queue.min_size"),
        ({"close_after_s": 0.0}, "queue.close_after_s"),
    ],
)
def test_wrong_queue_settings_are_explained(wrong: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        replace(QueueConfig(), **wrong).validate()
