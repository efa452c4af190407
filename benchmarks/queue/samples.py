"""What is measured of a queue, and the rows made of it."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

BATCH = 64
"""Items in one call of the batched cases."""
IN_FLIGHT = 32
"""Calls open at once in the pipelined case."""
BYTES_A_TOKEN = 13
"""Of a trajectory: token 4, trainable 1, log-probability 4, version 4."""


class Case(StrEnum):
    """One way of using a queue; each put case is followed by the get case of the same items."""

    PUT_SINGLE = "put single"
    """One item a call, one call at a time."""
    PUT_ALONE = "put single, nobody waiting"
    """The items of one batch, as in the next case but without its consumer."""
    PUT_WAITING = "put single, consumer waiting"
    """The items of one batch, while a consumer waits for all of it."""
    PUT_PIPELINED = "put pipelined"
    """One item a call, 32 calls open at once."""
    PUT_BATCHED = "put batched"
    """64 items a call, one call at a time."""
    GET_SINGLE = "get single"
    GET_BATCHED = "get batched"


ONE_BATCH = (Case.PUT_ALONE, Case.PUT_WAITING)


@dataclass(frozen=True)
class Timing:
    """The calls of one case in one repeat."""

    seconds: float
    """From the first call to the last answer."""
    calls_s: list[float]
    """How long each call took."""
    items: int


@dataclass
class Record:
    """All repeats of one system, size and case."""

    system: str
    item_bytes: int
    case: Case
    timings: list[Timing] = field(default_factory=list)

    def row(self) -> dict[str, Any]:
        """Medians of the repeats; latencies over all calls of all repeats."""
        rates = [timing.items / timing.seconds for timing in self.timings]
        rate = statistics.median(rates)
        calls = np.concatenate([timing.calls_s for timing in self.timings]) * 1e3
        return {
            "system": self.system,
            "item_bytes": self.item_bytes,
            "case": self.case.value,
            "items_per_s": round(rate, 1),
            "gb_per_s": round(rate * self.item_bytes / 1e9, 4),
            "p50_ms": round(float(np.percentile(calls, 50)), 4),
            "p99_ms": round(float(np.percentile(calls, 99)), 4),
            "items_per_s_range": [round(min(rates), 1), round(max(rates), 1)],
        }


class System(Protocol):
    """A queue under measurement."""

    name: str

    async def start(self) -> None:
        """Start its processes."""

    async def measure(self, put: Case, item_bytes: int, count: int) -> dict[Case, Timing]:
        """Put ``count`` new items in the way of ``put`` and take them out again; the queue is empty before and after."""

    async def stop(self) -> None:
        """End its processes; what it wrote is gone."""


def get_case(put: Case) -> Case | None:
    """How the items of a put case are taken out: the pipelined and waiting cases only empty the queue."""
    return {Case.PUT_SINGLE: Case.GET_SINGLE, Case.PUT_BATCHED: Case.GET_BATCHED}.get(put)


def item_count(put: Case, item_bytes: int, most_mb: float) -> int:
    """Items of one repeat: up to ``most_mb`` of them, a number of whole batches; fewer one at a time."""
    if put in ONE_BATCH:
        return BATCH
    batches = int(most_mb * 1e6 / item_bytes) // BATCH
    most = 4 if put is Case.PUT_SINGLE else 16
    return BATCH * min(max(batches, 1), most)


def item_arrays(item_bytes: int, seed: int) -> dict[str, npt.NDArray[Any]]:
    """The arrays of one trajectory of about ``item_bytes`` bytes: random tokens, the first tenth a prompt."""
    rng = np.random.default_rng(seed)
    tokens = max(item_bytes // BYTES_A_TOKEN, 2)
    sampled = np.arange(tokens) >= max(tokens // 10, 1)
    return {
        "tokens": rng.integers(0, 150_000, tokens).astype(np.int32),
        "trainable": sampled,
        "logprobs": np.where(sampled, rng.standard_normal(tokens), 0).astype(np.float32),
        "versions": np.where(sampled, 0, -1).astype(np.int32),
    }


def waiting_change(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What a waiting consumer does to the latency of a put, by system and size."""
    by_case = {(row["system"], row["item_bytes"], row["case"]): row for row in rows}
    changes = []
    for (system, size, case), alone in by_case.items():
        waiting = by_case.get((system, size, Case.PUT_WAITING.value))
        if case == Case.PUT_ALONE.value and waiting is not None:
            latencies = {name: [alone[name], waiting[name]] for name in ("p50_ms", "p99_ms")}
            change = round(waiting["p50_ms"] / alone["p50_ms"] - 1, 3)
            changes.append({"system": system, "item_bytes": size, **latencies, "p50_change": change})
    return changes
