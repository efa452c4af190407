"""How fast keys and values get from a prefill engine to a decode engine, against what this machine's memory allows.

Two engine processes as in a run, a model with much KV and little to compute, and a prompt whose KV the prefill engine has:
random numbers, because computing a long one takes minutes. What is timed is the whole hand-off but nothing else: from the
moment before the prefill engine touches the first byte until the decode engine counts the last token as its own. Beside
every hand-off, in the prefill process, one thread copies as many bytes from memory to memory; the share of that rate is
taken hand-off by hand-off, so that what else the machine does meets both. Medians count; the best hand-off against the best
copy is what a quiet machine would show.
"""

from __future__ import annotations

import asyncio
import multiprocessing as mp
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import click
import msgspec
import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.output import document, write_json
from rollout_workers.disaggregation.config import HandoffConfig

LAYERS, KV_HEADS, HEAD_SIZE = 8, 8, 128
WAYS = ("auto", "ring", "tcp")
"""Values of ``engines.handoff.transport``: into the other engine's cache, through a ring of shared memory, over TCP."""
TOKENS = (1024, 8192)
ANSWER_S = 120.0
MEMCPY_BYTES = 512 << 20
"""Size of the buffers that are copied beside; of more bytes it is done again and again."""


@dataclass(frozen=True)
class Shape:
    """What is handed over, and how."""

    tokens: int
    ring_mb: int
    piece_kb: int

    @property
    def nbytes(self) -> int:
        return self.tokens * LAYERS * 2 * KV_HEADS * HEAD_SIZE * 4


@dataclass
class Samples:
    """Seconds of each repeat but the first."""

    seconds: list[float] = field(default_factory=list)
    memcpy: list[float] = field(default_factory=list)
    """Copying as many bytes beside it."""
    first: float = 0.0
    """The first one, into a slot that was never used."""


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


class Moments:
    """When the engine's `KvExchange` was called: ``first`` before the first, ``last`` after the last call of ``names``."""

    def __init__(self, actor: Any, *names: str) -> None:
        self.first = self.last = 0.0
        kv = actor._engine.kv
        for name in names:
            setattr(kv, name, self._timed(getattr(kv, name)))

    def _timed(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any) -> Any:
            self.first = self.first or time.monotonic()
            result = call(*arguments)
            self.last = time.monotonic()
            return result

        return timed


# --- the decode process ---------------------------------------------------------------------------------------------


def decode_process(pipe: Connection, store: str) -> None:
    """Obeys ``pipe``: ``open`` an engine, wait for what a request needs (``received``), ``gloo``, ``close``, ``end``."""
    asyncio.run(_decode_process(pipe, store))


async def _decode_process(pipe: Connection, store: str) -> None:
    import torch

    from experience.wire import decode, encode
    from rollout_workers.engines.protocol import EngineHealth, TokenChunk
    from rollout_workers.submission import SubmitBatch

    torch.set_num_threads(1)
    actor: Any = None
    while True:
        command, argument = await asyncio.to_thread(pipe.recv)
        if command == "open":
            actor = await start_engine(*argument)
            moments = Moments(actor, "written", "copy_in")
            _, address = await actor.kv_place()
            pipe.send(address)
        elif command == "received":
            await actor.submit(encode(SubmitBatch(client="bench", requests=[argument], releases=[], aborts=[])))
            async with asyncio.timeout(ANSWER_S):
                while not decode(await actor.collect("bench"), list[TokenChunk]):
                    pass
            await actor.submit(encode(SubmitBatch(client="bench", requests=[], releases=["s"], aborts=[])))
            health = decode(await actor.health(), EngineHealth)
            pipe.send((moments.last, health.kv_received_mb))
        elif command == "gloo":
            pipe.send(await asyncio.to_thread(gloo_seconds, 1, store, *argument))
        elif command == "close":
            await actor.stop()
            actor = None
            pipe.send("closed")
        else:
            return


def gloo_seconds(rank: int, store: str, shape: Shape, number: int) -> float:
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
            dist.send(piece, 1, tag=number * 100_000 + index)
        else:
            dist.recv(piece, 0, tag=number * 100_000 + index)
    return time.perf_counter() - began


# --- the prefill process, which measures ----------------------------------------------------------------------------


class Memcpy:
    """One thread copying from memory to memory."""

    def __init__(self, most: int) -> None:
        import torch

        self._block = min(MEMCPY_BYTES, most)
        self._source = torch.ones(self._block, dtype=torch.uint8)
        self._target = torch.zeros(self._block, dtype=torch.uint8)

    def seconds(self, nbytes: int) -> float:
        began = time.perf_counter()
        for start in range(0, nbytes, self._block):
            size = min(self._block, nbytes - start)
            self._target[:size].copy_(self._source[:size])
        return time.perf_counter() - began


