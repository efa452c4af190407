"""Each example, run by the command in its README, keeps what the README promises."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from env_pool.registry import TaskSource
from experience.records import Trajectory
from orchestrator.config import load
from orchestrator.episodes import load_trajectories, read_episodes
from orchestrator.run_directory import RunDirectory

REPOSITORY = Path(__file__).resolve().parents[2]
EXAMPLES = REPOSITORY / "examples"


def readme_command(example: str) -> list[str]:
    """The first command of the example's README."""
    text = (EXAMPLES / example / "README.md").read_text(encoding="utf-8")
    found = re.search(r"^```console\n\$ (.+)$", text, re.MULTILINE)
    assert found, f"examples/{example}/README.md has no command in a console block"
    return shlex.split(found[1])


def run_as_documented(example: str, directory: Path, timeout_s: float = 270.0) -> None:
    """Run that command from the repository's root, with another run directory. Leaves no process behind."""
    command = [*readme_command(example), f"run.dir={directory}"]
    output = directory.with_suffix(".output")
    with output.open("wb") as stream:
        process = subprocess.Popen(command, cwd=REPOSITORY, stdout=stream, stderr=subprocess.STDOUT)
    try:
        assert process.wait(timeout_s) == 0, output.read_text(errors="replace")[-3000:]
    except subprocess.TimeoutExpired:
        text = output.read_text(errors="replace")
        raise AssertionError(f"{command} was not over after {timeout_s} s:\n{text[-3000:]}") from None
    finally:
        if process.poll() is None:
            for each in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
                with suppress(psutil.NoSuchProcess):
                    each.kill()
            process.wait(30)


def assert_finished(example: str, directory: Path) -> None:
    """All steps were made, and every group dispatched is accounted for."""
    config = load([str(EXAMPLES / example / "config.yaml")])
    summary = json.loads((directory / "summary.json").read_text())
    ledger = summary["ledger"]
    assert summary["status"] == "finished"
    assert ledger["dispatched"] == ledger["trained"] + sum(ledger["dropped"].values()) + ledger["live"]
    assert ledger["trained"] == config.run.steps * config.rollout.groups_per_update
    assert summary["lag_max"] <= config.staleness.max_lag


def trained_trajectories(directory: Path) -> list[Trajectory]:
    """What the run recorded of the episodes it trained on."""
    found = read_episodes(RunDirectory(directory))
    assert found.problems == []
    episodes = [episode for episode in found.episodes if episode.trained_at is not None]
    return [trajectory for episode in episodes for trajectory in load_trajectories(episode)]


def rewards_by_step(directory: Path) -> list[float]:
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [line["reward/mean"] for line in lines if "time/step_s" in line]


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def check_loop(directory: Path) -> None:
    parts = [trajectory.reward_parts for trajectory in trained_trajectories(directory)]
    assert all(set(each) >= {"rule", "looked_first"} for each in parts)
    assert {each["looked_first"] for each in parts} <= {0.0, 0.1, 0.2}
    assert any(each["looked_first"] for each in parts)
    rewards = rewards_by_step(directory)
    assert mean(rewards[-5:]) > mean(rewards[:3]) + 0.05


def check_environment(directory: Path) -> None:
    trajectories = trained_trajectories(directory)
    assert {trajectory.domain for trajectory in trajectories} == {"parcels"}
    for trajectory in trajectories:
        parts = trajectory.reward_parts
        assert set(parts) == {"rule", "rule/right", "rule/some_refund", "rule/tried"}
        assert trajectory.reward == parts["rule"]
    assert any(trajectory.reward_parts["rule/right"] for trajectory in trajectories)
    rewards = rewards_by_step(directory)
    assert mean(rewards[-20:]) > mean(rewards[:3]) + 0.02


def check_reward(directory: Path) -> None:
    for trajectory in trained_trajectories(directory):
        parts = trajectory.reward_parts
        assert set(parts) == {"rule", "rule/state", "rule/answer", "asked", "brevity", "brevity/tokens_per_turn"}
        assert trajectory.reward == pytest.approx(parts["rule"] + 0.2 * parts["asked"] + 0.1 * parts["brevity"])
        assert parts["brevity"] == pytest.approx(min(1.0, max(0.0, (6 - parts["brevity/tokens_per_turn"]) / 3)))
    rewards = rewards_by_step(directory)
    assert mean(rewards[-5:]) > mean(rewards[:3]) + 0.05


@pytest.mark.parametrize(
    ("example", "check"),
    [("custom_loop", check_loop), ("custom_environment", check_environment), ("custom_reward", check_reward)],
)
def test_an_example_does_what_its_readme_says(example: str, check: Callable[[Path], None], tmp_path: Path) -> None:
    directory = tmp_path / example
    run_as_documented(example, directory)
    assert_finished(example, directory)
    check(directory)


def test_no_held_out_task_of_the_environment_is_a_training_task(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(REPOSITORY))
    tasks = load([str(EXAMPLES / "custom_environment" / "config.yaml")]).tasks
    train, held_out = (TaskSource.from_config(tasks, split, seed=1) for split in ("train", "held_out"))
    seen = {tuple(sorted(train.task(index).payload.items())) for index in range(200)}
    unseen = {tuple(sorted(held_out.task(index).payload.items())) for index in range(200)}
    assert len(seen) == 16
    assert len(unseen) == 4
    assert not seen & unseen
