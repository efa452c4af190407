"""Measures how late an actor's event loop is, writes its vitals to the run directory, and keeps pauses short."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import BinaryIO

import msgspec

from experience.vitals import LOOP_LAG, process_vitals
from orchestrator.garbage import RareCollections

logger = logging.getLogger(__name__)

TICK_S = 0.02
"""How often the event loop's lateness is measured: 50 wake-ups a second cost 0.2 % of a core."""
WRITE_S = 5.0


@asynccontextmanager
async def vitals_taken(directory: Path, actor: str) -> AsyncIterator[None]:
    """While the block lasts, the vitals of this process go to ``directory/ACTOR.jsonl`` every ``WRITE_S`` seconds."""
    taker = asyncio.create_task(_take(_open(directory, actor), rarely=not actor.startswith("learner")))
    try:
        yield
    finally:
        taker.cancel()


def _open(directory: Path, actor: str) -> BinaryIO:
    directory.mkdir(parents=True, exist_ok=True)
    return (directory / f"{actor}.jsonl").open("ab", buffering=0)


async def _take(file: BinaryIO, rarely: bool) -> None:
    """``rarely``: full garbage collections are put off (a learner's cycles may hold on to gigabytes of tensors)."""
    loop, vitals = asyncio.get_running_loop(), process_vitals()
    vitals.take(time.time())
    with file:
        written_at = loop.time()
        collections = RareCollections(written_at) if rarely else None
        while True:
            due = loop.time() + TICK_S
            await asyncio.sleep(TICK_S)
            now = loop.time()
            vitals.observe(LOOP_LAG, now - due)
            if now - written_at < WRITE_S:
                continue
            written_at = now
            if collections is not None:
                collections.tick(now)
            try:
                file.write(msgspec.json.encode(vitals.take(time.time())) + b"\n")
            except OSError as error:  # a run does not end because of them
                logger.warning("vitals are no longer written: %s", error)
                return
