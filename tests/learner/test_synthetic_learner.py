"""The synthetic learner: seconds in closed form, real masks and counts, checkpoints that are checked."""

from __future__ import annotations

import doctest
import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import learner.synthetic_clock as synthetic_clock
from experience.records import Group, GroupHeader, Task, Trajectory, Turn
from experience.wire import encode_group
from learner.config import LearnerConfig
from learner.errors import CheckpointError, LearnerError, ModelError
from learner.synthetic import STAMP, SyntheticLearner
from learner.synthetic_clock import PREFETCH_S, LearnerCost, TrainingClock
from learner.synthetic_config import SyntheticLearnerConfig
from orchestrator.recipes.synthetic import build


class Time:
    """A clock that only waiting moves."""

    def __init__(self) -> None:
        self.now = 1000.0

    def read(self) -> float:
        return self.now

    def wait(self, seconds: float) -> None:
        self.now += seconds


def make_learner(path: Path, clock: Time, time_shared: bool = False, max_lag: int = 2) -> SyntheticLearner:
    model = SyntheticLearnerConfig(accelerators=4, seconds_per_token=0.08, step_overhead_s=10, switch_s=20)
    model.time_scale, model.token_scale = 10.0, 5.0
    config = LearnerConfig(backend="synthetic", synthetic=model)
    learner = SyntheticLearner(
        config, max_lag=max_lag, keep_checkpoints=2, time_shared=time_shared, clock=clock.read, wait=clock.wait
    )
    learner.load(build(path))
    return learner


def group(index: int, versions: list[int], made_at: float, rewards: tuple[float, float] = (0.0, 1.0)) -> bytes:
    """Two trajectories with five tokens of context and one token of each of ``versions``."""
    header = GroupHeader(
        group_id=f"g{index}",
        index=index,
        task=Task(task_id="t", environment="e", payload={}),
        size=2,
        version_floor=0,
        seed=0,
    )
    count = 5 + len(versions)
    made = np.array([-1] * 5 + versions, dtype=np.int32)
    trajectories = [
        Trajectory(
            trajectory_id=f"g{index}-{member}/0",
            episode_id=f"g{index}-{member}",
            group_id=f"g{index}",
            task_id="t",
            tokens=np.arange(count, dtype=np.int32),
            trainable=made >= 0,
            logprobs=np.zeros(count, dtype=np.float32),
            versions=made,
            reward=reward,
            turns=[Turn(start=5, end=count, role="model", began_at=made_at - 1, ended_at=made_at)],
        )
        for member, reward in enumerate(rewards)
    ]
    return encode_group(Group(header=header, trajectories=trajectories))


def test_docstring_examples() -> None:
    assert doctest.testmod(synthetic_clock).failed == 0


def test_the_cost_is_scaled_once() -> None:
    config = SyntheticLearnerConfig(accelerators=4, seconds_per_token=0.08, step_overhead_s=10, switch_s=20)
    config.time_scale, config.token_scale = 10.0, 5.0
    assert LearnerCost.from_config(config, time_shared=True) == LearnerCost(0.01, 1.0, 2.0, True)
    assert LearnerCost.from_config(config, time_shared=False).switch_s == 0.0


@given(
    arrivals=st.lists(st.tuples(st.floats(0, 3), st.integers(0, 500)), min_size=1, max_size=20),
    late=st.floats(0, 0.05),
)
def test_streamed_work_is_done_when_the_recursion_of_a_queue_says(
    arrivals: list[tuple[float, int]], late: float
) -> None:
    cost = LearnerCost(0.01, 0.5, 0.0, time_shared=False)
    clock, now, done = TrainingClock(cost, 0.0), 0.0, 0.0
    for gap, tokens in arrivals:
        now += gap
        clock.add(tokens, ready_at=now, now=now + late)
        done = max(done, now) + tokens * 0.01
    assert clock.finish(now + late) == pytest.approx(max(done, now) + 0.5)
    assert clock.busy_s == pytest.approx(sum(tokens for _, tokens in arrivals) * 0.01 + 0.5)
    spans = clock.take_spans()
    assert sum(ended - began for began, ended in spans) == pytest.approx(clock.busy_s)
    assert all(first[1] <= second[0] for first, second in itertools.pairwise(spans))


