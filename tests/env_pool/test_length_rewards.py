from __future__ import annotations

import pytest

from env_pool.config import RewardConfig
from env_pool.rewards.branches import load_branch
from env_pool.rewards.records import RewardSample
from experience.records import Task

ARGS = {"max_tokens": 100, "buffer_tokens": 20}


@pytest.mark.parametrize(("tokens", "reward"), [(0, 0.0), (80, 0.0), (81, -0.05), (90, -0.5), (100, -1.0), (500, -1.0)])
def test_the_punishment_grows_linearly_over_the_buffer(tokens: int, reward: float) -> None:
    branch = load_branch(RewardConfig(kind="overlong", args=ARGS))
    task = Task(task_id="t", environment="shop", payload={})
    sample = RewardSample(episode_id="e", task=task, outcome={}, sampled_tokens=tokens)
    assert branch.score(sample) == pytest.approx(reward)
    assert branch.label == "overlong"


@pytest.mark.parametrize("args", [{"max_tokens": 10, "buffer_tokens": 20}, {"max_tokens": 10, "buffer_tokens": 0}, {}])
def test_lengths_that_make_no_sense_are_refused(args: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="overlong"):
        load_branch(RewardConfig(kind="overlong", args=args))
