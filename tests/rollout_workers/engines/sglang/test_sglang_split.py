"""Prefill on one real SGLang server, decoding on another, KV handed over by NIXL, and SGLang's own router before them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from operator import le
from pathlib import Path

import pytest
import pytest_asyncio
from contract_model import prompt, write_model
from server_pairs import TIMES, answer, assert_greedy, greedy_request, parsed, server_pair

from rollout_workers.engines.servers.adapter import Call
from rollout_workers.engines.servers.bring_up import Server
from rollout_workers.engines.servers.environment import interpreter_of
from rollout_workers.engines.servers.errors import ServerUnreachable
from rollout_workers.engines.servers.http import ServerConnection
from rollout_workers.engines.servers.process import ServerProcess, free_port, log_tail
from rollout_workers.engines.sglang.adapter import SglangAdapter
from rollout_workers.engines.sglang.config import SglangConfig
from rollout_workers.engines.sglang.disaggregation import PrefillAddress, pair_calls, router_command

pytestmark = [pytest.mark.engines_slow, pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(900)]

ADAPTER = SglangAdapter(SglangConfig())
HOST = "127.0.0.1"
VERSION = 3


@dataclass(frozen=True)
class Pair:
    prefill: Server
    decode: Server
    bootstrap_port: int
    logs: Path


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def pair(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Pair]:
    directory, bootstrap = tmp_path_factory.mktemp("split"), free_port(HOST)
    model = write_model(directory / "model")
    async with server_pair(ADAPTER, model, directory, (bootstrap, bootstrap), VERSION) as (prefill, decode):
        yield Pair(prefill, decode, bootstrap, directory)


@pytest_asyncio.fixture(loop_scope="module")
async def router(pair: Pair) -> AsyncIterator[ServerConnection]:
    """SGLang's router, once it has found both servers."""
    port, log = free_port(HOST), pair.logs / "router.log"
    command = router_command(
        str(interpreter_of("sglang", None)),
        HOST,
        port,
        prefill=[(pair.prefill.connection.url, pair.bootstrap_port)],
        decode=[pair.decode.connection.url],
        metrics_port=free_port(HOST),
    )
    process = await ServerProcess.start(command, {}, log)
    connection = ServerConnection(f"http://{HOST}:{port}", TIMES.request_timeout_s)
    try:
        await until_ready(connection, process)
        yield connection
    finally:
        await connection.close()
        await process.stop()


async def until_ready(connection: ServerConnection, process: ServerProcess) -> None:
    """Nothing announces that a router is ready."""
    try:
        async with asyncio.timeout(TIMES.startup_timeout_s):
            while not await answers(connection):
                assert not process.ended.is_set(), f"the router ended: {log_tail(process.log)}"
                await asyncio.sleep(0.2)
    except TimeoutError:
        pytest.fail(f"the router was not ready in time: {log_tail(process.log)}")


async def answers(connection: ServerConnection) -> bool:
    try:
        return (await connection.send(Call("GET", "/readiness"))).status == 200
    except ServerUnreachable:
        return False


async def test_tokens_and_log_probabilities_are_those_of_one_server(pair: Pair) -> None:
    address = PrefillAddress(HOST, pair.bootstrap_port)
    for room in range(3):
        asked = greedy_request(f"r{room}", prompt(40 + room, seed=room), 8)
        to_prefill, to_decode = pair_calls(asked, VERSION, address, room=100 + room)
        _, body = await asyncio.gather(
            answer(pair.prefill.connection, to_prefill), answer(pair.decode.connection, to_decode)
        )
        assert_greedy(asked, parsed(ADAPTER, asked, VERSION, body), VERSION)


async def test_the_router_brings_a_request_to_both_servers(pair: Pair, router: ServerConnection) -> None:
    """Ordinary calls, several at once: the router gives each its room."""
    requests = [greedy_request(f"routed-{index}", prompt(50 + index, seed=10 + index), 8) for index in range(4)]
    before = await generated(pair)
    bodies = await asyncio.gather(*(answer(router, ADAPTER.generate(asked, VERSION)) for asked in requests))
    for asked, body in zip(requests, bodies, strict=True):
        assert_greedy(asked, parsed(ADAPTER, asked, VERSION, body), VERSION)
    async with asyncio.timeout(TIMES.request_timeout_s):
        await grown(pair, before, by=(4, 4 * 8))


async def generated(pair: Pair) -> tuple[int, int]:
    """Tokens that the servers count: one for each request where it prefills, all of them where it decodes."""
    pages = [await server.connection.ask(ADAPTER.metrics()) for server in (pair.prefill, pair.decode)]
    prefilled, decoded = (ADAPTER.parse_metrics(page).generated_tokens for page in pages)
    return prefilled, decoded


async def grown(pair: Pair, before: tuple[int, int], by: tuple[int, int]) -> None:
    """Until the servers count exactly this much more; their counters may come after the answers."""
    expected = before[0] + by[0], before[1] + by[1]
    while (counted := await generated(pair)) != expected:
        assert all(map(le, counted, expected)), f"{before} grew to {counted}, and not to {expected}"
        await asyncio.sleep(0.1)