def test_work_does_not_begin_long_before_its_groups_arrived() -> None:
    clock = TrainingClock(LearnerCost(0.01, 0.0, 0.0, time_shared=False), 0.0)
    clock.add(100, ready_at=1.0, now=5.0)
    assert clock.finish(5.0) == pytest.approx(5.0 - PREFETCH_S + 1.0)


def test_in_turns_training_begins_when_all_groups_are_there_and_pays_the_switch() -> None:
    clock = TrainingClock(LearnerCost(0.01, 0.5, 2.0, time_shared=True), 0.0)
    clock.add(100, ready_at=1.0, now=1.0)
    clock.add(300, ready_at=4.0, now=4.0)
    assert clock.finish(4.0) == pytest.approx(4.0 + 2.0 + 4.0 + 0.5)


def test_rounding_of_many_steps_does_not_add_up() -> None:
    clock, now = TrainingClock(LearnerCost(0.001, 0.0, 0.0, time_shared=False), 0.0), 0.0
    for _ in range(1000):
        clock.add(10, ready_at=0.0, now=now)
        now = clock.finish(now) + 0.003
    assert now == pytest.approx(1000 * 0.01, abs=0.005)


def test_a_step_masks_counts_and_lasts_as_long_as_it_must(tmp_path: Path) -> None:
    clock = Time()
    learner = make_learner(tmp_path, clock)
    learner.version = 4
    learner.begin_step()
    assert learner.add([group(0, [1, 2, 4], clock.now)]) == ["g0"]
    clock.now += 0.05
    assert learner.add([group(1, [4, 4, 4], clock.now)]) == ["g1"]
    metrics = learner.finish_step()
    assert learner.version == 5
    assert clock.now == pytest.approx(1000.0 + 32 * 0.01 + 1.0)
    assert (metrics["tokens/trained"], metrics["tokens/masked"], metrics["tokens/passed"]) == (10, 2, 32)
    assert (metrics["lag/mean"], metrics["lag/p50"], metrics["lag/max"]) == (0.4, 0.0, 2.0)
    assert metrics["lag/p99"] == 2.0
    assert metrics["time/train_s"] == pytest.approx(1.32)
    assert (metrics["reward/mean"], metrics["groups/total"], metrics["step/skipped"]) == (0.5, 2, 0)


def test_in_turns_a_step_adds_the_switch(tmp_path: Path) -> None:
    clock = Time()
    learner = make_learner(tmp_path, clock, time_shared=True)
    learner.begin_step()
    learner.add([group(0, [0, 0, 0], clock.now)])
    learner.finish_step()
    assert clock.now == pytest.approx(1000.0 + 16 * 0.01 + 1.0 + 2.0)


def test_weights_are_stamped_and_checkpoints_continue_or_are_refused(tmp_path: Path) -> None:
    clock = Time()
    learner = make_learner(tmp_path / "model", clock)
    for _ in range(2):
        learner.begin_step()
        learner.finish_step()
    assert dict(learner.named_tensors())[STAMP].tolist() == [2.0]
    path = learner.save(tmp_path / "checkpoints", {"dispatched": 7})
    again = make_learner(tmp_path / "other", clock)
    state = again.restore(path)
    assert (again.version, state.extra) == (2, {"dispatched": 7})
    assert dict(again.named_tensors())[STAMP].tolist() == [2.0]
    again.export(tmp_path / "exported")
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {p.name for p in (tmp_path / "exported").iterdir()}
    (path / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match="damaged or truncated"):
        again.restore(path)


def test_checkpoints_after_a_resumed_one_are_whole_when_that_one_has_gone(tmp_path: Path) -> None:
    clock = Time()
    first = make_learner(tmp_path / "model", clock)
    resumed = make_learner(tmp_path / "other", clock)
    resumed.restore(first.save(tmp_path / "checkpoints"))
    for _ in range(4):
        resumed.begin_step()
        resumed.finish_step()
        written = resumed.save(tmp_path / "checkpoints")
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2
    assert {"config.json", "tokenizer.json", "chat_template.jinja"} <= {path.name for path in written.iterdir()}


def test_misuse_is_told(tmp_path: Path) -> None:
    learner = make_learner(tmp_path, Time())
    with pytest.raises(LearnerError, match="begin_step first"):
        learner.add([])
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="cannot be read"):
        learner.load(tmp_path)
