"""The rollout worker against the real engine, environment and reward actors, in one process without Ray."""

from __future__ import annotations

import asyncio
import inspect
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import worker_fixtures
from transformers import Qwen3Config, Qwen3ForCausalLM
from word_tokenizer import TEMPLATE, WORDS, write_tokenizer
from worker_fixtures import TURNS, Engine, assignment, serve

from env_pool.config import RewardConfig
from experience.records import NOT_SAMPLED, Status
from rollout_workers.engines.config import EnginesConfig

PROMPT = 4
"""Tokens of `ask look red /`."""
SILENCE_TOO = TEMPLATE.replace(
    " {{ m.content | trim }} ;", "{% if m.content | trim %} {{ m.content | trim }}{% endif %} ;"
)
"""The template, for a model that may end a turn without a word."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model over the words of the word-level tokenizer."""
    directory = write_tokenizer(tmp_path_factory.mktemp("model"), SILENCE_TOO)
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(WORDS),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=128,
        eos_token_id=WORDS.index(";"),
        pad_token_id=WORDS.index("<pad>"),
    )
    Qwen3ForCausalLM(config).save_pretrained(directory)
    return directory


async def test_many_episodes_at_once_all_finish_and_are_delivered_once(model: Path, tmp_path: Path) -> None:
    async with serve(model, tmp_path, concurrency=24) as bench:
        bench.worker.run([assignment(index) for index in range(12)])
        await bench.delivered.until(48)
        expected = {f"g{index}-{member}" for index in range(12) for member in range(4)}
        assert sorted(entry.episode_id for entry in bench.delivered.entries) == sorted(expected)
        assert {report.episode_id for report in bench.delivered.reports} == expected
        assert bench.delivered.failures == []
        assert len(bench.engine.requests) == 48 * TURNS
        assert bench.engine.submissions < 48 * TURNS / 2
        for episode_id, trajectory in bench.delivered.trajectories().items():
            assert trajectory.status is Status.FINISHED
            assert [turn.role for turn in trajectory.turns] == [
                "prompt",
                *["model", "observation"] * (TURNS - 1),
                "model",
            ]
            assert trajectory.tokens[:PROMPT].tolist() == [WORDS.index(word) for word in ["ask", "look", "red", "/"]]
            assert np.array_equal(trajectory.versions == NOT_SAMPLED, ~trajectory.trainable)
            assert set(trajectory.versions[trajectory.trainable]) == {0}
            assert (trajectory.logprobs[trajectory.trainable] < 0).all()
            assert trajectory.reward == trajectory.reward_parts["rule"], episode_id
        assert len({trajectory.reward for trajectory in bench.delivered.trajectories().values()}) > 1
        stats = bench.worker.stats()
        assert (stats.finished, stats.failed, stats.retried) == (48, 0, 0)


async def test_no_more_episodes_run_than_there_are_slots(model: Path, tmp_path: Path) -> None:
    async with serve(model, tmp_path, concurrency=5, silent_from=0) as bench:
        bench.worker.run([assignment(index) for index in range(3)])
        await bench.engine.until("five requests", lambda: bench.engine.held == 5)
        stats = bench.worker.stats()
        assert (stats.running, stats.queued, stats.generating) == (5, 7, 5)


async def test_a_loop_that_raises_is_given_up_after_its_attempts_with_the_users_line(
    model: Path, tmp_path: Path
) -> None:
    lines, first = inspect.getsourcelines(worker_fixtures.raises)
    line = first + next(number for number, text in enumerate(lines) if "raise KeyError" in text)
    async with serve(model, tmp_path, loop="worker_fixtures:raises", max_attempts=3) as bench:
        bench.worker.run([assignment(size=2)])
        await bench.delivered.until(2)
        assert sorted(bench.delivered.failures) == [("g0", f"g0-{member}", "loop_fault") for member in range(2)]
        assert bench.delivered.entries == []
        for report in bench.delivered.reports:
            assert (report.status, report.attempts, report.reason) == (Status.SYSTEM_ERROR, 3, "loop_fault")
            assert report.reward is None
            assert report.cause is not None
            assert "KeyError: 'price'" in report.cause
            assert f"worker_fixtures.py:{line} in raises" in report.cause
        assert len({request.request_id for request in bench.engine.requests}) == 2 * 3
        assert bench.worker.stats().retried == 4


