"""Requests over HTTP to a server that misbehaves: tried again, failed by the taxonomy, or continued elsewhere; no hang."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest
from server_helpers import until
from tiny_adapter import TinyAdapter

from experience.wire import decode
from rollout_workers.continuation import joined
from rollout_workers.engines.protocol import FinishReason, GenerateRequest, TokenChunk
from rollout_workers.engines.servers import flights, traffic
from rollout_workers.engines.servers.adapter import Call, Launch
from rollout_workers.engines.servers.bring_up import Server, ServerTimes, start_server
from rollout_workers.engines.servers.errors import ServerDied
from rollout_workers.engines.servers.traffic import Traffic
from rollout_workers.submission import SubmitBatch

SILENCE_S = 1.5


@pytest.fixture(autouse=True)
def _no_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flights, "DELAYS_S", (0.02,))
    monkeypatch.setattr(traffic, "ABORT_S", 0.5)


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[Server]:
    times = ServerTimes(startup_timeout_s=60.0, request_timeout_s=20.0)

    def launch_at(port: int) -> Launch:
        return Launch(model_path="m", host="127.0.0.1", port=port, member="engine-0.0")

    made = await start_server(TinyAdapter(), launch_at, tmp_path / "log", times)
    yield made
    await made.close()


@pytest.fixture
async def requests(server: Server) -> AsyncIterator[Traffic]:
    made = Traffic(
        TinyAdapter(),
        server.connection,
        0,
        every=4,
        request_timeout_s=SILENCE_S,
        refuse=lambda request: "no" if request.max_tokens < 1 else None,
        on_change=lambda: None,
    )
    yield made
    made.close()


def request(name: str = "r", first: int = 100, max_tokens: int = 10) -> GenerateRequest:
    prompt = np.array([first, 0, 0], np.int32)
    return GenerateRequest(request_id=name, session_id=f"session of {name}", prompt=prompt, max_tokens=max_tokens)


def submit(requests: Traffic, *asked: GenerateRequest, aborts: tuple[str, ...] = ()) -> None:
    requests.submit(SubmitBatch(client="c", requests=list(asked), releases=[], aborts=list(aborts)))


async def results(requests: Traffic, count: int = 1) -> dict[str, TokenChunk]:
    """The requests that end, joined, once there are ``count``."""
    parts: dict[str, list[TokenChunk]] = {}
    ended: dict[str, TokenChunk] = {}
    async with asyncio.timeout(20):
        while len(ended) < count:
            for chunk in decode(await requests.collect("c"), list[TokenChunk]):
                parts.setdefault(chunk.request_id, []).append(chunk)
                if chunk.finish_reason is not None:
                    ended[chunk.request_id] = joined(parts[chunk.request_id])
    return ended


async def misbehave(server: Server, path: str, how: str, times: int = 1) -> None:
    await server.connection.ask(Call("POST", "/misbehave", {"path": path, "how": how, "times": times}))


async def seen(server: Server, path: str) -> list[dict[str, object]]:
    import json

    return [each for each in json.loads(await server.connection.ask(Call("GET", "/seen"))) if each["path"] == path]


async def test_requests_are_streamed_a_few_tokens_at_a_time(requests: Traffic) -> None:
    submit(requests, request("a", 100), request("b", 500, max_tokens=3))
    got = await results(requests, 2)
    assert got["a"].tokens.tolist() == list(range(103, 113))
    assert got["b"].tokens.tolist() == [503, 504, 505]
    assert got["a"].finish_reason is FinishReason.LENGTH
    await until(lambda: not requests.flights, "the last request to land")


@pytest.mark.parametrize("how", ["500", "garbage", "close"])
async def test_a_failure_is_tried_again(server: Server, requests: Traffic, how: str) -> None:
    await misbehave(server, "/generate", how, times=2)
    submit(requests, request())
    assert (await results(requests))["r"].tokens.tolist() == list(range(103, 113))
    assert [each["id"] for each in await seen(server, "/generate")] == ["r", "r~2", "r~3"]


async def test_a_stream_that_is_cut_goes_on_from_its_last_token(server: Server, requests: Traffic) -> None:
    await misbehave(server, "/generate", "cut")
    submit(requests, request())
    assert (await results(requests))["r"].tokens.tolist() == list(range(103, 113))
    first, second = await seen(server, "/generate")
    assert second["prompt"] == [*first["prompt"], 103, 104, 105]  # type: ignore[misc]
    assert second["max_tokens"] == 7


async def test_silence_is_a_failure_and_not_a_hang(server: Server, requests: Traffic) -> None:
    await misbehave(server, "/generate", "silence")
    submit(requests, request())
    watch = asyncio.create_task(ends_silent(requests))
    began_at = time.monotonic()
    assert (await results(requests))["r"].tokens.tolist() == list(range(103, 113))
    assert time.monotonic() - began_at >= SILENCE_S
    watch.cancel()


async def ends_silent(requests: Traffic) -> None:
    """What the actor's watch does."""
    while True:
        await asyncio.sleep(0.05)
        requests.end_silent(time.monotonic(), queueing=False)


