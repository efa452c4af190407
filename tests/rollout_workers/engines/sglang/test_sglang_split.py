"""Prefill on one real SGLang server, decoding on another, KV handed over by NIXL."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from rollout_workers.engines.protocol import FinishReason, GenerateRequest
from rollout_workers.engines.servers.adapter import Launch
from rollout_workers.engines.servers.bring_up import Server, ServerTimes, start_server
from rollout_workers.engines.servers.environment import ROOT, interpreter_of
from rollout_workers.engines.servers.errors import EnvironmentUnfit
from rollout_workers.engines.servers.process import free_port
from rollout_workers.engines.sglang.adapter import SglangAdapter
from rollout_workers.engines.sglang.config import SglangConfig
from rollout_workers.engines.sglang.disaggregation import PrefillAddress, pair_calls

pytestmark = [pytest.mark.engines_slow, pytest.mark.timeout(600)]

ADAPTER = SglangAdapter(SglangConfig())
TIMES = ServerTimes(startup_timeout_s=300.0, request_timeout_s=60.0)


def sglang_python() -> str:
    try:
        return str(interpreter_of("sglang", None))
    except EnvironmentUnfit as error:
        pytest.skip(str(error))


@pytest.fixture
async def pair(tmp_path: Path, model_directory: Path) -> AsyncIterator[tuple[Server, Server, PrefillAddress]]:
    """A prefill and a decode server of one model."""
    python = sglang_python()
    bootstrap = free_port("127.0.0.1")

    def launch(role: str, port: int) -> Launch:
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
            kv_port=bootstrap,
            python=python,
            plugin_path=str(ROOT),
        )

    servers: list[Server] = []
    try:
        for role in ("prefill", "decode"):
            log = tmp_path / f"{role}.log"
            started = await start_server(ADAPTER, lambda port, role=role: launch(role, port), log, TIMES)  # type: ignore[misc]
            servers.append(started)
        yield servers[0], servers[1], PrefillAddress("127.0.0.1", bootstrap)
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


async def answer(server: Server, call: Any) -> bytes:
    async with server.connection.stream(call) as (status, parts):
        body = b"".join([part async for part in parts])
    assert status == 200, body
    return body


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
    pair: tuple[Server, Server, PrefillAddress], model_directory: Path
) -> None:
    prefill, decode, address = pair
    for room in range(3):
        prompt = [int(token) for token in np.random.default_rng(room).integers(2, 96, 40 + room)]
        asked = request(f"r{room}", prompt, 8)
        to_prefill, to_decode = pair_calls(asked, 0, address, room=100 + room)
        _, body = await asyncio.gather(answer(prefill, to_prefill), answer(decode, to_decode))
        parser = ADAPTER.parser(asked, 0)
        chunks = [*parser.feed(body), *parser.finish()]
        expected, logprobs = reference(model_directory, prompt, 8)
        assert [int(token) for chunk in chunks for token in chunk.tokens] == expected
        got = [float(value) for chunk in chunks for value in chunk.logprobs]
        np.testing.assert_allclose(got, logprobs, atol=1e-3)
        assert chunks[-1].finish_reason is FinishReason.LENGTH
        assert {int(version) for chunk in chunks for version in chunk.versions} == {0}
