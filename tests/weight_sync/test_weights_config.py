from __future__ import annotations

import pytest

from weight_sync.config import WeightsConfig


def test_defaults_are_valid() -> None:
    config = WeightsConfig()
    config.validate()
    assert (config.transport, config.every, config.kv, config.rolling) == ("auto", 1, "auto", True)


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("transport", "pigeon", "unknown"),
        ("dtype", "int4", "weights.dtype='int4' is unknown"),
        ("delta_snapshot_every", 0, "weights.delta_snapshot_every=0 must be at least 1"),
        ("kv", "maybe", "weights.kv='maybe'"),
        ("every", 0, "weights.every=0"),
        ("bucket_mb", 0.0, "weights.bucket_mb"),
        ("timeout_s", -1.0, "weights.timeout_s"),
    ],
)
def test_bad_settings_are_named(setting: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WeightsConfig(**{setting: value}).validate()  # type: ignore[arg-type]
