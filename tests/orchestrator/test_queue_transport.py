"""The queue behind its socket: producers and consumers that lose connections, a full budget, a full disk, a dead queue."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest
import uvloop
from experience_builders import entry, header

from experience import wire
from experience.config import QueueConfig, StalenessConfig
from experience.entries import Added, EpisodeEntry, LeasedGroup
from experience.journal import Journal, JournalReader
from experience.queue import ExperienceQueue
from experience.staleness import make_policy
from experience.transport.client import QueueCallError, QueueConsumer, QueueProducer
from experience.transport.frames import Endpoint, Kind, LeaseRequest, head
from experience.transport.server import QueueServer
from orchestrator.queue_actor import QueueActor

ROOM = QueueConfig(min_size=1)


@pytest.fixture(params=[uvloop.EventLoopPolicy, asyncio.DefaultEventLoopPolicy], ids=["uvloop", "asyncio"])
def event_loop_policy(request: pytest.FixtureRequest) -> asyncio.AbstractEventLoopPolicy:
    """Actors run on uvloop where Ray finds it."""
    policy: asyncio.AbstractEventLoopPolicy = request.param()
    return policy


class Side:
    """A queue with a socket, and what its clients fall back to."""

    def __init__(self, actor: QueueActor, server: QueueServer, endpoint: Endpoint) -> None:
        self.actor, self.server, self.endpoint = actor, server, endpoint
        self.fallbacks = 0

    def producer(self, endpoint: Endpoint | None = None) -> QueueProducer:
        async def add(entries: bytes) -> bytes:
            self.fallbacks += 1
            return await self.actor.add(entries)

        return QueueProducer(endpoint or self.endpoint, add)

    def consumer(self) -> QueueConsumer:
        async def lease(request: LeaseRequest) -> list[bytes]:
            self.fallbacks += 1
            return await self.actor.lease(
                request.consumer, request.limit, request.version, request.timeout_s, request.number
            )

        return QueueConsumer(self.endpoint, lease)

    async def open(self, *indices: int, size: int = 2) -> None:
        await self.actor.open(wire.encode([header(index, size) for index in indices]))


@asynccontextmanager
async def queue_with_socket(config: QueueConfig = ROOM, journal: Path | None = None) -> AsyncIterator[Side]:
    actor = QueueActor(config, StalenessConfig(max_lag=100), 2, journal)
    await actor.begin(None)
    server = QueueServer(actor)
    actor._server.close()
    actor._server = server
    side = Side(actor, server, await server.start("127.0.0.1"))
    try:
        async with asyncio.timeout(60):
            yield side
    finally:
        await actor.stop()


def episodes(index: int, size: int = 2, padding: int = 0) -> list[EpisodeEntry]:
    return [entry(f"g{index}", f"g{index}-{position}", padding=padding) for position in range(size)]


@pytest.mark.parametrize("network", ["unix", "tcp"])
async def test_groups_arrive_as_they_were_added(network: str, tmp_path: Path) -> None:
    async with queue_with_socket(journal=tmp_path) as side:
        if network == "tcp":
            side.endpoint = msgspec.structs.replace(side.endpoint, local="\0millrace-not-here")
        await side.open(0, 1)
        producer, consumer = side.producer(), side.consumer()
        large = [entry("g1", f"g1-{position}", padding=200_000) for position in range(2)]
        assert await producer.add([*episodes(0), *large]) == [Added.ACCEPTED] * 4
        assert producer.route == network
        assert await producer.add(episodes(0)[:1]) == [Added.DUPLICATE]
        assert await producer.add([entry("g9", "g9-0")]) == [Added.UNKNOWN]
        groups = [wire.decode_group(data) for data in await consumer.lease("learner", 5, 0, 10.0)]
        assert [group.group_id for group in groups] == ["g0", "g1"]
        assert [wire.encode_trajectory(t) for t in groups[1].trajectories] == [e.trajectories[0] for e in large]
        assert side.fallbacks == 0
        on_disk = [kind for kind, _ in JournalReader(tmp_path).replay()]
        assert on_disk.count("add") == 4


async def test_a_waiting_consumer_gets_a_group_as_soon_as_it_is_complete() -> None:
    async with queue_with_socket() as side:
        await side.open(0)
        asking = asyncio.create_task(side.consumer().lease("learner", 1, 0, 60.0))
        producer = side.producer()
        await producer.add(episodes(0)[:1])
        assert not asking.done()
        await producer.add(episodes(0)[1:])
        assert [wire.decode_group(data).group_id for data in await asking] == ["g0"]


async def test_a_lease_ends_with_its_time_out() -> None:
    async with queue_with_socket() as side:
        assert await side.consumer().lease("learner", 1, 0, 0.05) == []


async def test_over_capacity_producers_wait_and_nothing_is_lost() -> None:
    count, size = 12, 4
    async with queue_with_socket(QueueConfig(min_size=1, budget_mb=0.1)) as side:
        await side.open(*range(count), size=size)
        producers = [side.producer(), side.producer()]
        adding = [
            asyncio.create_task(producers[index % 2].add(episodes(index, size, padding=1000))) for index in range(count)
        ]
        await asyncio.wait(adding, timeout=0.3)
        assert any(not task.done() for task in adding), "the budget holds back some of them"
        assert side.actor.queue.bytes_used <= 0.1 * 2**20
        consumer, seen = side.consumer(), []
        while len(seen) < count:
            groups = [wire.decode_group(data) for data in await consumer.lease("learner", 2, len(seen), 20.0)]
            for group in groups:
                assert len(group.trajectories) == size
                await side.actor.ack([group.group_id], len(seen), group.sampled_tokens, 0)
                seen.append(group.group_id)
        results = await asyncio.gather(*adding)
        assert results == [[Added.ACCEPTED] * size] * count
        assert sorted(seen) == sorted(f"g{index}" for index in range(count))
        ledger = await side.actor.ledger()
        assert ledger["groups"] == {"dispatched": count, "trained": count, "dropped": {}, "live": 0}
        assert side.fallbacks == 0


async def test_a_connection_lost_in_the_middle_of_a_call_costs_nothing() -> None:
    """The queue has the episodes but the answer is lost: they are offered again and taken once."""
    async with queue_with_socket() as side:
        await side.open(0)
        producer = side.producer()
        taken = asyncio.Event()
        side.actor.when_durable = lambda answer: taken.set()  # type: ignore[method-assign]
        adding = asyncio.create_task(producer.add(episodes(0)))
        await asyncio.wait_for(taken.wait(), 20)
        producer.close()
        assert await adding == [Added.DUPLICATE] * 2
        assert side.fallbacks == 1
        assert side.actor.queue.ready_groups == 1


async def test_a_lost_lease_answer_is_delivered_again_and_to_nobody_else() -> None:
    async with queue_with_socket() as side:
        await side.open(0, 1)
        await side.producer().add([*episodes(0), *episodes(1)])
        request = LeaseRequest(consumer="learner", limit=1, version=0, timeout_s=5.0, number=1)
        first = await side.actor.lease_groups(request)
        assert await side.actor.lease_groups(request) == first
        again = await side.actor.lease("learner", 1, 0, 5.0, 2)
        assert [wire.decode_group(data).group_id for data in again] == ["g1"]


async def test_a_waiting_lease_goes_on_over_the_fallback_when_its_connection_ends() -> None:
    async with queue_with_socket() as side:
        await side.open(0)
        consumer, asked, lease = side.consumer(), asyncio.Event(), side.actor.lease_groups

        async def lease_groups(request: LeaseRequest) -> list[LeasedGroup]:
            asked.set()
            return await lease(request)

        side.actor.lease_groups = lease_groups  # type: ignore[method-assign]
        asking = asyncio.create_task(consumer.lease("learner", 1, 0, 30.0))
        await asyncio.wait_for(asked.wait(), 20)
        consumer.close()
        await side.actor.add(wire.encode(episodes(0)))
        assert [wire.decode_group(data).group_id for data in await asking] == ["g0"]
        assert side.fallbacks == 1


async def test_a_stranger_is_shown_the_door(caplog: pytest.LogCaptureFixture) -> None:
    async with queue_with_socket() as side:
        await side.open(0)
        stranger = side.producer(msgspec.structs.replace(side.endpoint, token=b"guess"))
        assert await stranger.add(episodes(0)) == [Added.ACCEPTED] * 2, "the fallback checks rights of its own"
        assert side.fallbacks == 1
        assert "does not know the token" in caplog.text
        reader, writer = await asyncio.open_connection(side.endpoint.host, side.endpoint.port)
        writer.write(head(Kind.ADD, 1, 1 << 29))
        assert len(await reader.read()) < 100, "it got a challenge and the end of the connection"
        assert "over the limit of 256" in caplog.text
        writer.close()


async def test_what_is_not_an_episode_is_refused_by_name() -> None:
    async with queue_with_socket() as side:
        producer = side.producer()
        assert await producer.add([]) == []
        bad = msgspec.structs.replace(episodes(0)[0], tokens="many")
        with pytest.raises(QueueCallError, match="not an episode: cannot decode EpisodeEntry"):
            await producer.add([bad])


async def test_a_full_disk_is_told_to_the_producer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with queue_with_socket(journal=tmp_path) as side:
        await side.open(0)

        def full(self: Journal) -> None:
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patched:
            patched.setattr(Journal, "_write_pending", full)
            with pytest.raises(QueueCallError, match=r"cannot write the journal.*Free space"):
                await side.producer().add(episodes(0))
        assert await side.producer().add(episodes(0)) == [Added.DUPLICATE] * 2
        assert [kind for kind, _ in JournalReader(tmp_path).replay()].count("add") == 2


QUEUE_PROCESS = """
import asyncio, sys
from pathlib import Path
from experience.config import QueueConfig, StalenessConfig
from experience.transport.server import QueueServer
from experience import wire
from experience_builders import header
from orchestrator.queue_actor import QueueActor

