"""The queues that are measured from this process: Millrace's, an actor with a deque, and ``ray.util.queue``.

Every put begins with arrays and every get ends with arrays, so each system pays for its own serialisation.
"""

from __future__ import annotations

import asyncio
import shutil
import tempfile
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.queue.samples import BATCH, IN_FLIGHT, ONE_BATCH, Case, Timing, get_case, item_arrays
from experience.config import QueueConfig, QueueTransport, StalenessConfig
from experience.entries import Added, make_entry
from experience.records import GroupHeader, Task, Trajectory
from experience.transport.client import QueueConsumer, QueueProducer, consumer_for, producer_for
from experience.wire import decode_group, encode

TIME_OUT_S = 120.0
GROUP = 8
"""Episodes of a group of Millrace; the case with a waiting consumer has one group of a whole batch."""


class InProcess(ABC):
    """Drives a queue by awaiting puts and gets on the event loop of this process."""

    name: str

    def __init__(self, seed: int) -> None:
        self._seed = seed

    @abstractmethod
    async def start(self) -> None: ...

    @abstractmethod
    async def stop(self) -> None: ...

    @abstractmethod
    async def new_items(self, item_bytes: int, count: int, put: Case) -> Sequence[Any]:
        """Make ``count`` items; not timed."""

    @abstractmethod
    async def put(self, items: Sequence[Any]) -> None:
        """One call."""

    @abstractmethod
    async def get(self, limit: int) -> int:
        """One call for up to ``limit`` items; returns how many came."""

    @abstractmethod
    async def taken(self) -> None:
        """All items of this repeat were taken; not timed."""

    async def get_batch(self) -> None:
        """Wait for a whole batch."""
        await self.get(BATCH)

    async def measure(self, put: Case, item_bytes: int, count: int) -> dict[Case, Timing]:
        async with asyncio.timeout(TIME_OUT_S):
            items = await self.new_items(item_bytes, count, put)
            timings = {put: await self._put_all(put, items)}
            case = get_case(put)
            if put not in ONE_BATCH:
                gets = await self._get_all(1 if case is Case.GET_SINGLE else BATCH, count)
                if case is not None:
                    timings[case] = gets
            await self.taken()
        return timings

    async def _put_all(self, put: Case, items: Sequence[Any]) -> Timing:
        if put in ONE_BATCH:
            consumer = asyncio.create_task(self.get_batch()) if put is Case.PUT_WAITING else None
            if consumer is not None:
                await asyncio.wait([consumer], timeout=0.05)
            timing = await _one_by_one([partial(self.put, [item]) for item in items[:-1]])
            await self.put(items[-1:])
            await (self.get_batch() if consumer is None else consumer)
            return timing
        if put is Case.PUT_BATCHED:
            batches = [items[first : first + BATCH] for first in range(0, len(items), BATCH)]
            timing = await _one_by_one([partial(self.put, batch) for batch in batches])
            return Timing(timing.seconds, timing.calls_s, len(items))
        calls = [partial(self.put, [item]) for item in items]
        return await (_one_by_one(calls) if put is Case.PUT_SINGLE else _pipelined(calls))

    async def _get_all(self, limit: int, count: int) -> Timing:
        got, calls = 0, []
        began_at = time.perf_counter()
        while got < count:
            call_at = time.perf_counter()
            got += await self.get(min(limit, count - got))
            calls.append(time.perf_counter() - call_at)
        return Timing(time.perf_counter() - began_at, calls, count)


async def _one_by_one(calls: Sequence[Callable[[], Awaitable[None]]]) -> Timing:
    seconds = []
    began_at = time.perf_counter()
    for call in calls:
        call_at = time.perf_counter()
        await call()
        seconds.append(time.perf_counter() - call_at)
    return Timing(time.perf_counter() - began_at, seconds, len(calls))


async def _pipelined(calls: Sequence[Callable[[], Awaitable[None]]]) -> Timing:
    left, seconds = deque(calls), []

    async def lane() -> None:
        while left:
            call = left.popleft()
            call_at = time.perf_counter()
            await call()
            seconds.append(time.perf_counter() - call_at)

    began_at = time.perf_counter()
    await asyncio.gather(*(lane() for _ in range(IN_FLIGHT)))
    return Timing(time.perf_counter() - began_at, seconds, len(calls))


def separate_items(item_bytes: int, seed: int, count: int) -> list[dict[str, Any]]:
    """Items that share no memory: a pickle holds what is the same object only once."""
    arrays = item_arrays(item_bytes, seed)
    return [{name: array.copy() for name, array in arrays.items()} for _ in range(count)]


