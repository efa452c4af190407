"""Prefill on one real vLLM server, decoding on another, KV handed over by NIXL."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

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

pytestmark = [pytest.mark.engines_slow, pytest.mark.timeout(600)]

ADAPTER = VllmAdapter(VllmConfig())
TIMES = ServerTimes(startup_timeout_s=300.0, request_timeout_s=60.0)
VERSION = 3
TRANSFERRED = "vllm:nixl_bytes_transferred_sum"


def vllm_python() -> str:
    try:
        return str(interpreter_of("vllm", None))
    except EnvironmentUnfit as error:
        pytest.skip(str(error))


@pytest.fixture
async def pair(tmp_path: Path, model_directory: Path) -> AsyncIterator[tuple[Server, Server]]:
    """A prefill and a decode server of one model."""
    python = vllm_python()

    def launch(role: str, port: int, kv_port: int) -> Launch:
        return Launch(
            model_path=str(model_directory),
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

    servers: list[Server] = []
    try:
        for role in ("prefill", "decode"):
            log, kv_port = tmp_path / f"{role}.log", free_port("127.0.0.1")
            started = await start_server(
                ADAPTER,
                lambda port, role=role, kv_port=kv_port: launch(role, port, kv_port),  # type: ignore[misc]
                {},
                log,
                TIMES,
            )
            servers.append(started)
            await started.connection.control(ADAPTER, ADAPTER.adopt(VERSION))
        yield servers[0], servers[1]
    finally:
        for server in servers:
            await server.close()


def request(name: str, prompt: list[int], max_tokens: int) -> GenerateRequest:
    return GenerateRequest(
        request_id=name,
        session_id=name,
        prompt=np.array(prompt, np.int32),
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


def reference(directory: Path, prompt: list[int], count: int) -> tuple[list[int], list[float]]:
    """Greedy tokens and their log-probabilities by transformers."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    tokens, logprobs = list(prompt), []
    with torch.inference_mode():
        for _ in range(count):
            row = model(torch.tensor([tokens])).logits[0, -1].log_softmax(-1)
            tokens.append(int(row.argmax()))
            logprobs.append(float(row.max()))
    return tokens[len(prompt) :], logprobs


async def test_tokens_and_log_probabilities_are_those_of_one_server(
    pair: tuple[Server, Server], model_directory: Path
) -> None:
    prefill, decode = pair
    for attempt in range(3):
        prompt = [int(token) for token in np.random.default_rng(attempt).integers(2, 90, 70 + attempt)]
        asked, before = request(f"r{attempt}", prompt, 8), await transferred(decode)
        handoff = parse_prefill(await prefill.connection.ask(prefill_call(asked, VERSION)))
        assert handoff.version == VERSION
        chunks = await decoded(decode, asked, handoff)
        assert await transferred(decode) > before, "the decode server computed the prompt itself"
        expected, logprobs = reference(model_directory, prompt, 8)
        assert [int(token) for chunk in chunks for token in chunk.tokens] == expected
        got = [float(value) for chunk in chunks for value in chunk.logprobs]
        np.testing.assert_allclose(got, logprobs, atol=1e-3)
        assert chunks[-1].finish_reason is FinishReason.LENGTH
        assert {int(version) for chunk in chunks for version in chunk.versions} == {VERSION}


async def test_kv_of_another_version_is_left_where_it_is(pair: tuple[Server, Server], model_directory: Path) -> None:
    prefill, decode = pair
    prompt = [int(token) for token in np.random.default_rng(9).integers(2, 90, 70)]
    asked = request("stale", prompt, 4)
    handoff = parse_prefill(await prefill.connection.ask(prefill_call(asked, VERSION)))
    before = await transferred(decode)
    chunks = await decoded(decode, asked, ServerHandoff(version=handoff.version - 1, params=handoff.params))
    assert await transferred(decode) == before
    assert [int(token) for chunk in chunks for token in chunk.tokens] == reference(model_directory, prompt, 4)[0]
