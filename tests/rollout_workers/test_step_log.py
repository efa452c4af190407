"""The step log on a disk that is full for a while."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from experience.journal import JournalError
from rollout_workers.step_log import RecordedSteps, StepLog, StepRecord


@contextmanager
def file_size_limit(limit: int) -> Iterator[None]:
    """No file of this process grows beyond ``limit`` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def step(number: int) -> StepRecord:
    return StepRecord(episode_id="e", attempt=0, trajectory_id="t", call="step", action=f"action {number}")


def test_a_full_disk_is_named_at_each_attempt_and_the_log_goes_on_when_there_is_room(tmp_path: Path) -> None:
    log = StepLog(tmp_path, segment_records=2)
    log.append(step(0))
    log.append(step(1))
    for _ in range(3):
        with file_size_limit(0), pytest.raises(JournalError, match="File too large"):
            log.append(step(2))
    log.append(step(2))
    log.append(step(3))
    log.append(step(4))
    log.close()
    recorded = RecordedSteps()
    recorded.read(tmp_path)
    replay = recorded.take("e")
    assert len(replay) == 5
