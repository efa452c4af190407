"""Many updates in a row under load: how long each held requests up, and whether any token, request or stamp suffered.

The real fleet, engine actors, transport and engine client; a tiny model; requests follow one another without a pause. A
request sees an update as a longer wait for its next token. That wait, less the usual one, in units of the usual one, is
the update's stall in decode steps. Steps in which no update falls are measured the same way: what they come late by is the
machine's doing, and no stall is told apart from it.
"""

from __future__ import annotations

import asyncio
import itertools
import shutil
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from orchestrator.fleet import Fleet, FleetEvents
from rollout_workers.engine_client import EngineClient, RayEngineHandle
from rollout_workers.engines.actor import EngineActor
from rollout_workers.engines.config import EnginesConfig
from rollout_workers.engines.protocol import FinishReason, GenerateRequest, TokenChunk
from weight_sync.config import WeightsConfig
from weight_sync.membership import MemberState

LIMIT_S = 300.0
"""How long the engines may take to start, or the requests in flight at the end to finish."""
PROMPT = 24


@dataclass(frozen=True)
class UpdateLoad:
    """``requests`` in flight on each of ``engines`` engines, ``tokens`` each, while ``updates`` versions are published."""

    engines: int = 2
    requests: int = 32
    tokens: int = 128
    updates: int = 50
    rolling: bool = True
    kv: str = "keep"
    transport: str = "shared_memory"
    pause_s: float = 0.1
    """Between the end of an update and the next one."""
    seed: int = 0


class MeasuredEngine(EngineActor):
    """The real engine actor, which remembers when its steps ended and when it switched weights."""

    def __init__(self, name: str, config: EnginesConfig) -> None:
        super().__init__(name, config)
        self._steps: list[tuple[float, int]] = []
        self._commits: list[tuple[float, float]] = []

    def _step(self) -> list[TokenChunk]:
        before = self._engine.counters.generated_tokens
        chunks = super()._step()
        self._steps.append((time.perf_counter(), self._engine.counters.generated_tokens - before))
        return chunks

    async def commit(self, version: int, kv: str) -> int:
        began_at = time.perf_counter()
        served = await super().commit(version, kv)
        self._commits.append((began_at, time.perf_counter()))
        return served

    async def measured(self) -> tuple[list[tuple[float, int]], list[tuple[float, float]], int]:
        """Ends of steps with the tokens that each sampled, begin and end of each commit, and tokens sampled in all."""
        return self._steps, self._commits, int(self._engine.counters.generated_tokens)


@dataclass
class Received:
    """What came back to the worker's side."""

    requests: int = 0
    tokens: int = 0
    aborted: int = 0
    wrong_stamps: int = 0
    """Requests with a version that goes back, or that did not exist when the request ended."""
    versions: set[int] = field(default_factory=set)

    def take(self, result: TokenChunk, newest: int) -> None:
        self.requests += 1
        self.tokens += len(result.tokens)
        self.aborted += result.finish_reason in (FinishReason.ABORT, FinishReason.ERROR)
        versions = result.versions
        self.wrong_stamps += bool((np.diff(versions) < 0).any() or (versions > newest).any() or (versions < 0).any())
        self.versions.update(int(version) for version in np.unique(versions))


def measure_updates(load: UpdateLoad, model_path: Path) -> dict[str, Any]:
    """One row of results. Starts Ray and stops it."""
    import ray

    from orchestrator.config import Config
    from orchestrator.launch import start_ray

    temporary = start_ray(Config())
    try:
        return asyncio.run(_measure(load, model_path))
    finally:
        ray.shutdown()
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


async def _measure(load: UpdateLoad, model_path: Path) -> dict[str, Any]:
    import ray
    from transformers import AutoModelForCausalLM

    from weight_sync.transports.select import make_sender

    config = EnginesConfig(slots=2 * load.requests, max_len=PROMPT + load.tokens, threads=1, stream_every=8)
    model = AutoModelForCausalLM.from_pretrained(model_path)
    weights = WeightsConfig(rolling=load.rolling, kv=load.kv, transport=load.transport)
    sender = make_sender(weights, load.transport)
    actor = ray.remote(MeasuredEngine).options(num_cpus=0, max_concurrency=1000)
    handles = {f"engine-{index}": actor.remote(f"engine-{index}", config) for index in range(load.engines)}
    client, received = EngineClient("bench"), Received()
    fleet = Fleet(weights, 0, _transfer_of(sender), _events(sender, model))
    try:
        async with _within_limit("engines that serve"):
            for name, handle in handles.items():
                fleet.starting(name)
                await handle.load.remote(str(model_path), "float32", 1, 0)
                await fleet.join(name, handle, 0)
                client.add_engine(name, RayEngineHandle(handle, name))
        seconds = await _publish_under_load(load, fleet, client, received, int(model.config.vocab_size))
        measured = [await handle.measured.remote() for handle in handles.values()]
        versions = [fleet.held(name) for name in handles]
    finally:
        await client.close()
        for handle in handles.values():
            await handle.stop.remote()
            ray.kill(handle)
        sender.close()
    return row(load, measured, received, versions, seconds)