class Millrace(InProcess):
    """The queue actor of a run, through the clients that workers and learner use. An item is a finished episode."""

    def __init__(self, seed: int, *, journal: bool = True, transport: QueueTransport = QueueTransport.socket) -> None:
        super().__init__(seed)
        self.name = "millrace" + ("" if journal else ", no journal")
        self.name += " over Ray calls" if transport is QueueTransport.ray else ""
        self._config = QueueConfig(min_size=1, budget_mb=4096.0, journal=journal, transport=transport)
        self._index = 0
        self._step = 0
        self._leased: list[str] = []
        self._tokens = 0

    async def start(self) -> None:
        import ray

        from orchestrator.queue_actor import QueueActor

        self._directory = tempfile.mkdtemp(prefix="millrace-bench-")
        journal = Path(self._directory) if self._config.journal else None
        actor = ray.remote(QueueActor).options(num_cpus=0, max_concurrency=1000)
        self._actor = actor.remote(self._config, StalenessConfig(max_lag=1 << 30), BATCH, journal)
        await self._actor.begin.remote(None)
        self._producer: QueueProducer = await producer_for(self._actor)
        self._consumer: QueueConsumer = await consumer_for(self._actor)

    @property
    def route(self) -> str:
        """How episodes travelled."""
        return self._producer.route

    async def stop(self) -> None:
        import ray

        await self._actor.stop.remote()
        ray.kill(self._actor)
        shutil.rmtree(self._directory, ignore_errors=True)

    async def new_items(self, item_bytes: int, count: int, put: Case) -> Sequence[Any]:
        size = {Case.PUT_ALONE: BATCH, Case.PUT_WAITING: BATCH, Case.PUT_SINGLE: 1}.get(put, GROUP)
        task = Task(task_id="task", environment="none", payload={})
        headers = []
        for _ in range(count // size):
            group_id = f"g{self._index}"
            headers.append(
                GroupHeader(group_id=group_id, index=self._index, task=task, size=size, version_floor=0, seed=0)
            )
            self._index += 1
        await self._actor.open.remote(encode(headers))
        arrays = item_arrays(item_bytes, self._seed)
        return [
            Trajectory(
                trajectory_id=f"{episode_id}.0",
                episode_id=episode_id,
                group_id=header.group_id,
                task_id="task",
                reward=1.0,
                tokens=arrays["tokens"],
                trainable=arrays["trainable"],
                logprobs=arrays["logprobs"],
                versions=arrays["versions"],
            )
            for header in headers
            for episode_id in header.episode_ids
        ]

    async def put(self, items: Sequence[Any]) -> None:
        results = await self._producer.add([make_entry([item]) for item in items])
        if results != [Added.ACCEPTED] * len(items):
            raise RuntimeError(f"the queue answered {results} where all episodes are new")

    async def get(self, limit: int) -> int:
        encoded = await self._consumer.lease("bench", limit if limit == 1 else max(1, limit // GROUP), self._step, 30.0)
        groups = [decode_group(data) for data in encoded]
        self._leased += [group.group_id for group in groups]
        self._tokens += sum(group.sampled_tokens for group in groups)
        return sum(len(group.trajectories) for group in groups)

    async def taken(self) -> None:
        await self._actor.ack.remote(self._leased, self._step, self._tokens, 0)
        await self._actor.commit.remote(self._step)
        await self._actor.events.remote(0.0)
        self._step += 1
        self._leased, self._tokens = [], 0


class RayActor(InProcess):
    """Pickled bytes in a deque inside one actor, the usual hand-made queue."""

    name = "ray-actor"

    async def start(self) -> None:
        import ray

        self._actor = ray.remote(DequeActor).options(num_cpus=0, max_concurrency=1000).remote()
        await self._actor.put.remote([])

    async def stop(self) -> None:
        import ray

        ray.kill(self._actor)

    async def new_items(self, item_bytes: int, count: int, put: Case) -> Sequence[Any]:
        return separate_items(item_bytes, self._seed, count)

    async def put(self, items: Sequence[Any]) -> None:
        import ray

        await self._actor.put.remote([ray.cloudpickle.dumps(item) for item in items])

    async def get(self, limit: int) -> int:
        import ray

        return len([ray.cloudpickle.loads(item) for item in await self._actor.get.remote(limit)])

    async def taken(self) -> None:
        return None


class DequeActor:
    """What `RayActor` talks to."""

    def __init__(self) -> None:
        self._items: deque[bytes] = deque()
        self._arrived = asyncio.Condition()

    async def put(self, items: list[bytes]) -> None:
        self._items.extend(items)
        async with self._arrived:
            self._arrived.notify_all()

    async def get(self, count: int) -> list[bytes]:
        """Waits until there are ``count``."""
        async with self._arrived:
            await asyncio.wait_for(self._arrived.wait_for(lambda: len(self._items) >= count), TIME_OUT_S)
        return [self._items.popleft() for _ in range(count)]


class RayQueue(InProcess):
    """``ray.util.queue.Queue``, which has no call that waits for several: a waiting consumer takes one at a time."""

    name = "ray-queue"

    async def start(self) -> None:
        from ray.util.queue import Queue

        self._queue = Queue(actor_options={"num_cpus": 0})
        await self._queue.put_async(None)
        await self._queue.get_async()

    async def stop(self) -> None:
        self._queue.shutdown(force=True)

    async def new_items(self, item_bytes: int, count: int, put: Case) -> Sequence[Any]:
        return separate_items(item_bytes, self._seed, count)

    async def put(self, items: Sequence[Any]) -> None:
        if len(items) == 1:
            await self._queue.put_async(items[0])
        else:
            self._queue.put_nowait_batch(list(items))

    async def get(self, limit: int) -> int:
        if limit > 1:
            return len(self._queue.get_nowait_batch(limit))
        await self._queue.get_async()
        return 1

    async def get_batch(self) -> None:
        for _ in range(BATCH):
            await self._queue.get_async()

    async def taken(self) -> None:
        return None
