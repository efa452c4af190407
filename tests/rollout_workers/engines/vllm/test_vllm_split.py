"""Prefill on one real vLLM server, decoding on another, KV handed over by NIXL."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import pytest_asyncio
from contract_model import greedy, logits_of, logprobs_of, prompt, write_model

from rollout_workers.engines.protocol import FinishReason, GenerateRequest, TokenChunk
from rollout_workers.engines.servers.adapter import Launch
from rollout_workers.engines.servers.bring_up import Server, ServerTimes, start_server
from rollout_workers.engines.servers.desk import ServerHandoff
from rollout_workers.engines.servers.environment import ROOT, interpreter_of
from rollout_workers.engines.servers.errors import EnvironmentUnfit
from rollout_workers.engines.servers.process import free_port
from rollout_workers.engines.servers.prometheus import samples
from rollout_workers.engines.vllm.adapter import VllmAdapter
from rollout_workers.engines.vllm.config import VllmConfig
from rollout_workers.engines.vllm.split import decode_call, parse_prefill, prefill_call

pytestmark = [pytest.mark.engines_slow, pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(900)]

ADAPTER = VllmAdapter(VllmConfig())
TIMES = ServerTimes(startup_timeout_s=300.0, request_timeout_s=60.0)
VERSION = 3
TRANSFERRED = "vllm:nixl_bytes_transferred_sum"


@pytest.fixture(scope="module")
def split_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("split") / "model")


def vllm_python() -> str:
    try:
        return str(interpreter_of("vllm", None))
    except EnvironmentUnfit as error:
        pytest.skip(str(error))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def pair(tmp_path_factory: pytest.TempPathFactory, split_model: Path) -> AsyncIterator[tuple[Server, Server]]:
    """A prefill and a decode server of one model."""
    python, logs = vllm_python(), tmp_path_factory.mktemp("logs")

    async def start(role: str) -> Server:
        kv_port = free_port("127.0.0.1")

        def launch(port: int) -> Launch:
            return Launch(
                model_path=str(split_model),
                host="127.0.0.1",
                port=port,
                member=role,
                dtype="float32",
                device="cpu",
                max_len=128,
                slots=4,
                threads=1,
                role=role,
                kv_port=kv_port,
                python=python,
                plugin_path=str(ROOT),
            )

        server = await start_server(ADAPTER, launch, logs / f"{role}.log", TIMES)
        await server.connection.control(ADAPTER, ADAPTER.adopt(VERSION))
        return server

    starting = [asyncio.create_task(start(role)) for role in ("prefill", "decode")]
    try:
        prefill, decode = await asyncio.gather(*starting)
        yield prefill, decode
    finally:
        for server in await asyncio.gather(*starting, return_exceptions=True):
            if isinstance(server, Server):
                await server.close()


def request(name: str, given: npt.NDArray[np.int32], max_tokens: int) -> GenerateRequest:
    return GenerateRequest(
        request_id=name,
        session_id=name,
        prompt=given,
        max_tokens=max_tokens,
        temperature=0.0,
    )


async def decoded(server: Server, asked: GenerateRequest, handoff: ServerHandoff) -> list[TokenChunk]:
    parser = ADAPTER.parser(asked, VERSION)
    async with server.connection.stream(decode_call(asked, VERSION, handoff)) as (status, parts):
        body = b"".join([part async for part in parts])
    assert status == 200, body
    return [*parser.feed(body), *parser.finish()]


async def transferred(server: Server) -> float:
    """Bytes of KV that the server has fetched from others."""
    return samples(await server.connection.ask(ADAPTER.metrics())).get(TRANSFERRED, 0.0)


async def test_tokens_and_log_probabilities_are_those_of_one_server(pair: tuple[Server, Server]) -> None:
    prefill, decode = pair
    for attempt in range(3):
        given = prompt(70 + attempt, seed=attempt)
        asked, before = request(f"r{attempt}", given, 8), await transferred(decode)
        handoff = parse_prefill(await prefill.connection.ask(prefill_call(asked, VERSION)))
        assert handoff.version == VERSION
        chunks = await decoded(decode, asked, handoff)
        assert await transferred(decode) > before, "the decode server computed the prompt itself"
        tokens = np.concatenate([chunk.tokens for chunk in chunks])
        assert tokens.tolist() == greedy(0, asked.prompt, 8)
        logits = logits_of(0, np.concatenate([asked.prompt, tokens]))[len(given) - 1 : -1]
        got = np.concatenate([chunk.logprobs for chunk in chunks])
        np.testing.assert_allclose(got, logprobs_of(logits, tokens), atol=1e-3)
        assert chunks[-1].finish_reason is FinishReason.LENGTH
        assert {int(version) for chunk in chunks for version in chunk.versions} == {VERSION}


async def test_kv_of_another_version_is_left_where_it_is(pair: tuple[Server, Server]) -> None:
    prefill, decode = pair
    asked = request("stale", prompt(70, seed=9), 4)
    handoff = parse_prefill(await prefill.connection.ask(prefill_call(asked, VERSION)))
    before = await transferred(decode)
    chunks = await decoded(decode, asked, ServerHandoff(version=handoff.version - 1, params=handoff.params))
    assert await transferred(decode) == before
    assert [int(token) for chunk in chunks for token in chunk.tokens] == greedy(0, asked.prompt, 4)
