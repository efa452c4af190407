from __future__ import annotations

import asyncio
from collections import deque

import numpy as np
import pytest

from experience.wire import decode, encode
from rollout_workers.engine_client import MAX_ABORTS, EngineClient, SubmitBatch, joined, remaining
from rollout_workers.engines.clients import ClientBook
from rollout_workers.engines.protocol import EngineLoad, FinishReason, GenerateRequest, TokenChunk
from rollout_workers.errors import EngineFault


def request(name: str, prompt: int = 3, max_tokens: int = 4) -> GenerateRequest:
    return GenerateRequest(
        request_id=name, session_id=name, prompt=np.arange(prompt, dtype=np.int32), max_tokens=max_tokens
    )


def chunk(name: str, tokens: list[int], reason: FinishReason | None = None, version: int = 0) -> TokenChunk:
    return TokenChunk(
        request_id=name,
        tokens=np.asarray(tokens, np.int32),
        logprobs=np.zeros(len(tokens), np.float32),
        versions=np.full(len(tokens), version, np.int32),
        finish_reason=reason,
    )


class HandOperatedEngine:
    """An engine handle whose answers and death the test decides."""

    def __init__(self) -> None:
        self.batches: list[SubmitBatch] = []
        self.submitted = asyncio.Event()
        self._chunks: deque[list[TokenChunk]] = deque()
        self._ready = asyncio.Event()
        self._dead = False

    async def submit(self, batch: bytes) -> bytes | None:
        if self._dead:
            raise ConnectionError("gone")
        self.batches.append(decode(batch, SubmitBatch))
        self.submitted.set()
        return None

    async def collect(self, client: str) -> bytes:
        await self._ready.wait()
        if self._dead:
            raise ConnectionError("gone")
        self._ready.clear()
        return encode([chunk for chunks in self._chunks for chunk in chunks])

    def answer(self, *chunks: TokenChunk) -> None:
        self._chunks.clear()
        self._chunks.append(list(chunks))
        self._ready.set()

    def die(self) -> None:
        self._dead = True
        self._ready.set()

    @property
    def requests(self) -> list[GenerateRequest]:
        return [request for batch in self.batches for request in batch.requests]


async def submitted(engine: HandOperatedEngine, count: int) -> None:
    async with asyncio.timeout(20):
        while len(engine.requests) < count:
            engine.submitted.clear()
            await engine.submitted.wait()


async def test_requests_of_one_moment_travel_together() -> None:
    engine, client = HandOperatedEngine(), EngineClient("w")
    client.add_engine("e", engine)
    calls = [asyncio.create_task(client.generate(request(name))) for name in "abc"]
    await submitted(engine, 3)
    assert len(engine.batches) == 1
    engine.answer(*(chunk(name, [1, 2], FinishReason.STOP) for name in "abc"))
    results = await asyncio.gather(*calls)
    assert [result.tokens.tolist() for result in results] == [[1, 2]] * 3
    await client.close()


async def test_a_lost_engines_requests_go_on_from_their_last_token_with_what_is_left_of_their_budget() -> None:
    first, second, client = HandOperatedEngine(), HandOperatedEngine(), EngineClient("w")
    client.add_engine("first", first)
    call = asyncio.create_task(client.generate(request("a")))
    await submitted(first, 1)
    first.answer(chunk("a", [7, 8, 9], version=1))
    await asyncio.sleep(0)
    client.add_engine("second", second)
    first.die()
    await submitted(second, 1)
    continued = second.requests[0]
    assert continued.prompt.tolist() == [0, 1, 2, 7, 8, 9]
    assert continued.max_tokens == 1
    second.answer(chunk("a", [5], FinishReason.LENGTH, version=2))
    result = await call
    assert result.tokens.tolist() == [7, 8, 9, 5]
    assert result.versions.tolist() == [1, 1, 1, 2]
    assert client.continued == 1
    await client.close()


async def test_a_request_that_had_all_its_tokens_is_complete_when_its_engine_dies() -> None:
    engine, client = HandOperatedEngine(), EngineClient("w")
    client.add_engine("e", engine)
    call = asyncio.create_task(client.generate(request("a", max_tokens=2)))
    await submitted(engine, 1)
    engine.answer(chunk("a", [7, 8]))
    await asyncio.sleep(0)
    engine.die()
    result = await call
    assert (result.tokens.tolist(), result.finish_reason) == ([7, 8], FinishReason.LENGTH)
    await client.close()


