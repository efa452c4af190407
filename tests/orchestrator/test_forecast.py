"""The forecast against closed forms and against the simulator."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from orchestrator.config import Config, ConfigError, load, to_yaml
from orchestrator.plan import make_plan
from orchestrator.planning.forecast import Forecast, Limit
from orchestrator.planning.measured import measure
from orchestrator.planning.synthetic import forecast_of
from orchestrator.simulator.simulate import simulate_mode


def configured(*overrides: str) -> Config:
    return load(["synthetic"], ["run.dir=absent", *overrides])


def expected(*overrides: str) -> Forecast:
    return forecast_of(configured(*overrides), episodes=256)


def batch_of(config: Config) -> int:
    """Trajectories a step."""
    return config.rollout.groups_per_update * config.rollout.group_size


def test_a_dear_learner_sets_the_step_and_the_split() -> None:
    overrides = ["learner.synthetic.seconds_per_token=0.01", "learner.synthetic.step_overhead_s=3"]
    found = expected(*overrides)
    assert found.limit is Limit.LEARNER
    assert found.step_s == pytest.approx(found.training_s)
    assert found.training_s == pytest.approx(batch_of(configured()) * found.calibration.tau_s / found.learner + 3)
    assert found.best_learner > found.learner
    assert found.best_step_s < found.step_s
    assert found.best_efficiency <= 1.0


@pytest.mark.parametrize(
    ("overrides", "limit"),
    [
        (["tasks.options.suite=reason", "engines.synthetic.slots=2"], Limit.ROLLOUT),
        (["tasks.options.suite=reason", "engines.synthetic.slots=64", "rollout.concurrency=16"], Limit.CONCURRENCY),
        (["engines.synthetic.kv_tokens=410000", "staleness.target_lag=30", "rollout.concurrency=4096"], Limit.KV),
        (["learner.synthetic.seconds_per_token=0", "rollout.concurrency=64"], Limit.ENVIRONMENT),
        (["staleness.target_lag=0.1", "learner.synthetic.seconds_per_token=0"], Limit.PACING),
        (["mode=one_step"], Limit.STRAGGLERS),
    ],
)
def test_what_limits_first(overrides: list[str], limit: Limit) -> None:
    assert expected(*overrides).limit is limit


@pytest.mark.parametrize("suite", ["reason", "swe"])
def test_the_forecast_is_near_the_simulation(suite: str) -> None:
    config = configured(f"tasks.options.suite={suite}", "run.steps=16", "staleness.target_lag=4")
    outcome = simulate_mode(config)
    assert forecast_of(config).step_s == pytest.approx(outcome.step_s, rel=0.25)


def test_masking_and_stalls_are_warned_of() -> None:
    def warned(*overrides: str) -> str:
        return " ".join(make_plan(configured(*overrides)).warnings)

    assert "carry no loss" in warned("staleness.max_lag=1", "staleness.target_lag=1", "rollout.groups_per_update=2")
    assert "the learner stalls" in warned("mode=one_step")
    assert "are not the best split" in warned("learner.synthetic.seconds_per_token=0.01")


def test_calibration_from_a_run(tmp_path: Path) -> None:
    config = configured(f"run.dir={tmp_path}", "engines.replicas=1", "engines.synthetic.accelerators=2")
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    accounting = {
        "engine-0/0": {"decode": 30.0, "prefill": 2.0, "idle": 8.0},
        "engine-0/1": {"decode": 40.0},
        "learner-0": {"train": 10.0, "queue_empty": 30.0},
    }
    summary = {"steps": 2, "accounting": accounting, "tokens": {"generated": 100, "masked": 5}, "lag_mean": 1.5}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    lines = [{"step": 1, "wall_s": 20.0, "time/step_s": 20.0}, {"step": 2, "wall_s": 30.0, "time/step_s": 10.0}]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    found = measure(tmp_path)
    scale, trained = config.engines.synthetic.time_scale, 2 * batch_of(config)
    assert found.calibration.w_s == pytest.approx(72.0 * scale / trained)
    assert found.calibration.tau_s == pytest.approx(10.0 * config.learner.synthetic.accelerators * scale / trained)
    assert found.step_s == pytest.approx(10.0 * scale)
    assert (found.rollout, found.masked, found.lag_mean) == (2, 0.05, 1.5)
    assert found.best_rollout + found.best_learner == 2 + config.learner.synthetic.accelerators


def test_a_run_without_accounts_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"summary\.json does not exist"):
        measure(tmp_path)
    (tmp_path / "config.yaml").write_text(to_yaml(configured(f"run.dir={tmp_path}")))
    (tmp_path / "summary.json").write_text('{"steps": 3}')
    with pytest.raises(ConfigError, match="has no accounting"):
        measure(tmp_path)
