"""Records what a real SGLang server answers, for ``golden/sglang``.

Run it against a server that `SglangAdapter.command` started with the model of the contract suite::

    python tests/rollout_workers/engines/sglang/record_golden.py http://127.0.0.1:PORT
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from rollout_workers.engines.protocol import GenerateRequest, PauseMode
from rollout_workers.engines.servers.adapter import Call
from rollout_workers.engines.servers.http import ServerConnection
from rollout_workers.engines.sglang.adapter import SglangAdapter
from rollout_workers.engines.sglang.config import SglangConfig

GOLDEN = Path(__file__).parents[1] / "golden" / "sglang"
ADAPTER = SglangAdapter(SglangConfig())
PROMPT = [5, 6, 7, 8, 9, 10, 11, 12]
SERVED = 0


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


async def stream(server: ServerConnection, asked: GenerateRequest) -> tuple[int, bytes]:
    async with server.stream(ADAPTER.generate(asked, SERVED)) as (status, parts):
        return status, b"".join([part async for part in parts])


async def control(server: ServerConnection, calls: list[Call]) -> None:
    await server.control(ADAPTER, calls)


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
    cases = {
        "greedy": request("greedy"),
        "sampled": request("sampled", temperature=1.0, seed=11),
        "temperature": request("temperature", temperature=0.5, seed=11),
        "filtered": request("filtered", temperature=1.0, top_p=0.8, top_k=20, seed=11),
        "one-token": request("one-token", max_tokens=1),
        "too-long": request("too-long", max_tokens=100_000),
        "stop-id": request("stop-id", stop_token_ids=tuple(range(384))),
    }
    for name, asked in cases.items():
        save(name, asked, ADAPTER.generate(asked, SERVED), *await stream(server, asked))


async def record_stop_string(server: ServerConnection, tokenizer: Any) -> None:
    """The text of the fourth greedy token is the stop string."""
    _, body = await stream(server, request("probe"))
    parser = ADAPTER.parser(request("probe"), SERVED)
    tokens = [int(token) for chunk in [*parser.feed(body), *parser.finish()] for token in chunk.tokens]
    asked = request("stop-string", stop=(tokenizer.decode([tokens[3]]),))
    save("stop-string", asked, ADAPTER.generate(asked, SERVED), *await stream(server, asked))


async def record_aborts(server: ServerConnection) -> None:
    async def aborted(name: str, asked: GenerateRequest, after_s: float) -> None:
        running = asyncio.create_task(stream(server, asked))
        await asyncio.sleep(after_s)
        await server.ask(ADAPTER.abort(asked.request_id))
        save(name, asked, ADAPTER.generate(asked, SERVED), *await running)

    await aborted("aborted", request("aborted", max_tokens=150), 0.3)
    await control(server, ADAPTER.pause(PauseMode.KEEP_KV))
    paused = request("aborted-before-the-first-token", max_tokens=150)
    running = asyncio.create_task(stream(server, paused))
    await asyncio.sleep(0.3)
    await server.ask(ADAPTER.abort(paused.request_id))
    await control(server, ADAPTER.resume())
    save("aborted-before-the-first-token", paused, ADAPTER.generate(paused, SERVED), *await running)


async def record_versions(server: ServerConnection) -> None:
    """A request over which the version changes (the same weights under another name)."""
    asked = request("two-versions", max_tokens=120)
    running = asyncio.create_task(stream(server, asked))
    await asyncio.sleep(0.5)
    await control(server, ADAPTER.adopt(SERVED + 1))
    save("two-versions", asked, ADAPTER.generate(asked, SERVED), *await running)
    await control(server, ADAPTER.adopt(SERVED))


async def record_control(server: ServerConnection) -> None:
    calls = {
        "pause": ADAPTER.pause(PauseMode.KEEP_KV)[0],
        "resume": ADAPTER.resume()[0],
        "served": ADAPTER.served(),
        "metrics": ADAPTER.metrics(),
        "identity": ADAPTER.identity(),
        "state": ADAPTER.stage(b"", "engine-0.0")[1],
        "begin": ADAPTER.adopt(SERVED)[1],
        "update": ADAPTER.adopt(SERVED)[2],
        "end": ADAPTER.adopt(SERVED)[3],
    }
    for name, call in calls.items():
        reply = await server.send(call)
        body = reply.body
        if name == "identity":  # hundreds of settings, of which three are read
            info = json.loads(body)
            kept = {key: info[key] for key in ("version", "model_path", "context_length") if key in info}
            body = json.dumps({**kept, "model_path": "/model"}).encode()
        elif name == "metrics":
            lines = [line for line in body.decode().splitlines() if "bucket" not in line]
            body = "\n".join(line for line in lines if line.startswith(("sglang:", "#"))).encode()
        save(f"control-{name}", None, call, reply.status, body)


async def main(url: str) -> None:
    from tokenizers import Tokenizer

    server = ServerConnection(url, 60.0)
    await control(server, ADAPTER.adopt(SERVED))
    info = json.loads(await server.ask(ADAPTER.identity()))
    tokenizer = Tokenizer.from_file(str(Path(info["model_path"]) / "tokenizer.json"))
    await record_generations(server)
    await record_stop_string(server, tokenizer)
    await record_aborts(server)
    await record_versions(server)
    await record_control(server)
    await server.close()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
