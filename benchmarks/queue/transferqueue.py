"""TransferQueue, measured by a runner in the peers' environment that is told case by case what to do."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path
from typing import Any

from benchmarks.queue.samples import BATCH, IN_FLIGHT, Case, Timing

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv-peers" / "bin" / "python"
RUNNER = ROOT / "benchmarks" / "peers" / "transferqueue_queue.py"
MARK = "RESULT "
"""What the runner's own lines begin with; other lines are its libraries'."""
TIME_OUT_S = 300.0


class PeerError(RuntimeError):
    """The runner failed; holds the end of what it wrote."""


class TransferQueue:
    """Speaks with the runner by lines of JSON."""

    name = "transferqueue"

    def __init__(self, seed: int, python: Path = PYTHON) -> None:
        self._seed = seed
        self._python = python
        self.versions: dict[str, str] = {}

    async def start(self) -> None:
        self._process = await asyncio.create_subprocess_exec(
            str(self._python),
            str(RUNNER),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            limit=1 << 24,
            env={**os.environ, "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"},
        )
        self.versions = await self._answer("start")

    async def measure(self, put: Case, item_bytes: int, count: int) -> dict[Case, Timing]:
        request = {
            "put": put.value,
            "item_bytes": item_bytes,
            "count": count,
            "batch": BATCH,
            "in_flight": IN_FLIGHT,
            "seed": self._seed,
        }
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request).encode() + b"\n")
        await self._process.stdin.drain()
        answer = await self._answer(f"{put.value} of {item_bytes} bytes")
        return {Case(case): Timing(**timing) for case, timing in answer.items()}

    async def stop(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            await asyncio.wait_for(self._process.wait(), 30)
        except TimeoutError:
            self._process.kill()
            await self._process.wait()

    async def _answer(self, to: str) -> dict[str, Any]:
        assert self._process.stdout is not None
        said: list[str] = []
        while True:
            try:
                line = (await asyncio.wait_for(self._process.stdout.readline(), TIME_OUT_S)).decode(errors="replace")
            except TimeoutError:
                raise PeerError(f"TransferQueue's runner gave no answer to {to!r} within {TIME_OUT_S:g} s") from None
            if line.startswith(MARK):
                answer: dict[str, Any] = json.loads(line.removeprefix(MARK))
                return answer
            if not line:
                raise PeerError(f"TransferQueue's runner ended at {to!r}:\n" + "".join(said[-15:]))
            said.append(line)
