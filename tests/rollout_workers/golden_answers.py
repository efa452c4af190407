"""Answers recorded from real servers: reading them, and what both recorders do alike."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from rollout_workers.engines.protocol import GenerateRequest, TokenChunk
from rollout_workers.engines.servers.adapter import Call, ServerAdapter
from rollout_workers.engines.servers.http import ServerConnection

DIRECTORY = Path(__file__).parent / "engines" / "golden"
PROMPT = [5, 6, 7, 8, 9, 10, 11, 12]
SERVED = 0
"""The version that the recorded servers serve."""
MODEL_LABEL = re.compile(r'model_name="[^"]*"')


class Golden:
    """The calls to one kind of server and its answers, a file each."""

    def __init__(self, adapter: ServerAdapter, directory: Path = DIRECTORY) -> None:
        self.adapter = adapter
        self.directory = directory / adapter.name

    @property
    def generations(self) -> list[str]:
        """Names of what was generated (the others are called ``control-...``)."""
        return sorted(path.stem for path in self.directory.glob("*.json") if not path.stem.startswith("control-"))

    def record(self, name: str) -> dict[str, Any]:
        record: dict[str, Any] = json.loads((self.directory / f"{name}.json").read_text())
        return record

    def asked(self, name: str) -> GenerateRequest:
        """What was asked for, in Millrace's words."""
        fields = self.record(name)["request"]
        fields["prompt"] = np.array(fields["prompt"], np.int32)
        return msgspec.convert(
            fields,
            GenerateRequest,
            dec_hook=lambda kind, value: value if isinstance(value, np.ndarray) else kind(value),
        )

    def answer(self, name: str) -> bytes:
        return str(self.record(name)["answer"]).encode()

    def call(self, name: str) -> Call:
        return Call(**self.record(name)["call"])

    def chunks(self, name: str) -> list[TokenChunk]:
        """What the adapter makes of a recorded stream."""
        parser = self.adapter.parser(self.asked(name), SERVED)
        if name == "two-versions":
            parser.switched(SERVED + 1, None)
        return [*parser.feed(self.answer(name)), *parser.finish()]

    def tokens(self, name: str) -> list[int]:
        return [int(token) for chunk in self.chunks(name) for token in chunk.tokens]

    # Recording

    def save(self, name: str, asked: GenerateRequest | None, call: Call, status: int, body: bytes) -> None:
        """One file: what was asked in Millrace's words, the call, and the answer."""
        self.directory.mkdir(parents=True, exist_ok=True)
        fields = None if asked is None else msgspec.to_builtins(asked, enc_hook=lambda value: value.tolist())
        record = {"request": fields, "call": described(call), "status": status, "answer": body.decode()}
        (self.directory / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")

    async def stream(
        self, server: ServerConnection, asked: GenerateRequest, begun: asyncio.Event | None = None
    ) -> tuple[int, bytes]:
        """Status and body of a real answer; ``begun`` is set when its first bytes have arrived."""
        body = b""
        async with server.stream(self.adapter.generate(asked, SERVED)) as (status, parts):
            async for part in parts:
                body += part
                if begun is not None:
                    begun.set()
        return status, body

    async def generate(self, server: ServerConnection, asked: GenerateRequest) -> None:
        """Record one generation under the request's name."""
        self.save(asked.request_id, asked, self.adapter.generate(asked, SERVED), *await self.stream(server, asked))

    async def generate_all(self, server: ServerConnection, *own: GenerateRequest) -> None:
        """Record what is asked of both kinds of server, and what is asked of this one alone."""
        cached = request("cached", prompt=np.arange(4, 104, dtype=np.int32))
        await self.stream(server, cached)
        for asked in (
            request("greedy"),
            request("sampled", temperature=1.0, seed=11),
            request("temperature", temperature=0.5, seed=11),
            request("filtered", temperature=1.0, top_p=0.8, top_k=20, seed=11),
            request("one-token", max_tokens=1),
            cached,
            request("too-long", prompt=np.arange(4, 300, dtype=np.int32).repeat(20)),
            request("budget-too-long", max_tokens=100_000),
            request("stop-id", stop_token_ids=tuple(range(384))),
            *own,
        ):
            await self.generate(server, asked)

    async def stop_string(self, server: ServerConnection, model: Path) -> None:
        """The stop string is the first whole character in what the request ``sampled`` says."""
        from tokenizers import Tokenizer

        probe = request("probe", temperature=1.0, seed=11)
        _, body = await self.stream(server, probe)
        parser = self.adapter.parser(probe, SERVED)
        tokens = [int(token) for chunk in [*parser.feed(body), *parser.finish()] for token in chunk.tokens]
        tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
        text = tokenizer.decode(tokens, skip_special_tokens=False)
        stop = next(character for character in text[2:-2] if character != "\ufffd")
        await self.generate(server, request("stop-string", temperature=1.0, seed=11, stop=(stop,)))

    async def aborted(self, server: ServerConnection, name: str, without_tokens: bool = False) -> None:
        """Record a long request that is aborted after its first bytes, or while it waits for its first token."""
        asked, begun = request(name, max_tokens=400), asyncio.Event()
        running = asyncio.create_task(self.stream(server, asked, begun))
        await (asyncio.sleep(0.3) if without_tokens else begun.wait())
        await server.ask(self.adapter.abort(asked.request_id))
        self.save(name, asked, self.adapter.generate(asked, SERVED), *await running)

    async def two_versions(self, server: ServerConnection, switch: list[Call]) -> None:
        """Record a request over which ``switch`` changes the version (the same weights under another name)."""
        asked, begun = request("two-versions", max_tokens=400), asyncio.Event()
        running = asyncio.create_task(self.stream(server, asked, begun))
        await begun.wait()
        await server.control(self.adapter, switch)
        self.save(asked.request_id, asked, self.adapter.generate(asked, SERVED), *await running)
        await server.control(self.adapter, self.adapter.adopt(SERVED))

    async def control(
        self, server: ServerConnection, calls: Mapping[str, Call], shortened: Callable[[str, bytes], bytes]
    ) -> None:
        """Record calls that are no generations, in this order. ``shortened``: what of an answer is kept, by name."""
        for name, call in calls.items():
            reply = await server.send(call)
            self.save(f"control-{name}", None, call, reply.status, shortened(name, reply.body))

    async def connected(self, url: str, recording: Callable[[ServerConnection], Awaitable[None]]) -> None:
        """Record from the server at ``url``, which then serves the version ``SERVED``."""
        server = ServerConnection(url, 60.0)
        try:
            await server.control(self.adapter, self.adapter.adopt(SERVED))
            await recording(server)
        finally:
            await server.close()


def described(call: Call) -> dict[str, Any]:
    """What of a call is recorded."""
    fields = {"method": call.method, "path": call.path, "body": call.body, "query": call.query}
    return {name: value for name, value in fields.items() if name == "body" or value is not None}


def counted(body: bytes, names: tuple[str, ...]) -> bytes:
    """The lines of a metrics page that begin with one of ``names``, without histograms and the model's path."""
    kept = [line for line in body.decode().splitlines() if line.startswith(names) and "bucket" not in line]
    return MODEL_LABEL.sub('model_name="/model"', "\n".join(kept)).encode()


def request(name: str, **fields: Any) -> GenerateRequest:
    """A greedy request of twenty tokens, unless told otherwise."""
    settings: dict[str, Any] = {
        "request_id": name,
        "session_id": name,
        "prompt": np.array(PROMPT, np.int32),
        "max_tokens": 20,
        "temperature": 0.0,
        **fields,
    }
    return GenerateRequest(**settings)