async def test_a_loop_that_never_generates_has_nothing_to_train_on(model: Path, tmp_path: Path) -> None:
    async with serve(model, tmp_path, loop="worker_fixtures:never_generates", max_attempts=2) as bench:
        bench.worker.run([assignment(size=1)])
        await bench.delivered.until(1)
        [report] = bench.delivered.reports
        assert (report.reason, report.attempts) == ("loop_fault", 2)
        assert "ended without a single `await episode.generate()`" in str(report.cause)
        assert bench.delivered.entries == []


async def test_a_loop_that_never_ends_is_timed_out(model: Path, tmp_path: Path) -> None:
    settings = {"loop": "worker_fixtures:never_ends", "max_attempts": 1, "episode_timeout_s": 0.05}
    async with serve(model, tmp_path, **settings) as bench:
        bench.worker.run([assignment(size=1)])
        await bench.delivered.until(1)
        [report] = bench.delivered.reports
        assert report.reason == "loop_timeout"
        assert "did not end within rollout.episode_timeout_s=0.05 s on task train/0" in str(report.cause)
        assert bench.delivered.failures == [("g0", "g0-0", "loop_timeout")]


async def test_an_episode_that_fills_its_context_is_truncated_judged_and_delivered(model: Path, tmp_path: Path) -> None:
    async with serve(model, tmp_path, loop="worker_fixtures:talks_for_ever", max_episode_tokens=40) as bench:
        bench.worker.run([assignment()])
        await bench.delivered.until(4)
        for trajectory in bench.delivered.trajectories().values():
            assert trajectory.status is Status.TRUNCATED
            assert trajectory.reward == 0.0  # the environment was told nothing, and its verifier said so
            assert len(trajectory) >= 40
            assert trajectory.sampled_tokens > 0
        assert len(bench.delivered.entries) == 4
        assert bench.delivered.failures == []


async def test_a_failed_judgement_is_no_reward_and_never_zero(model: Path, tmp_path: Path) -> None:
    rewards = [RewardConfig(), RewardConfig(kind="worker_fixtures:broken_judge", retries=1)]
    async with serve(model, tmp_path, rewards=rewards) as bench:
        bench.worker.run([assignment(size=3)])
        await bench.delivered.until(3)
        assert bench.delivered.entries == []
        assert {reason for _, _, reason in bench.delivered.failures} == {"reward_fault"}
        for report in bench.delivered.reports:
            assert report.reward is None
            assert report.attempts == 1
            assert f"the judge of {report.episode_id} is away" in str(report.cause)


async def test_cancelling_a_group_stops_its_episodes_and_no_others(model: Path, tmp_path: Path) -> None:
    async with serve(model, tmp_path, silent_from=PROMPT + 1) as bench:
        bench.worker.run([assignment(0), assignment(1)])
        await bench.engine.until("eight second turns", lambda: bench.engine.held == 8)
        bench.worker.cancel(["g0"])
        await bench.engine.until("four aborts", lambda: len(bench.engine.aborted) == 4)
        assert all(request_id.startswith("g0-") for request_id in bench.engine.aborted)
        await ended("_run_episode", leave=4)
        assert (bench.worker.stats().running, bench.worker.stats().generating) == (4, 4)
        assert bench.delivered.reports == []
        assert bench.delivered.failures == []


async def test_after_the_death_of_a_worker_no_completed_turn_is_generated_again(model: Path, tmp_path: Path) -> None:
    async with serve(model, tmp_path / "first", silent_from=PROMPT + 1) as first:
        first.worker.run([assignment()])
        await first.engine.until("four second turns", lambda: first.engine.held == 4)
        # What kill -9 leaves: the log as it is on the disk now.
        shutil.copytree(first.step_log, tmp_path / "left")
        assert first.delivered.entries == []
        completed = {r.request_id: r for r in first.engine.requests if len(r.prompt) <= PROMPT}
        second_turns = {r.request_id: r.prompt for r in first.engine.requests if len(r.prompt) > PROMPT}
    async with serve(model, tmp_path / "second") as second:
        second.worker.recover([tmp_path / "left"])
        second.worker.run([assignment()])
        await second.delivered.until(4)
        asked = {request.request_id: request.prompt for request in second.engine.requests}
        assert len(completed) == 4
        assert not completed.keys() & asked.keys()
        assert len(asked) == 4 * (TURNS - 1)
        for request_id, prompt in second_turns.items():
            assert np.array_equal(asked[request_id], prompt)
        for trajectory in second.delivered.trajectories().values():
            assert sum(turn.role == "model" for turn in trajectory.turns) == TURNS
            assert trajectory.reward is not None
        # Of each episode: the reset, the first turn and the answer to it.
        assert second.worker.stats().replayed_steps == 4 * 3


