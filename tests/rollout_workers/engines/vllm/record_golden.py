"""Records what a real vLLM server answers, for ``golden/vllm``.

Run it against a server that `VllmAdapter.command` started with the model of the contract suite::

    python tests/rollout_workers/engines/vllm/record_golden.py http://127.0.0.1:PORT MODEL_DIRECTORY
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from rollout_workers.engines.protocol import GenerateRequest, PauseMode
from rollout_workers.engines.servers.adapter import Call
from rollout_workers.engines.servers.http import ServerConnection
from rollout_workers.engines.vllm.adapter import VllmAdapter
from rollout_workers.engines.vllm.config import VllmConfig

GOLDEN = Path(__file__).parents[1] / "golden" / "vllm"
ADAPTER = VllmAdapter(VllmConfig())
PROMPT = [5, 6, 7, 8, 9, 10, 11, 12]
SERVED = 0
MODEL_LABEL = re.compile(r'model_name="[^"]*"')
COUNTED = ("vllm:num_requests", "vllm:kv_cache_usage", "vllm:generation_tokens", "vllm:prompt_tokens", "vllm:prefix_")


def request(name: str, **fields: Any) -> GenerateRequest:
    settings: dict[str, Any] = {
        "request_id": name,
        "session_id": name,
        "prompt": np.array(PROMPT, np.int32),
        "max_tokens": 20,
        "temperature": 0.0,
        **fields,
    }
    return GenerateRequest(**settings)


async def stream(
    server: ServerConnection, asked: GenerateRequest, begun: asyncio.Event | None = None
) -> tuple[int, bytes]:
    """``begun`` is set when the first bytes have arrived."""
    body = b""
    async with server.stream(ADAPTER.generate(asked, SERVED)) as (status, parts):
        async for part in parts:
            body += part
            if begun is not None:
                begun.set()
    return status, body


def save(name: str, asked: GenerateRequest | None, call: Call, status: int, body: bytes) -> None:
    """One file: what was asked in Millrace's words, the call, and the answer."""
    GOLDEN.mkdir(parents=True, exist_ok=True)
    fields = None if asked is None else msgspec.to_builtins(asked, enc_hook=lambda value: value.tolist())
    record = {
        "request": fields,
        "call": {"method": call.method, "path": call.path, "body": call.body, "query": call.query},
        "status": status,
        "answer": body.decode(),
    }
    (GOLDEN / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")


async def record_generations(server: ServerConnection) -> None:
    cases = {
        "greedy": request("greedy"),
        "sampled": request("sampled", temperature=1.0, seed=11),
        "temperature": request("temperature", temperature=0.5, seed=11),
        "filtered": request("filtered", temperature=1.0, top_p=0.8, top_k=20, seed=11),
        "one-token": request("one-token", max_tokens=1),
        "cached": request("cached", prompt=np.arange(4, 104, dtype=np.int32)),
        "too-long": request("too-long", prompt=np.arange(4, 300, dtype=np.int32).repeat(20)),
        "budget-too-long": request("budget-too-long", max_tokens=100_000),
        "no-token": request("no-token", prompt=np.array([10_000], np.int32)),
        "stop-id": request("stop-id", stop_token_ids=tuple(range(384))),
    }
    await stream(server, cases["cached"])
    for name, asked in cases.items():
        save(name, asked, ADAPTER.generate(asked, SERVED), *await stream(server, asked))


async def record_stop_string(server: ServerConnection, tokenizer: Any) -> None:
    """The stop string is the first whole character in what the request ``sampled`` says."""
    probe = request("probe", temperature=1.0, seed=11)
    _, body = await stream(server, probe)
    parser = ADAPTER.parser(probe, SERVED)
    tokens = [int(token) for chunk in [*parser.feed(body), *parser.finish()] for token in chunk.tokens]
    text = tokenizer.decode(tokens, skip_special_tokens=False)
    stop = next(character for character in text[2:-2] if character != "\ufffd")
    asked = request("stop-string", temperature=1.0, seed=11, stop=(stop,))
    save("stop-string", asked, ADAPTER.generate(asked, SERVED), *await stream(server, asked))


async def record_aborts(server: ServerConnection) -> None:
    async def aborted(name: str, asked: GenerateRequest, paused: bool = False) -> None:
        begun = asyncio.Event()
        running = asyncio.create_task(stream(server, asked, begun))
        await (asyncio.sleep(0.3) if paused else begun.wait())
        await server.ask(ADAPTER.abort(asked.request_id))
        save(name, asked, ADAPTER.generate(asked, SERVED), *await running)

    await aborted("aborted", request("aborted", max_tokens=400))
    await server.control(ADAPTER, ADAPTER.pause(PauseMode.KEEP_KV))
    await aborted("aborted-before-the-first-token", request("aborted-before-the-first-token", max_tokens=400), True)
    await server.control(ADAPTER, ADAPTER.resume())


async def record_versions(server: ServerConnection) -> None:
    """A request over which the version changes (the same weights under another name)."""
    asked = request("two-versions", max_tokens=400)
    begun = asyncio.Event()
    running = asyncio.create_task(stream(server, asked, begun))
    await begun.wait()
    await server.control(ADAPTER, ADAPTER.pause(PauseMode.KEEP_KV))
    await server.control(ADAPTER, ADAPTER.adopt(SERVED + 1))
    await server.control(ADAPTER, ADAPTER.resume())
    save("two-versions", asked, ADAPTER.generate(asked, SERVED), *await running)
    await server.control(ADAPTER, ADAPTER.adopt(SERVED))


async def record_control(server: ServerConnection) -> None:
    pause, forget = ADAPTER.pause(PauseMode.KEEP_REQUESTS)
    begin, staged = ADAPTER.stage(b"no offer", "engine-0.0")
    prepare, adopt = ADAPTER.adopt(SERVED)
    calls = {
        "ready": ADAPTER.ready(),
        "pause": pause,
        "forget": forget,
        "ready-while-paused": ADAPTER.ready(),
        "resume": ADAPTER.resume()[0],
        "prepare": prepare,
        "adopt": adopt,
        "served": ADAPTER.served(),
        "metrics": ADAPTER.metrics(),
        "identity": ADAPTER.identity(),
        "staged": staged,
        "begin-refused": begin,
    }
    for name, call in calls.items():
        reply = await server.send(call)
        body = reply.body
        if name == "metrics":
            kept = [line for line in body.decode().splitlines() if line.startswith(COUNTED) and "bucket" not in line]
            body = MODEL_LABEL.sub('model_name="/model"', "\n".join(kept)).encode()
        elif name == "identity":
            body = json.dumps({"results": [{**json.loads(body)["results"][0], "model": "/model"}]}).encode()
        save(f"control-{name}", None, call, reply.status, body)


async def main(url: str, model: str) -> None:
    from tokenizers import Tokenizer

    server = ServerConnection(url, 60.0)
    await server.control(ADAPTER, ADAPTER.adopt(SERVED))
    await record_generations(server)
    await record_stop_string(server, Tokenizer.from_file(str(Path(model) / "tokenizer.json")))
    await record_aborts(server)
    await record_versions(server)
    await record_control(server)
    await server.close()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
