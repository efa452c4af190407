"""The plan says where the lag settles and what fits, before a run starts."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from orchestrator.config import ConfigError, load
from orchestrator.plan import ModelShape, Plan, make_plan, model_shape, render


def planned(*overrides: str) -> Plan:
    return make_plan(load(["quickstart"], ["run.dir=absent", *overrides]))


def write_model(directory: Path, **values: object) -> Path:
    shape = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 128}
    (directory / "config.json").write_text(json.dumps({**shape, **values}))
    (directory / "model.safetensors").write_bytes(b"x" * 1000)
    return directory


def text(plan: Plan, width: int = 80) -> str:
    console = Console(width=width, file=io.StringIO(), record=True)
    console.print(render(plan))
    return console.export_text()


def test_little_s_law() -> None:
    plan = planned("rollout.groups_per_update=16", "staleness.target_lag=1.5", "rollout.concurrency=1000")
    assert plan.groups_allowed == 40
    assert plan.groups_in_flight == 40
    assert plan.mean_lag == 1.5
    assert plan.largest_lag == 2


def test_concurrency_bounds_what_is_in_flight() -> None:
    assert planned("rollout.concurrency=64", "rollout.group_size=8").groups_in_flight == 8


def test_sync_is_on_policy() -> None:
    plan = planned("mode=sync")
    assert (plan.mean_lag, plan.largest_lag, plan.groups_allowed) == (0.0, 0, 16)


def test_memory_from_the_model_s_own_config(tmp_path: Path) -> None:
    write_model(tmp_path, head_dim=32)
    assert model_shape(tmp_path) == ModelShape(layers=2, kv_heads=2, head_dim=32, weight_bytes=1000)
    plan = planned(f"model.path={tmp_path}", "engines.slots=10", "engines.max_len=200", "engines.replicas=2")
    assert plan.kv_bytes == 2 * (2 * 2 * 32) * 4 * 10 * 200 * 2
    assert plan.weight_bytes == 1000


def test_half_precision_halves_the_cache(tmp_path: Path) -> None:
    write_model(tmp_path)
    full, half = (planned(f"model.path={tmp_path}", f"engines.dtype={d}").kv_bytes for d in ("float32", "bfloat16"))
    assert full is not None
    assert half is not None
    assert full == 2 * half


def test_missing_head_settings_follow_the_hugging_face_defaults(tmp_path: Path) -> None:
    write_model(tmp_path, num_key_value_heads=None)
    shape = model_shape(tmp_path)
    assert shape is not None
    assert (shape.kv_heads, shape.head_dim) == (4, 32)


def test_model_not_made_yet_is_said() -> None:
    plan = planned()
    assert plan.kv_bytes is None
    assert "known once the recipe has made the model" in text(plan)


def test_model_path_without_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json does not exist"):
        planned(f"model.path={tmp_path}")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="has no 'num_attention_heads'"):
        planned(f"model.path={tmp_path}")


def test_the_quickstart_needs_no_warning() -> None:
    assert planned().warnings == []


@pytest.mark.parametrize(
    ("overrides", "word"),
    [
        (["rollout.concurrency=64"], "in 2 waves"),
        (["rollout.concurrency=4096", "engines.slots=4096"], "never reached"),
        (["engines.slots=16"], "engines.slots"),
        (["staleness.target_lag=6"], "will be masked"),
        (["staleness.target_lag=6", "staleness.on_violation=drop_group"], "dropped with their groups"),
        (["staleness.target_lag=16", "staleness.max_lag=24"], "second_moment_limit=0.04"),
        (["queue.order=windowed", "queue.window=4"], "queue.window=4"),
        (["queue.budget_mb=0.01"], "queue.budget_mb"),
        (["learner.token_budget=100"], "learner.token_budget"),
        (["rollout.temperature=0"], "rollout.temperature=0"),
    ],
)
def test_each_warning(overrides: list[str], word: str) -> None:
    warnings = planned(*overrides).warnings
    assert any(word in warning for warning in warnings), warnings


def test_the_table_fits_80_columns() -> None:
    shown = text(planned("rollout.concurrency=64"))
    assert max(len(line) for line in shown.splitlines()) <= 80
    for word in ("mean lag", "1.00", "queue", "KV cache", "warning: rollout.concurrency=64"):
        assert word in shown
