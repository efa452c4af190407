"""A prefill and a decode server of one model, real ones, and what their answers must be."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt
from contract_engine import require_environment
from contract_model import greedy, logits_of, logprobs_of

from rollout_workers.engines.protocol import FinishReason, GenerateRequest, TokenChunk
from rollout_workers.engines.servers.adapter import Call, Launch, ServerAdapter
from rollout_workers.engines.servers.bring_up import Server, ServerTimes, start_server
from rollout_workers.engines.servers.environment import ROOT, interpreter_of
from rollout_workers.engines.servers.http import ServerConnection

TIMES = ServerTimes(startup_timeout_s=300.0, request_timeout_s=60.0)
MAX_LEN = 128


@asynccontextmanager
async def server_pair(
    adapter: ServerAdapter, model: Path, logs: Path, kv_ports: tuple[int, int], version: int
) -> AsyncIterator[tuple[Server, Server]]:
    """Both servers, serving ``version``; ``kv_ports`` are those of the hand-over at either. They end with the block."""
    require_environment(adapter.name)
    python = str(interpreter_of(adapter.name, None))

    async def start(role: str, kv_port: int) -> Server:
        def launch(port: int) -> Launch:
            return Launch(
                model_path=str(model),
                host="127.0.0.1",
                port=port,
                member=role,
                version=version,
                dtype="float32",
                device="cpu",
                max_len=MAX_LEN,
                slots=4,
                threads=1,
                role=role,
                kv_port=kv_port,
                python=python,
                plugin_path=str(ROOT),
            )

        server = await start_server(adapter, launch, logs / f"{role}.log", TIMES)
        await server.connection.control(adapter, adapter.adopt(version))
        return server

    starting = [
        asyncio.create_task(start(role, port)) for role, port in zip(("prefill", "decode"), kv_ports, strict=True)
    ]
    try:
        prefill, decode = await asyncio.gather(*starting)
        yield prefill, decode
    finally:
        for server in await asyncio.gather(*starting, return_exceptions=True):
            if isinstance(server, Server):
                await server.close()


def greedy_request(name: str, given: npt.NDArray[np.int32], max_tokens: int) -> GenerateRequest:
    return GenerateRequest(
        request_id=name,
        session_id=name,
        prompt=given,
        max_tokens=max_tokens,
        temperature=0.0,
    )


async def answer(connection: ServerConnection, call: Call) -> bytes:
    """The whole body of a streamed answer, which must be 200."""
    async with connection.stream(call) as (status, parts):
        body = b"".join([part async for part in parts])
    assert status == 200, body
    return body


def parsed(adapter: ServerAdapter, asked: GenerateRequest, version: int, body: bytes) -> list[TokenChunk]:
    parser = adapter.parser(asked, version)
    return [*parser.feed(body), *parser.finish()]


def assert_greedy(asked: GenerateRequest, chunks: Sequence[TokenChunk], version: int) -> None:
    """Tokens and log-probabilities are those of a plain forward pass of the contract's model, stamped ``version``."""
    tokens = np.concatenate([chunk.tokens for chunk in chunks])
    assert tokens.tolist() == greedy(0, asked.prompt, asked.max_tokens)
    logits = logits_of(0, np.concatenate([asked.prompt, tokens]))[len(asked.prompt) - 1 : -1]
    got = np.concatenate([chunk.logprobs for chunk in chunks])
    np.testing.assert_allclose(got, logprobs_of(logits, tokens), atol=1e-3)
    assert chunks[-1].finish_reason is FinishReason.LENGTH
    assert {int(stamp) for chunk in chunks for stamp in chunk.versions} == {version}
