"""Records what a real SGLang server answers, for ``golden/sglang``.

Run it against a server that `SglangAdapter.command` started with the model and the settings of the contract suite::

    python tests/rollout_workers/engines/sglang/record_golden.py http://127.0.0.1:PORT MODEL_DIRECTORY
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

from rollout_workers.engines.protocol import GenerateRequest, KvPolicy
from rollout_workers.engines.servers.adapter import Call
from rollout_workers.engines.servers.http import ServerConnection
from rollout_workers.engines.sglang.adapter import SglangAdapter
from rollout_workers.engines.sglang.config import SglangConfig

GOLDEN = Path(__file__).parents[1] / "golden" / "sglang"
ADAPTER = SglangAdapter(SglangConfig())
PROMPT = [5, 6, 7, 8, 9, 10, 11, 12]
SERVED = 0
SLOTS = 16
"""Of the server."""
COUNTED = (
    "sglang:num_",
    "sglang:token_usage",
    "sglang:generation_tokens",
    "sglang:prompt_tokens",
    "sglang:cached_tokens",
)


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
        "call": {"method": call.method, "path": call.path, "body": call.body},
        "status": status,
        "answer": body.decode(),
    }
    (GOLDEN / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")


async def record_generations(server: ServerConnection) -> None:
    # A token id outside the vocabulary ends the server; Millrace refuses it before a server is asked.
    cases = {
        "greedy": request("greedy"),
        "sampled": request("sampled", temperature=1.0, seed=11),
        "temperature": request("temperature", temperature=0.5, seed=11),
        "filtered": request("filtered", temperature=1.0, top_p=0.8, top_k=20, seed=11),
        "top-p": request("top-p", temperature=1.0, top_p=0.8, seed=11),
        "one-token": request("one-token", max_tokens=1),
        "cached": request("cached", prompt=np.arange(4, 104, dtype=np.int32)),
        "too-long": request("too-long", prompt=np.arange(4, 300, dtype=np.int32).repeat(20)),
        "budget-too-long": request("budget-too-long", max_tokens=100_000),
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
    async def aborted(asked: GenerateRequest, queued: bool = False) -> None:
        begun = asyncio.Event()
        running = asyncio.create_task(stream(server, asked, begun))
        await (asyncio.sleep(0.2) if queued else begun.wait())
        await server.ask(ADAPTER.abort(asked.request_id))
        save(asked.request_id, asked, ADAPTER.generate(asked, SERVED), *await running)

    await aborted(request("aborted", max_tokens=400))
    # What is sent during a pause does not reach the scheduler; a request without tokens is one that waits for a slot.
    started = [asyncio.Event() for _ in range(SLOTS)]
    full = [
        asyncio.create_task(stream(server, request(f"busy-{index}", max_tokens=400), begun))
        for index, begun in enumerate(started)
    ]
    await asyncio.gather(*(begun.wait() for begun in started))
    await aborted(request("aborted-before-the-first-token", max_tokens=400), queued=True)
    await asyncio.gather(*full)


async def record_versions(server: ServerConnection) -> None:
    """A request over which the version changes (the same weights under another name)."""
    asked = request("two-versions", max_tokens=400)
    begun = asyncio.Event()
    running = asyncio.create_task(stream(server, asked, begun))
    await begun.wait()
    await server.control(ADAPTER, ADAPTER.adopt(SERVED + 1))
    save("two-versions", asked, ADAPTER.generate(asked, SERVED), *await running)
    await server.control(ADAPTER, ADAPTER.adopt(SERVED))


async def record_control(server: ServerConnection) -> None:
    refused, state = ADAPTER.stage(b"no offer", "engine-0.0")
    pause, begin, update, end, resume = ADAPTER.adopt(SERVED)
    calls = {
        "ready": ADAPTER.ready(),
        "pause": pause,
        "ready-while-paused": ADAPTER.ready(),
        "begin": begin,
        "update": update,
        "end": end,
        "resume": resume,
        "served": ADAPTER.served(),
        "metrics": ADAPTER.metrics(),
        "identity": ADAPTER.identity(),
        "state": state,
        "stage-refused": refused,
        "commit-refused": ADAPTER.commit(99, KvPolicy.KEEP)[0],
        "update-outside": update,
    }
    for name, call in calls.items():
        reply = await server.send(call)
        body = reply.body
        if name == "identity":  # hundreds of settings, of which five are read
            info = json.loads(body)
            kept = {key: info[key] for key in ("version", "context_length", "max_total_num_tokens", "sampling_backend")}
            body = json.dumps({**kept, "model_path": "/model"}).encode()
        elif name == "metrics":
            lines = [line for line in body.decode().splitlines() if line.startswith(COUNTED) and "bucket" not in line]
            body = re.sub(r'model_name="[^"]*"', 'model_name="/model"', "\n".join(lines)).encode()
        elif name in ("ready", "ready-while-paused", "served"):
            info = json.loads(body)
            body = json.dumps({key: info[key] for key in ("weight_version", "model_type", "is_generation")}).encode()
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