async def _publish_under_load(
    load: UpdateLoad, fleet: Fleet, client: EngineClient, received: Received, vocabulary: int
) -> list[float]:
    """Publish one version after another while requests go on; returns the seconds that each took."""
    rng, numbers, over = np.random.default_rng(load.seed), itertools.count(), asyncio.Event()

    async def one_after_another() -> None:
        while not over.is_set():
            number = next(numbers)
            prompt = rng.integers(2, vocabulary, PROMPT).astype(np.int32)
            request = GenerateRequest(
                request_id=f"r{number}", session_id=f"s{number}", prompt=prompt, max_tokens=load.tokens, seed=number
            )
            result = await client.generate(request)
            received.take(result, fleet.membership.current_version)
            client.release(request.session_id)

    tasks = [asyncio.create_task(one_after_another()) for _ in range(load.requests * load.engines)]
    seconds = []
    try:
        await asyncio.sleep(1.0)  # let the slots fill: the first requests all began together
        for version in range(1, load.updates + 1):
            began_at = time.perf_counter()
            await fleet.publish(version)
            seconds.append(time.perf_counter() - began_at)
            await asyncio.sleep(load.pause_s)
        over.set()
        async with _within_limit("the end of the last requests"):
            await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
    return seconds


@asynccontextmanager
async def _within_limit(what: str) -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(LIMIT_S):
            yield
    except TimeoutError:
        raise TimeoutError(f"no {what} within {LIMIT_S:g} s") from None


def _transfer_of(sender: Any) -> Any:
    async def transfer(version: int, members: list[tuple[str, Any]]) -> list[str]:
        offer = await asyncio.to_thread(sender.offer, [name for name, _ in members])
        stages = [_answer(handle.stage.remote(offer)) for _, handle in members]
        _, *results = await asyncio.gather(asyncio.to_thread(sender.send), *stages, return_exceptions=True)
        return [name for (name, _), result in zip(members, results, strict=True) if result == version]

    return transfer


def _events(sender: Any, model: Any) -> FleetEvents:
    async def nothing(*_: Any) -> None:
        return None

    async def prepare(version: int) -> None:
        await asyncio.to_thread(sender.prepare, version, list(model.named_parameters()), [])

    def changed(name: str, state: MemberState, version: int | None, why: str) -> None:
        del name, state, version, why

    def broken(name: str, reason: str) -> None:
        raise RuntimeError(f"{name} did not take the weights: {reason}")

    return FleetEvents(nothing, prepare, nothing, nothing, nothing, broken, changed)


async def _answer(reference: Any) -> Any:
    return await reference


def row(
    load: UpdateLoad,
    measured: list[tuple[list[tuple[float, int]], list[tuple[float, float]], int]],
    received: Received,
    versions: list[int | None],
    seconds: list[float],
) -> dict[str, Any]:
    """The figures of one load. Times in milliseconds, stalls in decode steps."""
    periods = [usual_period_s(steps, commits) for steps, commits, _ in measured]
    stalls, others = (
        np.concatenate(
            [
                stalls_in_steps(steps, commits, period, at_updates)
                for (steps, commits, _), period in zip(measured, periods, strict=True)
            ]
        )
        for at_updates in (True, False)
    )
    swaps = np.asarray([end - begin for _, commits, _ in measured for begin, end in commits])
    sampled = sum(tokens for _, _, tokens in measured)
    return {
        "engines": load.engines,
        "requests_in_flight": load.requests * load.engines,
        "updates": load.updates,
        "rolling": load.rolling,
        "kv": load.kv,
        "transport": load.transport,
        "step_ms": round(1000 * float(np.mean(periods)), 3),
        "stall_steps": {name: round(float(np.quantile(stalls, share)), 3) for name, share in QUANTILES.items()},
        "late_without_update_steps": {
            name: round(float(np.quantile(others, share)), 3) for name, share in QUANTILES.items()
        },
        "swap_ms": {name: round(1000 * float(np.quantile(swaps, share)), 3) for name, share in QUANTILES.items()},
        "publish_ms": {name: round(1000 * float(np.quantile(seconds, share)), 1) for name, share in QUANTILES.items()},
        "requests": received.requests,
        "aborted": received.aborted,
        "lost_tokens": sampled - received.tokens,
        "wrong_stamps": received.wrong_stamps,
        "versions_seen": len(received.versions),
        "all_at_the_last_version": versions == [load.updates] * load.engines,
    }


QUANTILES = {"p50": 0.5, "p99": 0.99, "max": 1.0}


def usual_period_s(steps: list[tuple[float, int]], commits: list[tuple[float, float]]) -> float:
    """Median time between the ends of two steps that sampled, with no commit in between."""
    ends = np.asarray([at for at, tokens in steps if tokens])
    gaps = np.diff(ends)
    return float(np.median(gaps[~_holds_commit(ends, commits)]))


def stalls_in_steps(
    steps: list[tuple[float, int]], commits: list[tuple[float, float]], period_s: float, at_updates: bool = True
) -> npt.NDArray[np.float64]:
    """For each commit: how much longer than usual a request waited for its next token, in usual steps (0 at least).

    Without ``at_updates``: the same for every wait in which no commit fell.

    >>> steps = [(0.0, 1), (1.0, 1), (3.5, 1), (4.5, 1)]
    >>> stalls_in_steps(steps, [(1.2, 1.4)], 1.0).tolist()
    [1.5]
    >>> stalls_in_steps(steps, [(1.2, 1.4)], 1.0, at_updates=False).tolist()
    [0.0, 0.0]
    """
    ends = np.asarray([at for at, tokens in steps if tokens])
    gaps = np.diff(ends)[_holds_commit(ends, commits) == at_updates]
    stalls: npt.NDArray[np.float64] = np.maximum(0.0, gaps / period_s - 1.0)
    return stalls


def _holds_commit(ends: npt.NDArray[np.float64], commits: list[tuple[float, float]]) -> npt.NDArray[np.bool_]:
    """For each gap between two ends whether a commit lies in it."""
    found = np.zeros(len(ends) - 1, np.bool_)
    after = np.searchsorted(ends, [begin for begin, _ in commits])
    found[[index - 1 for index in after.tolist() if 0 < index < len(ends)]] = True
    return found
