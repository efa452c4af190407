"""Prefill on one real vLLM server, decoding on another, KV handed over by NIXL."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from contract_model import greedy, prompt, write_model
from server_pairs import answer, assert_greedy, greedy_request, parsed, server_pair

from rollout_workers.engines.servers.bring_up import Server
from rollout_workers.engines.servers.desk import ServerHandoff
from rollout_workers.engines.servers.process import free_port
from rollout_workers.engines.servers.prometheus import samples
from rollout_workers.engines.vllm.adapter import VllmAdapter
from rollout_workers.engines.vllm.config import VllmConfig
from rollout_workers.engines.vllm.split import decode_call, parse_prefill, prefill_call

pytestmark = [pytest.mark.engines_slow, pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(900)]

ADAPTER = VllmAdapter(VllmConfig())
VERSION = 3
TRANSFERRED = "vllm:nixl_bytes_transferred_sum"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def pair(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[tuple[Server, Server]]:
    directory = tmp_path_factory.mktemp("split")
    kv_ports = free_port("127.0.0.1"), free_port("127.0.0.1")
    async with server_pair(ADAPTER, write_model(directory / "model"), directory, kv_ports, VERSION) as servers:
        yield servers


async def transferred(server: Server) -> float:
    """Bytes of KV that the server has fetched from others."""
    return samples(await server.connection.ask(ADAPTER.metrics())).get(TRANSFERRED, 0.0)


async def test_tokens_and_log_probabilities_are_those_of_one_server(pair: tuple[Server, Server]) -> None:
    prefill, decode = pair
    for attempt in range(3):
        asked = greedy_request(f"r{attempt}", prompt(70 + attempt, seed=attempt), 8)
        before = await transferred(decode)
        handoff = parse_prefill(await prefill.connection.ask(prefill_call(asked, VERSION)))
        assert handoff.version == VERSION
        body = await answer(decode.connection, decode_call(asked, VERSION, handoff))
        assert await transferred(decode) > before, "the decode server computed the prompt itself"
        assert_greedy(asked, parsed(ADAPTER, asked, VERSION, body), VERSION)


async def test_kv_of_another_version_is_left_where_it_is(pair: tuple[Server, Server]) -> None:
    prefill, decode = pair
    asked = greedy_request("stale", prompt(70, seed=9), 4)
    handoff = parse_prefill(await prefill.connection.ask(prefill_call(asked, VERSION)))
    before = await transferred(decode)
    stale = ServerHandoff(version=handoff.version - 1, params=handoff.params)
    chunks = parsed(ADAPTER, asked, VERSION, await answer(decode.connection, decode_call(asked, VERSION, stale)))
    assert await transferred(decode) == before
    assert [int(token) for chunk in chunks for token in chunk.tokens] == greedy(0, asked.prompt, 4)
