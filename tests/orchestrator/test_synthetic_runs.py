"""Runs of a modelled cluster: the real command and actors, a cost model in place of the model."""

from __future__ import annotations

from pathlib import Path

import pytest
from run_processes import MillraceProcess, assert_balanced, summary_of, training_lines

from orchestrator.config import ConfigError, load, validate
from orchestrator.launch import check

COIN = [
    "tasks.environment=coin_environment:CoinEnvironment",
    "tasks.options={}",
    "rollout.loop=tool_agent",
    "rollout.max_tokens=20",
    "rollout.max_episode_tokens=128",
    "rollout.groups_per_update=4",
    "rollout.group_size=4",
    "rollout.concurrency=64",
    "engines.synthetic.accelerators=2",
    "learner.synthetic.accelerators=4",
    "learner.synthetic.switch_s=5",
]


def start(run: Path, *more: str) -> MillraceProcess:
    return MillraceProcess("train", "configs/synthetic.yaml", f"run.dir={run}", *COIN, *more, directory=run)


def test_in_turns_every_token_is_on_policy_and_a_step_lasts_as_its_parts(tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = start(run, "run.steps=5", "mode=sync", "run.checkpoint_every=2")
    assert process.wait(120) == 0, process.output[-3000:]
    lines = training_lines(run)
    assert [line["lag/max"] for line in lines] == [0.0] * 5
    training = [line["tokens/passed"] * 50 * 1.2e-4 / 4 + 5 + 1 for line in lines]
    assert [line["time/train_s"] * 25 for line in lines] == pytest.approx(training)
    rollout = 2 * 20 * 50 / (4000 / (4 + 32))  # two turns of 20 tokens, four episodes on each of four accelerators
    update = 2.0 + 0.5  # new weights arrive, engines switch
    took = (lines[-1]["time"] - lines[0]["time"]) * 25
    assert took >= sum(training[1:]) + 4 * (rollout + update) - 1
    summary = summary_of(run)
    assert_balanced(summary)
    assert summary["ledger"]["trained"] == 5 * 4
    assert summary["tokens"]["generated"] >= 5 * 16 * 2 * 20
    assert summary["scale"] == {
        "time_scale": 25.0,
        "token_scale": 50.0,
        "rollout_accelerators": 4,
        "learner_accelerators": 4,
    }
    assert "a wall second is 25 modelled ones, a token 50" in " ".join(process.output.split())
    assert summary["success_before"] is None
    assert (run / "checkpoints" / "step-000004" / "model.safetensors").exists()
    assert not (run / "eval").exists() or not list((run / "eval").iterdir())


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["learner.backend=fsdp"], "set both to synthetic, or neither"),
        (["engines.kind=torch"], "set both to synthetic, or neither"),
        (["learner.synthetic.time_scale=10"], "must be equal: they model one cluster"),
        (["engines.synthetic.token_scale=10"], "engines.synthetic.token_scale=10 and learner.synthetic.token_scale=50"),
        (["tasks.options.time_scale=3"], "tasks.options.time_scale=3 and engines.synthetic.time_scale=25"),
        (["model.recipe=shop_small"], "model.recipe=synthetic"),
        (["mode=sync"], "learner.synthetic.accelerators must be 10 (is 6)"),
        (["engines.synthetic.stage_s=2000"], "weights.timeout_s=60: raise that"),
        (["run.deterministic=true"], "synthetic engines follow the clock"),
        (["engines.max_len=200000"], "more than the KV of an accelerator"),
        (["engines.synthetic.slots=0"], "engines.synthetic.slots=0: must be at least 1"),
        (["learner.synthetic.seconds_per_token=-1"], "learner.synthetic.seconds_per_token=-1.0: must not be negative"),
    ],
)
def test_a_cluster_that_cannot_be_modelled_is_refused_with_the_remedy(overrides: list[str], told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        validate(load(["configs/synthetic.yaml"], overrides))
    assert told in str(caught.value)


def test_a_model_that_is_not_synthetic_is_refused(tmp_path: Path, tiny_model: Path) -> None:
    with pytest.raises(ConfigError, match=r"config.json describes a model of type 'qwen3'"):
        check(
            load(
                ["configs/synthetic.yaml"],
                [
                    f"model.path={tiny_model}",
                    "engines.max_len=512",
                    "rollout.max_episode_tokens=512",
                    "rollout.max_tokens=64",
                ],
            )
        )


def test_the_preset_is_valid() -> None:
    check(load(["configs/synthetic.yaml"]))