async def test_closing_a_worker_leaves_no_episode_and_no_line_to_an_engine_behind(model: Path, tmp_path: Path) -> None:
    async with serve(model, tmp_path, silent_from=0) as bench:
        bench.worker.run([assignment()])
        await bench.engine.until("four requests", lambda: bench.engine.held == 4)
        assert len(running("_run_episode")) == 4
        assert len(running("_receive")) == len(running("_send")) == 1
    for name in ("_run_episode", "_receive", "_send"):
        await ended(name)


@pytest.mark.parametrize("lock_step", [False, True])
async def test_however_episodes_end_none_of_their_sessions_stays_on_an_engine(
    model: Path, tmp_path: Path, lock_step: bool
) -> None:
    settings = {"loop": "worker_fixtures:wanders", "episode_timeout_s": 0.5, "max_attempts": 2, "lock_step": lock_step}
    rewards = [RewardConfig(kind="worker_fixtures:content_judge")]
    async with serve(model, tmp_path, rewards=rewards, concurrency=16, **settings) as bench:
        bench.worker.run([assignment(index) for index in range(12)])
        await bench.delivered.until(8)
        bench.worker.cancel([f"g{index}" for index in range(6, 9)])
        await ended("_run_episode")
        told = bench.engine.told
        await bench.engine.until("no session is left", lambda: told().sessions == told().requests == 0)
        assert bench.engine._engine.table.slot_of == {}
        reasons = {report.reason for report in bench.delivered.reports}
        assert reasons == {None, "loop_fault", "loop_timeout"} or lock_step
        assert bench.worker.engines.in_flight == 0
        assert bench.worker.engines.sessions == 0


async def test_sessions_of_a_lost_engine_are_let_go_where_they_went_on(model: Path, tmp_path: Path) -> None:
    async with serve(model, tmp_path, silent_from=PROMPT + 1) as bench:
        bench.worker.run([assignment(index, 8) for index in range(2)])
        await bench.engine.until("sixteen second turns", lambda: bench.engine.held == 16)
        assert bench.engine.told().sessions == 16
        second = Engine(EnginesConfig(slots=64, max_len=128, threads=1), "second")
        await second.load(str(model), "float32", 1, 0)
        bench.worker.add_engine("second", second)
        bench.worker.engines.remove_engine("engine", ConnectionError("the test says so"))
        await bench.delivered.until(16)
        await second.until("no session is left", lambda: second.told().sessions == 0)
        assert second._engine.table.slot_of == {}
        assert bench.worker.stats().continued_requests == 16
        await second.stop()


async def test_an_engine_forgets_a_worker_that_died(model: Path, tmp_path: Path) -> None:
    async with serve(model, tmp_path, loop="worker_fixtures:talks_for_ever", max_episode_tokens=100) as bench:
        bench.worker.run([assignment()])
        await bench.engine.until("eight requests", lambda: len(bench.engine.requests) >= 8)
        assert bench.engine.told().sessions == 4
        await bench.engine.forget_client("w")
        assert (bench.engine.told().sessions, bench.engine.told().requests) == (0, 0)
        assert bench.engine._engine.table.slot_of == {}


def running(name: str) -> set[asyncio.Task[object]]:
    """The worker's and the engine client's tasks of that method."""
    owners = (f"RolloutWorker.{name}", f"EngineClient.{name}")
    return {task for task in asyncio.all_tasks() if getattr(task.get_coro(), "__qualname__", "") in owners}


async def ended(name: str, leave: int = 0) -> None:
    """Wait until at most ``leave`` such tasks are left; at most 20 s."""
    async with asyncio.timeout(20):
        while len(tasks := running(name)) > leave:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