class Bench:
    """The prefill process, and the decode process at the other end of ``pipe``."""

    def __init__(self, pipe: Connection, store: str, most: int) -> None:
        self._pipe, self._store = pipe, store
        self._memcpy = Memcpy(most)
        self._gloo_calls = 0

    async def _ask(self, command: str, argument: Any) -> Any:
        self._pipe.send((command, argument))
        if not await asyncio.to_thread(self._pipe.poll, ANSWER_S):
            raise RuntimeError(f"the decode process did not answer {command!r} within {ANSWER_S:g} s")
        return await asyncio.to_thread(self._pipe.recv)

    async def measure(self, directory: str, shape: Shape, transport: str, repeats: int) -> Samples:
        """One way of handing over."""
        address = await self._ask("open", (directory, shape, transport, "decode"))
        actor = await start_engine(directory, shape, transport, "prefill")
        moments = Moments(actor, "copy_across", "copy_out")
        prompt = np.arange(shape.tokens, dtype=np.int32) * 7 % 256
        give_kv(actor, prompt)
        samples = Samples()
        for repeat in range(repeats + 1):
            moments.first = 0.0
            last = await self._hand_over(actor, address, prompt, repeat + 1, shape)
            self._note(samples, repeat, last - moments.first, shape)
        await actor.stop()
        await self._ask("close", None)
        return samples

    async def gloo(self, shape: Shape, repeats: int) -> Samples:
        """Pieces over torch.distributed, no engine."""
        samples = Samples()
        for repeat in range(repeats + 1):
            self._gloo_calls += 1
            answer = asyncio.create_task(self._ask("gloo", (shape, self._gloo_calls)))
            await asyncio.to_thread(gloo_seconds, 0, self._store, shape, self._gloo_calls)
            self._note(samples, repeat, float(await answer), shape)
        return samples

    def _note(self, samples: Samples, repeat: int, seconds: float, shape: Shape) -> None:
        memcpy = self._memcpy.seconds(shape.nbytes)
        if repeat == 0:
            samples.first = seconds
        else:
            samples.seconds.append(seconds)
            samples.memcpy.append(memcpy)

    async def _hand_over(
        self, actor: Any, address: str, prompt: np.ndarray[Any, Any], count: int, shape: Shape
    ) -> float:
        """Returns when the last token had arrived, in seconds of the monotonic clock that both processes have."""
        from experience.wire import decode, encode
        from rollout_workers.engines.protocol import FinishReason, GenerateRequest, KvTarget, TokenChunk
        from rollout_workers.submission import SubmitBatch

        target = KvTarget(handoff_id=f"h{count}", engine="d", address=address)
        request = GenerateRequest(request_id=f"r{count}", session_id="s", prompt=prompt, max_tokens=4, kv_target=target)
        await actor.submit(encode(SubmitBatch(client="bench", requests=[request], releases=[], aborts=[])))
        async with asyncio.timeout(ANSWER_S):
            chunks: list[TokenChunk] = []
            while not chunks:
                chunks = decode(await actor.collect("bench"), list[TokenChunk])
        if chunks[-1].finish_reason is not FinishReason.HANDED_OVER or chunks[-1].error:
            raise RuntimeError(f"the hand-off failed: {chunks[-1].error or chunks[-1].finish_reason}")
        follower = msgspec.structs.replace(request, kv_target=None, kv_source=target.handoff_id, max_tokens=1)
        last, megabytes = await self._ask("received", follower)
        if round(megabytes * 2**20) != count * shape.nbytes:
            raise RuntimeError(f"{megabytes} MiB arrived, {count} times {shape.nbytes} bytes were sent")
        return float(last)

    def close(self) -> None:
        import torch

        self._pipe.send(("end", None))
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def give_kv(actor: Any, prompt: np.ndarray[Any, Any]) -> None:
    """Session ``s`` gets random KV of the prompt."""
    import torch

    from rollout_workers.engines.protocol import GenerateRequest

    kv, step = actor._engine.kv, 64
    kv.expect(GenerateRequest(request_id="r", session_id="s", prompt=prompt, max_tokens=4))
    for start in range(0, len(prompt), step):
        end = min(start + step, len(prompt))
        numbers = torch.rand((end - start) * kv.token_bytes // 4)
        kv.copy_in("s", start, end, numbers.view(torch.uint8), 0)
    kv.settle("s")


async def measure(bench: Bench, tokens: int, ring_mb: int, piece_kb: int, repeats: int) -> dict[str, Any]:
    """All ways of handing over prompts of one length."""
    shape = Shape(tokens, ring_mb, piece_kb)
    with tempfile.TemporaryDirectory() as directory:
        make_model(Path(directory), tokens + 16)
        found = {way: await bench.measure(directory, shape, way, repeats) for way in WAYS}
    found["gloo"] = await bench.gloo(shape, repeats)
    return {"bytes": shape.nbytes, "ways": {name: summary(samples, shape.nbytes) for name, samples in found.items()}}


def summary(samples: Samples, nbytes: int) -> dict[str, Any]:
    shares = [copied / took for copied, took in zip(samples.memcpy, samples.seconds, strict=True)]
    return {
        "gb_per_s": round(nbytes / statistics.median(samples.seconds) / 1e9, 3),
        "first_gb_per_s": round(nbytes / samples.first / 1e9, 3),
        "memcpy_gb_per_s": round(nbytes / statistics.median(samples.memcpy) / 1e9, 3),
        "of_memcpy": round(statistics.median(shares), 3),
        "of_memcpy_range": [round(min(shares), 3), round(max(shares), 3)],
        "best_gb_per_s": round(nbytes / min(samples.seconds) / 1e9, 3),
        "best_of_memcpy": round(min(samples.memcpy) / min(samples.seconds), 3),
    }


def run(
    *,
    tokens: Sequence[int] = TOKENS,
    repeats: int = 9,
    ring_mb: int = HandoffConfig.ring_mb,
    piece_kb: int = HandoffConfig.piece_kb,
    json_path: Path | None = None,
) -> dict[str, Any]:
    """The result of `millrace bench kv`; written to ``json_path`` if that is given."""
    import torch

    torch.set_num_threads(1)
    context = mp.get_context("spawn")
    ours, theirs = context.Pipe()
    with tempfile.TemporaryDirectory() as directory:
        store = str(Path(directory) / "store")
        process = context.Process(target=decode_process, args=(theirs, store), daemon=True)
        process.start()
        bench = Bench(ours, store, Shape(max(tokens), ring_mb, piece_kb).nbytes)
        try:
            results = {str(each): asyncio.run(measure(bench, each, ring_mb, piece_kb, repeats)) for each in tokens}
            bench.close()
        finally:
            process.join(5)
            if process.is_alive():
                process.kill()
    settings = {"tokens": list(tokens), "repeats": repeats, "ring_mb": ring_mb, "piece_kb": piece_kb}
    result = document("kv", seeds=[0], settings=settings, results=results)
    if json_path is not None:
        write_json(json_path, result)
    return result


def table(result: dict[str, Any]) -> Table:
    """The result for a terminal."""
    shown = Table(title=f"KV from engine to engine, medians of {result['settings']['repeats']}")
    for column in ("tokens", "way", "GB/s", "memcpy", "of memcpy", "range", "best", "first"):
        shown.add_column(column, justify="left" if column == "way" else "right")
    for tokens, found in result["results"].items():
        for name, row in found["ways"].items():
            low, high = row["of_memcpy_range"]
            shown.add_row(
                tokens,
                name,
                f"{row['gb_per_s']:.2f}",
                f"{row['memcpy_gb_per_s']:.2f}",
                f"{row['of_memcpy']:.0%}",
                f"{low:.0%} to {high:.0%}",
                f"{row['best_of_memcpy']:.0%}",
                f"{row['first_gb_per_s']:.2f}",
            )
        shown.add_section()
    return shown


@click.command()
@click.option(
    "--tokens",
    multiple=True,
    type=click.IntRange(min=2),
    default=TOKENS,
    show_default=True,
    help="Length of a prompt whose KV moves (64 KiB a token); may be repeated.",
)
@click.option("--repeats", default=9, show_default=True, help="Measured repeats, after one that is shown as `first`.")
@click.option("--ring-mb", default=HandoffConfig.ring_mb, show_default=True, help="engines.handoff.ring_mb")
@click.option("--piece-kb", default=HandoffConfig.piece_kb, show_default=True, help="engines.handoff.piece_kb")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the result there.")
def kv(tokens: tuple[int, ...], repeats: int, ring_mb: int, piece_kb: int, json_path: Path | None) -> None:
    """KV from a prefill to a decode engine: bytes a second, against memory copy."""
    report: Callable[..., None] = Console().print
    report(table(run(tokens=tokens, repeats=repeats, ring_mb=ring_mb, piece_kb=piece_kb, json_path=json_path)))
