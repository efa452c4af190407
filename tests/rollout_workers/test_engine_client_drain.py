"""Engines that drain or die while requests are in flight: what a request gets does not depend on it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st
from test_engine_client import HandOperatedEngine, chunk, request, submitted

from experience.wire import decode, encode
from rollout_workers.engine_client import EngineClient, SubmitBatch
from rollout_workers.engines.protocol import FinishReason, GenerateRequest, TokenChunk


async def test_a_draining_engine_gets_nothing_new_and_what_it_has_may_end() -> None:
    leaving, other, client = HandOperatedEngine(), HandOperatedEngine(), EngineClient("w")
    client.add_engine("leaving", leaving)
    first = asyncio.create_task(client.generate(request("a")))
    await submitted(leaving, 1)
    client.add_engine("other", other)
    drained = asyncio.create_task(client.drain_engine("leaving", 20.0))
    await asyncio.sleep(0)
    second = asyncio.create_task(client.generate(request("a2")))
    await submitted(other, 1)
    assert not drained.done()
    leaving.answer(chunk("a", [1, 2], FinishReason.STOP))
    assert await drained == (1, 0)
    assert (await first).tokens.tolist() == [1, 2]
    other.answer(chunk("a2", [3], FinishReason.STOP))
    assert (await second).tokens.tolist() == [3]
    assert client.continued == 0
    assert len(leaving.requests) == 1
    await client.close()


async def test_what_has_not_ended_in_time_is_aborted_and_goes_on_elsewhere_from_its_last_token() -> None:
    leaving, other, client = HandOperatedEngine(), HandOperatedEngine(), EngineClient("w")
    client.add_engine("leaving", leaving)
    call = asyncio.create_task(client.generate(request("a")))
    await submitted(leaving, 1)
    client.add_engine("other", other)
    drained = asyncio.create_task(client.drain_engine("leaving", 0.0))
    async with asyncio.timeout(20):
        while not any(batch.aborts for batch in leaving.batches):
            leaving.submitted.clear()
            await leaving.submitted.wait()
    leaving.answer(chunk("a", [7, 8], FinishReason.ABORT, version=1))
    assert await drained == (0, 1)
    await submitted(other, 1)
    assert other.requests[0].prompt.tolist() == [0, 1, 2, 7, 8]
    assert other.requests[0].max_tokens == 2
    other.answer(chunk("a", [9, 10], FinishReason.LENGTH, version=2))
    result = await call
    assert result.tokens.tolist() == [7, 8, 9, 10]
    assert result.versions.tolist() == [1, 1, 2, 2]
    await client.close()


async def test_an_engine_that_dies_while_it_drains_is_drained() -> None:
    leaving, other, client = HandOperatedEngine(), HandOperatedEngine(), EngineClient("w")
    client.add_engine("leaving", leaving)
    call = asyncio.create_task(client.generate(request("a")))
    await submitted(leaving, 1)
    client.add_engine("other", other)
    drained = asyncio.create_task(client.drain_engine("leaving", 20.0))
    await asyncio.sleep(0)
    leaving.die()
    async with asyncio.timeout(20):
        await drained
    await submitted(other, 1)
    other.answer(chunk("a", [1, 2, 3, 4], FinishReason.LENGTH))
    assert (await call).tokens.tolist() == [1, 2, 3, 4]
    await client.close()


async def test_when_the_last_engine_drains_requests_wait_for_another() -> None:
    leaving, other, client = HandOperatedEngine(), HandOperatedEngine(), EngineClient("w")
    client.add_engine("leaving", leaving)
    assert await client.drain_engine("leaving", 0.0) == (0, 0)
    assert await client.drain_engine("leaving", 0.0) == (0, 0)
    call = asyncio.create_task(client.generate(request("a")))
    await asyncio.sleep(0.01)
    assert not call.done()
    client.add_engine("other", other)
    await submitted(other, 1)
    other.answer(chunk("a", [1], FinishReason.STOP))
    assert (await call).tokens.tolist() == [1]
    await client.close()


async def test_it_is_told_when_the_requests_of_a_lost_engine_have_another_place() -> None:
    first, second, client = HandOperatedEngine(), HandOperatedEngine(), EngineClient("w")
    client.add_engine("first", first)
    call = asyncio.create_task(client.generate(request("a")))
    await submitted(first, 1)
    first.die()
    told = asyncio.create_task(client.relocated("first", 5.0))
    await asyncio.sleep(0.01)
    assert await client.relocated("nobody", 5.0) is None
    assert not told.done()
    client.add_engine("second", second)
    await submitted(second, 1)
    loss = await client.relocated("first", 5.0)
    assert loss is not None
    assert loss.requests == 1
    assert loss.placed_at >= loss.noticed_at
    second.answer(chunk("a", [1], FinishReason.STOP))
    await call
    await told
    await client.close()


class CountingEngine:
    """Continues every context by counting on; `tick` samples one token a request. Dies when it is told to."""

    def __init__(self, report_every: int) -> None:
        self._report_every = report_every
        self._requests: dict[str, GenerateRequest] = {}
        self._made: dict[str, list[int]] = {}
        self._counts: dict[str, int] = {}
        self._chunks: list[TokenChunk] = []
        self._ready = asyncio.Event()
        self.dead = False

    async def submit(self, batch: bytes) -> None:
        self._check()
        decoded = decode(batch, SubmitBatch)
        for made in decoded.requests:
            self._requests[made.request_id] = made
            self._made[made.request_id] = []
            self._counts[made.request_id] = 0
        for name in decoded.aborts:
            if name in self._requests:
                self._report(name, FinishReason.ABORT)

    async def collect(self, client: str) -> bytes:
        await self._ready.wait()
        self._check()
        self._ready.clear()
        chunks, self._chunks = self._chunks, []
        return encode(chunks)

    def tick(self) -> None:
        for name, made in list(self._requests.items()):
            tokens = self._made[name]
            tokens.append(len(made.prompt) + self._counts[name])
            self._counts[name] += 1
            if self._counts[name] == made.max_tokens:
                self._report(name, FinishReason.LENGTH)
            elif len(tokens) >= self._report_every:
                self._report(name, None)

    def die(self) -> None:
        self.dead = True
        self._ready.set()

    def _report(self, name: str, reason: FinishReason | None) -> None:
        self._chunks.append(chunk(name, self._made[name], reason))
        self._made[name] = []
        if reason is not None:
            del self._requests[name], self._made[name], self._counts[name]
        self._ready.set()

    def _check(self) -> None:
        if self.dead:
            raise ConnectionError("gone")


EVENTS = st.sampled_from(["tick", "tick", "tick", "drain", "drain at once", "die", "join"])


@given(events=st.lists(EVENTS, min_size=5, max_size=40), report_every=st.integers(1, 5))
@settings(max_examples=60, deadline=None)
def test_whatever_happens_to_the_engines_every_token_arrives_once(events: list[str], report_every: int) -> None:
    asyncio.run(asyncio.wait_for(_play(events, report_every), 20))


async def _play(events: Iterable[str], report_every: int) -> None:
    client, engines = EngineClient("w"), dict[str, CountingEngine]()
    drains: list[asyncio.Task[tuple[int, int]]] = []

    def join() -> None:
        name = f"e{len(engines)}"
        engines[name] = CountingEngine(report_every)
        client.add_engine(name, engines[name])

    join()
    calls = [asyncio.create_task(client.generate(request(f"r{n}", prompt=3 + n, max_tokens=12))) for n in range(5)]
    await _settle()
    for event in events:
        serving = list(client._router.members)
        if event == "join":
            join()
        elif event == "die" and serving:
            engines[serving[0]].die()
        elif event.startswith("drain") and serving:
            drains.append(asyncio.create_task(client.drain_engine(serving[0], 0.0 if event.endswith("once") else 20.0)))
        for engine in engines.values():
            engine.tick()
        await _settle()
    if not client._router.members:
        join()
    while not all(call.done() for call in calls):
        for engine in engines.values():
            engine.tick()
        await _settle()
    for number, call in enumerate(calls):
        assert call.result().tokens.tolist() == list(range(3 + number, 15 + number))
        assert call.result().finish_reason is FinishReason.LENGTH
        assert len(call.result().logprobs) == len(call.result().versions) == 12
    await asyncio.gather(*drains)
    await client.close()


async def _settle() -> None:
    """Let every task go on as far as it can without a tick."""
    for _ in range(12):
        await asyncio.sleep(0)


def pinned(name: str, version: int) -> GenerateRequest:
    return msgspec.structs.replace(request(name), pinned_version=version)


async def test_an_engine_that_joined_later_gets_no_request_for_an_older_version() -> None:
    old, new, client = HandOperatedEngine(), HandOperatedEngine(), EngineClient("w")
    client.add_engine("old", old, since=0)
    client.add_engine("new", new, since=5)
    calls = [asyncio.create_task(client.generate(pinned(f"r{n}", 3))) for n in range(4)]
    await submitted(old, 4)
    calls += [asyncio.create_task(client.generate(pinned(f"later{n}", 5))) for n in range(4)]
    await submitted(new, 4)
    assert {r.pinned_version for r in old.requests} == {3}
    assert {r.pinned_version for r in new.requests} == {5}
    old.die()
    await submitted(new, 8)
    assert [r.pinned_version for r in new.requests[4:]] == [None] * 4
    new.answer(*(chunk(r.request_id, [1, 2, 3, 4], FinishReason.LENGTH, version=6) for r in new.requests))
    results = await asyncio.gather(*calls)
    assert {int(version) for result in results for version in result.versions} == {6}
    await client.close()
