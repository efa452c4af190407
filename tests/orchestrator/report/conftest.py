"""A small run as files, made by the queue itself: trained, masked, dropped, late, live and given-up episodes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from experience.accounting import Cause, Span, TimelineWriter
from experience.config import QueueConfig, StalenessConfig
from experience.entries import make_entry
from experience.journal import Journal
from experience.queue import ExperienceQueue
from experience.records import GroupHeader, Task, Trajectory, Turn
from experience.staleness import make_policy
from experience.wire import encode_trajectory
from orchestrator.config import load, to_yaml
from orchestrator.fleet_log import FleetLog
from orchestrator.run_directory import RunDirectory

HOSTILE = "<script>window.hacked=true</script></script><!--<img/src=x:onerror=hacked()>"
WORDS = ["<unk>", "ask", "refund", "find_user", ";", ">", "user", ".", "done", HOSTILE, "needle"]
STEPS = 12
MAX_LAG = 2


def trajectory(group: str, member: int, version: int, *, length: int = 1, reward: float | None = 1.0) -> Trajectory:
    """Prompt ``ask refund``, model ``find_user ... ;``, observation ``> HOSTILE .``, model ``done ;`` one version later."""
    middle = ["find_user"] * length
    text = ["ask", "refund", *middle, ";", ">", HOSTILE, ".", "done", ";"]
    if group == "g3":
        text[1] = "needle"
    end = 3 + length
    sampled = np.zeros(len(text), np.bool_)
    sampled[2:end] = sampled[-2:] = True
    versions = np.where(sampled, version, -1)
    versions[-2:] = version + 1
    return Trajectory(
        trajectory_id=f"{group}-{member}/0",
        episode_id=f"{group}-{member}",
        group_id=group,
        task_id=f"task/{group}",
        tokens=np.array([WORDS.index(word) for word in text], dtype=np.int32),
        trainable=sampled,
        logprobs=np.where(sampled, -0.5, 0.0).astype(np.float32),
        versions=versions.astype(np.int32),
        reward=reward,
        reward_parts={} if reward is None else {"rule": reward},
        domain="<b>refunds" if group == "g3" else "orders",
        difficulty=1,
        turns=[
            Turn(start=0, end=2, role="prompt"),
            Turn(start=2, end=end, role="model", began_at=1.0, ended_at=1.5),
            Turn(start=end, end=end + 3, role="observation", began_at=1.5, ended_at=1.75),
            Turn(start=end + 3, end=end + 5, role="model", began_at=1.75, ended_at=2.0),
        ],
        timings={"total": 1.0 + length + member, "generate": 0.75, "environment": 0.25},
    )


def header(index: int) -> GroupHeader:
    task = Task(task_id=f"task/g{index}", environment="shop", payload={}, domain="orders")
    return GroupHeader(group_id=f"g{index}", index=index, task=task, size=2, version_floor=0, seed=0)


def fill_queue(run: RunDirectory) -> ExperienceQueue:
    """Twelve trained groups of growing lag, one dropped, one with a failed episode still live, one late episode."""
    journal = Journal(run.journal)
    staleness = StalenessConfig(max_lag=MAX_LAG)
    queue = ExperienceQueue(QueueConfig(min_size=1), make_policy(staleness, 1), journal=journal)
    for index in range(STEPS):
        queue.open(header(index), float(index))
        version = max(0, index - (index % 4))
        for member in range(2):
            reward = float((index + member) % 2)
            queue.add(make_entry([trajectory(f"g{index}", member, version, length=1 + index, reward=reward)]), 1.0)
        leased = queue.lease("learner", 1, index, 2.0)
        masked = (2 + index) * 2 if index - version > MAX_LAG else 0
        queue.ack([leased[0].group_id], step=index, trained_tokens=leased[0].tokens - masked, masked_tokens=masked)
    queue.open(header(STEPS), 20.0)
    queue.add(make_entry([trajectory(f"g{STEPS}", 0, 10, length=40, reward=0.0)]), 21.0)
    queue.drop(f"g{STEPS}", "stale")
    queue.add(make_entry([trajectory(f"g{STEPS}", 1, 10, length=2, reward=None)]), 22.0)
    queue.open(header(STEPS + 1), 23.0)
    queue.add(make_entry([trajectory(f"g{STEPS + 1}", 0, 11, length=3)]), 24.0)
    journal.flush()
    return queue


def write_metrics(run: RunDirectory) -> None:
    lines = []
    for step in range(1, STEPS + 1):
        line = {"step": step, "wall_s": step * 2.0, "time": 1000.0 + step * 2.0, "loss": 0.1, "time/step_s": 2.0}
        line |= {"reward/mean": step / STEPS, "entropy": 1.0 / step, "lag/mean": 1.0, "lag/max": 2.0}
        line |= {"correction/ess": 0.9, "ratio/clip_fraction": 0.01, "throughput/tokens_per_s": 100.0 + step}
        lines.append(json.dumps(line))
    run.metrics.write_text("\n".join(lines) + "\n")


def write_evaluations(run: RunDirectory) -> None:
    for step, success in ((0, 0.25), (STEPS, 0.75)):
        domains = {"orders": {"n": 4, "success": success}, "<b>refunds": {"n": 4, "success": success}}
        result = {"step": step, "version": step, "tasks": 8, "success": success, "reward_mean": success}
        run.write_evaluation(step, {**result, "by_domain": domains})
        journal = Journal(run.evaluation_journal(step) / "worker-0-0")
        journal.append("trajectory", encode_trajectory(trajectory(f"e{step:06d}-0000", 0, step)))
        journal.close()


def write_timeline(run: RunDirectory) -> None:
    """Forty seconds, of which the engine decodes 30 and is idle 10, the learner trains half."""
    engine, learner = (
        TimelineWriter(run.path / "timeline", "engine-0"),
        TimelineWriter(run.path / "timeline", "learner-0"),
    )
    engine.write([Span("engine-0", Cause.DECODE, 1000.0, 1030.0), Span("engine-0", Cause.IDLE, 1030.0, 1040.0)])
    learner.write(
        [Span("learner-0", Cause.QUEUE_EMPTY, 1000.0, 1020.0), Span("learner-0", Cause.TRAIN, 1020.0, 1040.0)]
    )
    engine.close()
    learner.close()


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    """`make_run` for a test that changes it."""
    return make_run(tmp_path)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """`make_run` for tests that only read it."""
    return make_run(tmp_path_factory.mktemp("report"))


def make_run(tmp_path: Path) -> RunDirectory:
    """A finished run of twelve steps with everything a report can show."""
    config = load(["quickstart"], [f"run.steps={STEPS}", f"staleness.max_lag={MAX_LAG}", "seed=7"])
    run = RunDirectory.create(tmp_path / "a <run>", to_yaml(config))
    run.model.mkdir()
    words = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.save(str(run.model / "tokenizer.json"))
    run.start_attempt("train quickstart", 1000.0)
    queue = fill_queue(run)
    write_metrics(run)
    write_evaluations(run)
    write_timeline(run)
    (run.logs / "worker-0-0.log").write_text(
        "2026-01-01 10:00:00,000 WARNING rollout_workers: episode 7 <b>was slow</b>\n"
        "2026-01-01 10:00:05,000 WARNING rollout_workers: episode 8 <b>was slow</b>\n"
        "2026-01-01 10:00:06,000 INFO rollout_workers: nothing\n"
    )
    fleet = FleetLog(run.fleet_events)
    fleet.note("serving", "engine-0.0", 3)
    fleet.note("dead", "engine-0.0", detail=f"it died of {HOSTILE}")
    tokens = queue.ledger.token_snapshot()
    run.write_summary(
        {
            "status": "finished",
            "error": None,
            "steps": STEPS,
            "wall_s": 40.0,
            "lag_mean": 1.25,
            "lag_max": 2,
            "max_lag": MAX_LAG,
            "ledger": queue.ledger.snapshot(),
            "tokens": {name: tokens[name] for name in ("generated", "trained", "masked", "wasted")},
            "lengths_ks": queue.ledger.length_distance(),
            "actors_replaced": 1,
            "idle": {"environment": 0.2, "pacing": 0.05},
            "stalls": [{"stage": "environment", "waited_s": 12.5, "group": "g3", "actor": "environment-0"}],
            "versions": {"python": "3.11.7"},
        }
    )
    return run