async def test_without_an_engine_a_request_waits_and_then_says_so() -> None:
    client = EngineClient("w", engine_timeout_s=0.05)
    with pytest.raises(EngineFault, match="no inference engine was serving"):
        await client.generate(request("a"))


async def test_requests_wait_for_an_engine_to_join() -> None:
    engine, client = HandOperatedEngine(), EngineClient("w", engine_timeout_s=5)
    call = asyncio.create_task(client.generate(request("a")))
    await asyncio.sleep(0)
    client.add_engine("e", engine)
    await submitted(engine, 1)
    engine.answer(chunk("a", [1], FinishReason.STOP))
    assert (await call).tokens.tolist() == [1]
    await client.close()


async def test_a_cancelled_request_is_aborted_at_the_engine() -> None:
    engine, client = HandOperatedEngine(), EngineClient("w")
    client.add_engine("e", engine)
    call = asyncio.create_task(client.generate(request("a")))
    await submitted(engine, 1)
    call.cancel()
    await asyncio.gather(call, return_exceptions=True)
    async with asyncio.timeout(20):
        while not any(batch.aborts for batch in engine.batches):
            engine.submitted.clear()
            await engine.submitted.wait()
    assert engine.batches[-1].aborts == ["a"]
    assert client.in_flight == 0
    await client.close()


async def test_in_lock_step_nothing_is_sent_before_everybody_waits_and_the_order_is_that_of_the_sessions() -> None:
    engine = HandOperatedEngine()
    client = EngineClient("w", barrier=lambda held: held >= 3)
    client.add_engine("e", engine)
    calls = [asyncio.create_task(client.generate(request(name))) for name in "cb"]
    for _ in range(5):
        await asyncio.sleep(0)
    assert engine.batches == []
    calls.append(asyncio.create_task(client.generate(request("a"))))
    await submitted(engine, 3)
    assert [request.session_id for request in engine.requests] == ["a", "b", "c"]
    engine.answer(*(chunk(name, [1], FinishReason.STOP) for name in "abc"))
    await asyncio.gather(*calls)
    await client.close()


async def test_what_an_engine_aborts_of_its_own_accord_goes_on_from_its_last_token() -> None:
    engine, client = HandOperatedEngine(), EngineClient("w")
    client.add_engine("e", engine)
    call = asyncio.create_task(client.generate(request("a")))
    await submitted(engine, 1)
    engine.answer(chunk("a", [7, 8], FinishReason.ABORT))
    await submitted(engine, 2)
    again = engine.requests[1]
    assert (again.prompt.tolist(), again.max_tokens, again.generated) == ([0, 1, 2, 7, 8], 2, 2)
    engine.answer(chunk("a", [9], FinishReason.STOP))
    assert (await call).tokens.tolist() == [7, 8, 9]
    assert client.continued == 1
    await client.close()


async def test_a_request_that_engines_only_abort_fails_and_says_so() -> None:
    engine, client = HandOperatedEngine(), EngineClient("w")
    client.add_engine("e", engine)
    call = asyncio.create_task(client.generate(request("a")))
    for count in range(1, MAX_ABORTS + 2):
        await submitted(engine, count)
        engine.answer(chunk("a", [], FinishReason.ABORT))
    with pytest.raises(EngineFault, match=f"aborted a request {MAX_ABORTS + 1} times, e was the last"):
        await call
    await client.close()


async def released(engine: HandOperatedEngine, sessions: list[str]) -> None:
    async with asyncio.timeout(20):
        while [session for batch in engine.batches for session in batch.releases] != sessions:
            engine.submitted.clear()
            await engine.submitted.wait()


async def test_a_release_travels_with_requests_and_waits_for_none_when_none_is_in_flight() -> None:
    engine, client = HandOperatedEngine(), EngineClient("w")
    client.add_engine("e", engine)
    calls = [asyncio.create_task(client.generate(request(name))) for name in "ab"]
    await submitted(engine, 2)
    engine.answer(chunk("a", [1], FinishReason.STOP))
    await calls[0]
    client.release("a")
    for _ in range(5):
        await asyncio.sleep(0)
    assert len(engine.batches) == 1  # something is in flight: there will be company
    engine.answer(chunk("b", [1], FinishReason.STOP))
    await calls[1]
    await released(engine, ["a"])
    client.release("b")
    await released(engine, ["a", "b"])
    assert client.sessions == 0
    await client.close()


