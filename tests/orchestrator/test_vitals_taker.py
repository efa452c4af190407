from __future__ import annotations

import asyncio
import gc
from collections.abc import Iterator
from pathlib import Path

import pytest

from experience.vitals import LOOP_LAG, read_vitals
from orchestrator import vitals_taker
from orchestrator.garbage import NEVER
from orchestrator.vitals_taker import TICK_S, vitals_taken


@pytest.fixture(autouse=True)
def default_thresholds() -> Iterator[None]:
    before = gc.get_threshold()
    yield
    gc.set_threshold(*before)


async def lines_of(path: Path) -> None:
    """Wait for the first line; at most 10 s."""
    async with asyncio.timeout(10):
        while not path.exists() or not path.read_bytes():  # noqa: ASYNC110, ASYNC240 - a file has no event
            await asyncio.sleep(TICK_S)


async def test_a_blocked_loop_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vitals_taker, "WRITE_S", 0.2)
    async with vitals_taken(tmp_path / "vitals", "worker-0"):
        await asyncio.sleep(0)
        started = asyncio.get_running_loop().time()
        while asyncio.get_running_loop().time() - started < 0.3:
            pass
        await lines_of(tmp_path / "vitals" / "worker-0.jsonl")
    lag = read_vitals(tmp_path / "vitals")["worker-0"].delays[LOOP_LAG]
    assert lag.quantile(1.0) >= 0.3 - TICK_S
    assert gc.get_threshold()[2] == NEVER


async def test_a_learner_collects_as_python_does(tmp_path: Path) -> None:
    before = gc.get_threshold()
    async with vitals_taken(tmp_path, "learner-0"):
        await asyncio.sleep(2 * TICK_S)
    assert gc.get_threshold() == before
