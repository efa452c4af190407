"""How fast keys and values get from a prefill engine to a decode engine, against what this machine's memory allows.

Two engine processes as in a run, a model with much KV and little to compute, and a prompt that the prefill engine has
computed before: what is left is the hand-off. It is timed by the decode engine, from the announcement until the last piece
is in its cache. Repeat after repeat in turn: shared memory, TCP, pieces over torch.distributed (gloo) for comparison, and
one thread copying as many bytes from memory to memory. Medians count.
"""

from __future__ import annotations

import asyncio
import multiprocessing as mp
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import click
import msgspec
import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.output import document, write_json

LAYERS, KV_HEADS, HEAD_SIZE = 8, 8, 128
TRANSPORTS = ("shared_memory", "tcp")
ANSWER_S = 120.0


@dataclass(frozen=True)
class Shape:
    """What is handed over."""

    tokens: int
    ring_mb: int
    piece_kb: int

    @property
    def nbytes(self) -> int:
        return self.tokens * LAYERS * 2 * KV_HEADS * HEAD_SIZE * 4


def make_model(directory: Path, max_len: int) -> None:
    """A Qwen3 with 64 KiB of float32 KV a token and next to nothing to compute."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=256,
        hidden_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=KV_HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_SIZE,
        intermediate_size=64,
        max_position_embeddings=max_len,
        bos_token_id=None,
        eos_token_id=None,
    )
    Qwen3ForCausalLM(config).save_pretrained(directory)


async def start_engine(directory: str, shape: Shape, transport: str, role: str) -> Any:
    """An engine actor without Ray."""
    from rollout_workers.disaggregation.config import HandoffConfig
    from rollout_workers.engines.actor import EngineActor
    from rollout_workers.engines.config import EnginesConfig
    from rollout_workers.engines.protocol import EngineRole

    config = EnginesConfig(
        prefill=1,
        decode=1,
        slots=2,
        max_len=shape.tokens + 16,
        trace=False,
        handoff=HandoffConfig(transport=transport, ring_mb=shape.ring_mb, piece_kb=shape.piece_kb, timeout_s=ANSWER_S),
    )
    actor = EngineActor(f"{role}-0", config, EngineRole(role))
    await actor.load(directory, "float32", 1, 0)
    return actor


# --- the decode process ---------------------------------------------------------------------------------------------


def decode_process(pipe: Connection, directory: str, shape: Shape, store: str) -> None:
    """Obeys ``pipe``: ``open`` a transport, wait for what a request needs (``received``), ``gloo``, ``close``."""
    asyncio.run(_decode_process(pipe, directory, shape, store))


async def _decode_process(pipe: Connection, directory: str, shape: Shape, store: str) -> None:
    from experience.wire import decode, encode
    from rollout_workers.engines.protocol import EngineHealth, TokenChunk
    from rollout_workers.submission import SubmitBatch

    actors: dict[str, Any] = {}
    while True:
        command, argument = await asyncio.to_thread(pipe.recv)
        if command == "open":
            actors[argument] = await start_engine(directory, shape, argument, "decode")
            _, address = await actors[argument].kv_place()
            pipe.send(address)
        elif command == "received":
            transport, request = argument
            actor = actors[transport]
            await actor.submit(encode(SubmitBatch(client="bench", requests=[request], releases=[], aborts=[])))
            async with asyncio.timeout(ANSWER_S):
                while not decode(await actor.collect("bench"), list[TokenChunk]):
                    pass
            await actor.submit(encode(SubmitBatch(client="bench", requests=[], releases=["s"], aborts=[])))
            health = decode(await actor.health(), EngineHealth)
            pipe.send((health.handoff_s, health.kv_received_mb))
        elif command == "gloo":
            pipe.send(await asyncio.to_thread(gloo_seconds, 1, shape, store, argument))
        else:
            for actor in actors.values():
                await actor.stop()
            pipe.send("closed")
            return


def gloo_seconds(rank: int, shape: Shape, store: str, repeat: int) -> float:
    """Move the bytes in pieces over gloo, rank 0 to rank 1; seconds until the last one has arrived."""
    import torch
    import torch.distributed as dist

    if not dist.is_initialized():
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    piece = torch.zeros(shape.piece_kb << 10, dtype=torch.uint8)
    dist.barrier()
    began = time.perf_counter()
    for index in range(-(-shape.nbytes // len(piece))):
        if rank == 0:
            dist.send(piece, 1, tag=repeat * 100_000 + index)
        else:
            dist.recv(piece, 0, tag=repeat * 100_000 + index)
    return time.perf_counter() - began


# --- the prefill process, which measures ----------------------------------------------------------------------------


def memcpy_seconds(nbytes: int) -> float:
    """One thread copying ``nbytes`` from memory to memory."""
    import torch

    source = torch.ones(nbytes, dtype=torch.uint8)
    target = torch.zeros(nbytes, dtype=torch.uint8)
    began = time.perf_counter()
    target.copy_(source)
    return time.perf_counter() - began


class Bench:
    """The prefill engines of each transport, and the decode process at the other end of ``pipe``."""

    def __init__(self, pipe: Connection, directory: str, shape: Shape, store: str) -> None:
        self._pipe, self._directory, self._shape, self._store = pipe, directory, shape, store
        self._actors: dict[str, Any] = {}
        self._addresses: dict[str, str] = {}
        self._told: dict[str, float] = dict.fromkeys(TRANSPORTS, 0.0)
        self._count: dict[str, int] = dict.fromkeys(TRANSPORTS, 0)
        self._prompt = np.arange(shape.tokens, dtype=np.int32) * 7 % 256

    async def _ask(self, command: str, argument: Any) -> Any:
        self._pipe.send((command, argument))
        if not await asyncio.to_thread(self._pipe.poll, ANSWER_S):
            raise RuntimeError(f"the decode process did not answer {command!r} within {ANSWER_S:g} s")
        return await asyncio.to_thread(self._pipe.recv)

    async def open(self) -> None:
        for transport in TRANSPORTS:
            self._addresses[transport] = await self._ask("open", transport)
            self._actors[transport] = await start_engine(self._directory, self._shape, transport, "prefill")

    async def hand_over(self, transport: str) -> float:
        """Seconds of one hand-off."""
        from experience.wire import decode, encode
        from rollout_workers.engines.protocol import FinishReason, GenerateRequest, KvTarget, TokenChunk
        from rollout_workers.submission import SubmitBatch

        self._count[transport] += 1
        count = self._count[transport]
        target = KvTarget(handoff_id=f"{transport}-{count}", engine="d", address=self._addresses[transport])
        request = GenerateRequest(
            request_id=f"{transport}-{count}", session_id="s", prompt=self._prompt, max_tokens=4, kv_target=target
        )
        actor = self._actors[transport]
        await actor.submit(encode(SubmitBatch(client="bench", requests=[request], releases=[], aborts=[])))
        async with asyncio.timeout(ANSWER_S):
            chunks: list[TokenChunk] = []
            while not chunks:
                chunks = decode(await actor.collect("bench"), list[TokenChunk])
        if chunks[-1].finish_reason is not FinishReason.HANDED_OVER or chunks[-1].error:
            raise RuntimeError(f"the hand-off over {transport} failed: {chunks[-1].error or chunks[-1].finish_reason}")
        follower = msgspec.structs.replace(request, kv_target=None, kv_source=target.handoff_id, max_tokens=1)
        total, megabytes = await self._ask("received", (transport, follower))
        if round(megabytes * 2**20) != count * self._shape.nbytes:
            raise RuntimeError(f"{megabytes} MiB arrived, {count} times {self._shape.nbytes} bytes were sent")
        seconds, self._told[transport] = total - self._told[transport], total
        return float(seconds)

    async def gloo(self, repeat: int) -> float:
        answer = asyncio.create_task(self._ask("gloo", repeat))
        await asyncio.to_thread(gloo_seconds, 0, self._shape, self._store, repeat)
        return float(await answer)

    async def close(self) -> None:
        import torch

        for actor in self._actors.values():
            await actor.stop()
        await self._ask("close", None)
        torch.distributed.destroy_process_group()


async def measure(pipe: Connection, directory: str, shape: Shape, store: str, repeats: int) -> dict[str, list[float]]:
    """Seconds of every repeat but the first, by way."""
    bench = Bench(pipe, directory, shape, store)
    await bench.open()
    seconds: dict[str, list[float]] = {name: [] for name in (*TRANSPORTS, "gloo", "memcpy")}
    for repeat in range(repeats + 1):
        found = {transport: await bench.hand_over(transport) for transport in TRANSPORTS}
        found["gloo"] = await bench.gloo(repeat)
        found["memcpy"] = memcpy_seconds(shape.nbytes)
        if repeat:
            for name, value in found.items():
                seconds[name].append(value)
    await bench.close()
    return seconds


def run(
    *, tokens: int = 2048, repeats: int = 9, ring_mb: int = 16, piece_kb: int = 1024, json_path: Path | None = None
) -> dict[str, Any]:
    """The result of `millrace bench kv`; written to ``json_path`` if that is given."""
    import torch

    torch.set_num_threads(1)
    shape = Shape(tokens, ring_mb, piece_kb)
    context = mp.get_context("spawn")
    ours, theirs = context.Pipe()
    with tempfile.TemporaryDirectory() as directory:
        make_model(Path(directory) / "model", tokens + 16)
        arguments = (str(Path(directory) / "model"), shape, str(Path(directory) / "store"))
        process = context.Process(target=decode_process, args=(theirs, *arguments), daemon=True)
        process.start()
        try:
            seconds = asyncio.run(measure(ours, *arguments, repeats))
        finally:
            process.join(5)
            if process.is_alive():
                process.kill()
    rates = {name: shape.nbytes / statistics.median(values) for name, values in seconds.items()}
    results = {
        name: {
            "gb_per_s": round(rate / 1e9, 3),
            "gb_per_s_range": [
                round(shape.nbytes / value / 1e9, 3) for value in (max(seconds[name]), min(seconds[name]))
            ],
            "of_memcpy": round(rate / rates["memcpy"], 3),
        }
        for name, rate in rates.items()
    }
    settings = {"tokens": tokens, "bytes": shape.nbytes, "repeats": repeats, "ring_mb": ring_mb, "piece_kb": piece_kb}
    result = document("kv", seeds=[0], settings=settings, results=results)
    if json_path is not None:
        write_json(json_path, result)
    return result


def table(result: dict[str, Any]) -> Table:
    """The result for a terminal."""
    shown = Table(title=f"KV of {result['settings']['tokens']} tokens, {result['settings']['bytes'] / 2**20:.0f} MiB")
    for column in ("way", "GB/s", "range", "of memcpy"):
        shown.add_column(column, justify="left" if column == "way" else "right")
    for name, row in result["results"].items():
        low, high = row["gb_per_s_range"]
        shown.add_row(name, f"{row['gb_per_s']:.2f}", f"{low:.2f} to {high:.2f}", f"{row['of_memcpy']:.0%}")
    return shown


@click.command()
@click.option("--tokens", default=2048, show_default=True, help="Length of the prompt whose KV moves (64 KiB a token).")
@click.option("--repeats", default=9, show_default=True, help="Measured repeats, after one that is not.")
@click.option("--ring-mb", default=16, show_default=True, help="engines.handoff.ring_mb")
@click.option("--piece-kb", default=1024, show_default=True, help="engines.handoff.piece_kb")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the result there.")
def kv(tokens: int, repeats: int, ring_mb: int, piece_kb: int, json_path: Path | None) -> None:
    """KV from a prefill to a decode engine: bytes a second, against memory copy."""
    report: Callable[..., None] = Console().print
    report(table(run(tokens=tokens, repeats=repeats, ring_mb=ring_mb, piece_kb=piece_kb, json_path=json_path)))
