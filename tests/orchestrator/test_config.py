"""The configuration of a run: presets, cross checks, and a written config that runs again as it is."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from experience.config import OnViolation
from orchestrator.composition import packaged_names
from orchestrator.config import MASK, Config, ConfigError, load, resolve_mode, secret_values, to_yaml, validate


def refused(*overrides: str, paths: tuple[str, ...] = ()) -> str:
    with pytest.raises(ConfigError) as caught:
        validate(load(paths, overrides))
    return str(caught.value)


@pytest.mark.parametrize("name", packaged_names())
def test_packaged_configs_are_valid(name: str) -> None:
    validate(load([name], ["model.path=some/model"] if name == "reasoning_gym" else []))


def test_defaults_are_valid() -> None:
    validate(Config())


@pytest.mark.parametrize(("mode", "lag"), [("sync", 0), ("one_step", 1)])
def test_mode_fixes_the_staleness_contract(mode: str, lag: int) -> None:
    for config in (load(["quickstart"], [f"mode={mode}"]), load([mode]), resolve_mode(Config(mode=mode))):
        assert config.mode == mode
        assert (config.staleness.target_lag, config.staleness.max_lag) == (lag, lag)
        assert config.staleness.on_violation is OnViolation.wait


def test_async_leaves_the_staleness_contract_alone() -> None:
    config = load([], ["staleness.target_lag=0.5", "staleness.max_lag=2", "staleness.on_violation=drop_group"])
    assert (config.staleness.target_lag, config.staleness.max_lag) == (0.5, 2)
    assert config.staleness.on_violation is OnViolation.drop_group


def test_contradicting_the_mode_names_both_places(tmp_path: Path) -> None:
    message = refused("mode=sync", "staleness.max_lag=3")
    assert "staleness.max_lag=3" in message
    assert "mode=sync" in message
    path = tmp_path / "mine.yaml"
    path.write_text("mode: one_step\nstaleness:\n  on_violation: mask_tokens\n")
    message = refused(paths=(str(path),))
    assert f"{path}:3" in message
    assert f"{path}:1" in message
    assert "staleness.on_violation=wait" in message


def test_saying_what_the_mode_says_is_no_contradiction() -> None:
    assert load([], ["mode=sync", "staleness.max_lag=0"]).staleness.max_lag == 0


def test_resolving_leaves_the_argument_alone() -> None:
    config = Config(mode="sync")
    resolve_mode(config)
    assert config.staleness.max_lag == 4


def test_unknown_mode_suggests_the_nearest() -> None:
    assert "did you mean 'async'?" in refused("mode=asinc")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["run.deterministic=true"], ["run.deterministic", "mode=sync"]),
        (["run.deterministic=true", "mode=sync", "rollout.workers=2"], ["rollout.workers=1 (is 2)"]),
        (["run.deterministic=true", "mode=sync", "engines.replicas=3"], ["engines.replicas=1 (is 3)"]),
        (["run.deterministic=true", "mode=sync", "engines.kind=vllm"], ["engines.kind=torch (is vllm)"]),
        (["rollout.concurrency=4"], ["rollout.concurrency", "rollout.group_size"]),
        (["queue.min_size=9"], ["queue.min_size", "rollout.group_size"]),
        (["engines.max_len=64"], ["rollout.max_episode_tokens", "engines.max_len"]),
        (["staleness.on_violation=wait", "staleness.target_lag=5"], ["staleness.target_lag", "staleness.max_lag"]),
        (["weights.every=6"], ["weights.every=6", "staleness.max_lag=4", "5 or more"]),
        (["weights.every=2", "mode=sync"], ["mode=sync is on-policy", "weights.every=2"]),
        (["run.steps=0"], ["run.steps", "at least 1"]),
        (["run.dir=''"], ["run.dir"]),
        (["run.stall_timeout_s=0"], ["run.stall_timeout_s"]),
        (["seed=-1"], ["seed"]),
        (["cluster.placement=spread"], ["cluster.placement", "auto"]),
        (["rewards.0.timeout_s=0"], ["rewards.0", "timeout_s"]),
        (["staleness.on_violation=mask"], ["staleness.on_violation", "mask_tokens"]),
    ],
)
def test_what_cannot_work_is_refused_with_both_keys(overrides: list[str], words: list[str]) -> None:
    message = refused(*overrides)
    for word in words:
        assert word in message


def test_all_problems_are_reported_at_once() -> None:
    assert len(refused("run.steps=0", "seed=-1", "rollout.workers=0").splitlines()) == 3


@pytest.mark.parametrize("name", packaged_names())
def test_written_config_loads_back_equal(name: str, tmp_path: Path) -> None:
    config = load([name], ["rewards=[{kind: rule, weight: 2}]", "engines.threads=null"])
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(config))
    again = load([str(path)])
    assert again == config
    assert to_yaml(again) == to_yaml(config)


def test_environment_secrets_stay_references_when_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MILLRACE_TEST_KEY", "hidden-value")
    config = load([], ["rewards=[{kind: 'judge:Judge', args: {api_key: '${oc.env:MILLRACE_TEST_KEY}'}}]"])
    assert config.rewards[0].args == {"api_key": "hidden-value"}
    for text in (to_yaml(config), to_yaml(config, mask_secrets=True)):
        assert "hidden-value" not in text
        assert yaml.safe_load(text)["rewards"][0]["args"]["api_key"] == "${oc.env:MILLRACE_TEST_KEY}"


def test_literal_secrets_are_masked_on_screens_and_kept_in_the_runnable_config() -> None:
    config = load(
        [], ["rewards.0.args.hf_token=abc123", "rewards.0.args.max_tokens=5", "rewards.0.args.nested.password=pw12"]
    )
    shown = to_yaml(config, mask_secrets=True)
    assert "abc123" not in shown
    assert "pw12" not in shown
    assert shown.count(MASK) == 2
    assert "abc123" in to_yaml(config)
    assert secret_values(config) == {"rewards.0.args.hf_token": "abc123", "rewards.0.args.nested.password": "pw12"}


def test_loading_a_config_imports_nothing_heavy() -> None:
    code = (
        "import sys; from orchestrator.config import load, validate, to_yaml\n"
        "config = load(['quickstart'], ['seed=1']); validate(config); to_yaml(config)\n"
        "heavy = {'torch', 'ray', 'transformers', 'reasoning_gym', 'tensorboard'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