async def main():
    actor = QueueActor(QueueConfig(min_size=1), StalenessConfig(max_lag=100), 2, Path(sys.argv[1]))
    await actor.begin(None)
    await actor.open(wire.encode([header(index, 4) for index in range(int(sys.argv[2]))]))
    endpoint = await QueueServer(actor).start("")
    sys.stdout.buffer.write(wire.encode(endpoint).hex().encode() + b"\\n")
    sys.stdout.flush()
    await asyncio.wait_for(asyncio.Event().wait(), 120)

asyncio.run(main())
"""


async def test_nothing_acknowledged_is_lost_when_the_queue_is_killed(tmp_path: Path) -> None:
    """kill -9 while episodes stream in; the journal has each acknowledged one, once."""
    count, size = 200, 4
    builders = str(Path(__file__).parents[1] / "experience")
    code = f"import sys; sys.path.insert(0, {builders!r})\n{QUEUE_PROCESS}"
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", code, str(tmp_path), str(count), stdout=subprocess.PIPE
    )
    try:
        assert process.stdout is not None
        line = await asyncio.wait_for(process.stdout.readline(), 60)
        endpoint = wire.decode(bytes.fromhex(line.decode()), Endpoint)

        async def dead(entries: bytes) -> bytes:
            raise ConnectionRefusedError("the queue is dead")

        producer = QueueProducer(endpoint, dead)
        acknowledged: list[str] = []

        async def produce(index: int) -> None:
            for added in episodes(index, size, padding=20_000):
                assert await producer.add([added]) == [Added.ACCEPTED]
                acknowledged.append(added.episode_id)
                if len(acknowledged) == count:
                    process.send_signal(signal.SIGKILL)

        async with asyncio.timeout(60):
            results = await asyncio.gather(*(produce(index) for index in range(count)), return_exceptions=True)
        assert any(isinstance(result, ConnectionRefusedError) for result in results)
        assert await asyncio.wait_for(process.wait(), 20) == -signal.SIGKILL
    finally:
        if process.returncode is None:
            process.kill()
    again = ExperienceQueue.recover(ROOM, make_policy(StalenessConfig(max_lag=100), 2), Journal(tmp_path), -1, 0.0)
    again.ledger.check()
    missing = {episode_id for group in again.in_flight() for episode_id in group.missing}
    assert len(acknowledged) >= count
    assert not missing & set(acknowledged)