async def test_a_refusal_fails_the_request_with_the_server_s_words(server: Server, requests: Traffic) -> None:
    await misbehave(server, "/generate", "400")
    submit(requests, request("bad"), request("good"))
    got = await results(requests, 2)
    failed = [chunk for chunk in got.values() if chunk.finish_reason is FinishReason.ERROR]
    assert [chunk.error for chunk in failed] == ["the tiny server said 400: as it was told to"]
    assert len(await seen(server, "/generate")) == 2


async def test_what_no_server_is_asked_for_fails_here(server: Server, requests: Traffic) -> None:
    submit(requests, request(max_tokens=0))
    refused = (await results(requests))["r"]
    assert (refused.finish_reason, refused.error) == (FinishReason.ERROR, "no")
    assert requests.clients.load("c").requests == 0
    assert await seen(server, "/generate") == []


async def test_a_request_that_fails_every_time_fails_and_the_others_go_on(server: Server, requests: Traffic) -> None:
    await misbehave(server, "/generate", "500", times=flights.ATTEMPTS)
    submit(requests, request("bad"))
    failed = (await results(requests))["bad"]
    assert failed.finish_reason is FinishReason.ERROR
    assert failed.error == "the tiny server said 500: as it was told to"
    submit(requests, request("good"))
    assert (await results(requests))["good"].finish_reason is FinishReason.LENGTH


async def test_a_server_that_fails_every_request_is_given_up(server: Server, requests: Traffic) -> None:
    await misbehave(server, "/generate", "garbage", times=1000)
    submit(requests, *(request(f"r{number}") for number in range(flights.FINAL_FAILURES)))
    with pytest.raises(ServerDied, match="fails again and again: no event: b'<html>"):
        await results(requests, flights.FINAL_FAILURES)
    with pytest.raises(ServerDied):
        submit(requests, request("later"))


async def test_a_server_that_is_gone_is_given_up_with_what_it_had_made(server: Server, requests: Traffic) -> None:
    submit(requests, request(max_tokens=100000))
    first = decode(await requests.collect("c"), list[TokenChunk])
    assert first
    assert server.process is not None
    await server.process.stop()
    with pytest.raises(ServerDied, match="fails again and again"):
        await results(requests)
    await until(lambda: not requests.flights, "the request to land")


async def test_an_abort_before_the_request_was_sent_ends_it(server: Server, requests: Traffic) -> None:
    submit(requests, request(), aborts=())
    submit(requests, aborts=("r",))
    ended = (await results(requests))["r"]
    assert (len(ended.tokens), ended.finish_reason) == (0, FinishReason.ABORT)
    assert await seen(server, "/generate") == []


async def test_an_abort_under_way_keeps_the_tokens(server: Server, requests: Traffic) -> None:
    submit(requests, request(max_tokens=100000))
    parts = decode(await requests.collect("c"), list[TokenChunk])
    submit(requests, aborts=("r",))
    ended = (await results(requests))["r"]
    assert ended.finish_reason is FinishReason.ABORT
    tokens = [*joined(parts).tokens.tolist(), *ended.tokens.tolist()]
    assert tokens == list(range(103, 103 + len(tokens)))


async def test_an_abort_that_the_server_does_not_heed_ends_all_the_same(server: Server, requests: Traffic) -> None:
    await misbehave(server, "/abort", "silence", times=1000)
    await misbehave(server, "/generate", "silence")
    submit(requests, request())
    async with asyncio.timeout(10):
        while not await seen(server, "/generate"):
            pass
    submit(requests, aborts=("r", "of nobody"))
    assert (await results(requests))["r"].finish_reason is FinishReason.ABORT


async def test_during_a_commit_new_requests_wait(server: Server, requests: Traffic) -> None:
    requests.hold()
    submit(requests, request())
    await asyncio.sleep(0.1)
    assert await seen(server, "/generate") == []
    requests.switched(5, {})
    requests.let_go()
    await results(requests)
    assert [each["served"] for each in await seen(server, "/generate")] == [5]


async def test_streams_learn_of_a_commit(requests: Traffic) -> None:
    submit(requests, request(max_tokens=100000))
    await requests.collect("c")
    requests.switched(5, {"r": 17})
    assert requests.flights["r"].parser.switches == [(5, 17)]  # type: ignore[union-attr]


async def test_a_client_that_is_gone_leaves_nothing(requests: Traffic) -> None:
    submit(requests, request(max_tokens=100000))
    await requests.collect("c")
    assert requests.clients.load("c").requests == 1
    requests.forget("c")
    await until(lambda: not requests.flights, "the request to end")
    assert requests.clients.load("c").requests == 0
    assert "c" not in requests._outbox  # not even the end of its request, which comes later
    submit(requests, request("r2", max_tokens=5))  # one of the same name hears of its own requests alone
    assert {chunk.request_id for chunk in decode(await requests.collect("c"), list[TokenChunk])} == {"r2"}