async def test_releasing_a_session_cancels_its_request() -> None:
    engine, client = HandOperatedEngine(), EngineClient("w")
    client.add_engine("e", engine)
    call = asyncio.create_task(client.generate(request("a")))
    await submitted(engine, 1)
    client.release("a")
    await asyncio.wait([call], timeout=20)
    assert call.cancelled()
    await released(engine, ["a"])
    assert [name for batch in engine.batches for name in batch.aborts] == ["a"]
    assert client.in_flight == client.sessions == 0
    await client.close()


async def test_a_request_that_is_not_sent_yet_never_opens_its_session_after_the_release() -> None:
    engine, client, book = HandOperatedEngine(), EngineClient("w"), ClientBook()
    client.add_engine("e", engine)
    await asyncio.sleep(0)
    call = asyncio.create_task(client.generate(request("a")))
    await asyncio.sleep(0)  # it is on its way: whoever sends wakes next, before the one who is told of its end
    client.release("a")
    await asyncio.wait([call], timeout=20)
    assert call.cancelled()
    await released(engine, ["a"])
    for batch in engine.batches:
        book.took(batch)
    assert book.load("w").sessions == 0
    assert client.in_flight == client.sessions == 0
    await client.close()


async def test_a_session_that_leaves_an_engine_with_too_many_is_released_there() -> None:
    first, second, client = HandOperatedEngine(), HandOperatedEngine(), EngineClient("w")
    client.add_engine("first", first)
    names = [f"s{index}" for index in range(20)]
    calls = [asyncio.create_task(client.generate(request(name))) for name in names]
    await submitted(first, 20)
    first.answer(*(chunk(name, [1], FinishReason.STOP) for name in names))
    await asyncio.gather(*calls)
    client.add_engine("second", second)
    again = asyncio.create_task(client.generate(request("s0")))
    await submitted(second, 1)
    await released(first, ["s0"])
    second.answer(chunk("s0", [1], FinishReason.STOP))
    await again
    await client.close()


class TalkativeEngine(HandOperatedEngine):
    """Answers submissions with what the test says of its load."""

    def __init__(self, **load: int) -> None:
        super().__init__()
        self.load = EngineLoad(**load)  # type: ignore[arg-type]

    async def submit(self, batch: bytes) -> bytes:
        await super().submit(batch)
        return encode(self.load)


async def test_new_sessions_avoid_an_engine_that_others_load() -> None:
    heard: list[tuple[str, EngineLoad]] = []
    told = asyncio.Event()

    def on_load(name: str, load: EngineLoad) -> None:
        heard.append((name, load))
        told.set()

    client = EngineClient("w", on_load=on_load)
    busy = TalkativeEngine(sessions=9, requests=4, own_sessions=1, own_requests=1)
    idle = TalkativeEngine(sessions=1, requests=1, own_sessions=1, own_requests=1)
    client.add_engine("busy", busy)
    client.add_engine("idle", idle)
    calls = [asyncio.create_task(client.generate(request(name))) for name in "ab"]
    await submitted(busy, 1)
    await submitted(idle, 1)
    async with asyncio.timeout(20):
        while len(heard) < 2:
            told.clear()
            await told.wait()
    assert dict(heard) == {"busy": busy.load, "idle": idle.load}
    calls += [asyncio.create_task(client.generate(request(name))) for name in "cdef"]
    await submitted(idle, 5)
    assert len(busy.requests) == 1
    for engine in (busy, idle):
        engine.answer(*(chunk(each.request_id, [1], FinishReason.STOP) for each in engine.requests))
    await asyncio.gather(*calls)
    await client.close()


def test_what_remains_of_a_request_and_the_chunks_joined() -> None:
    chunks = [chunk("a", [7, 8]), chunk("a", [9], FinishReason.STOP)]
    assert remaining(request("a"), chunks[:1]).prompt.tolist() == [0, 1, 2, 7, 8]
    assert remaining(request("a"), []).max_tokens == 4
    whole = joined(chunks)
    assert (whole.tokens.tolist(), whole.finish_reason) == ([7, 8, 9], FinishReason.STOP)
