"""vLLM and SGLang as contenders: each a server of its own, driven by the actor that a run would drive it by."""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from benchmarks.engine.workloads import Arrivals, Prompt
from experience.wire import decode, encode
from rollout_workers.engines.config import EnginesConfig
from rollout_workers.engines.protocol import FinishReason, GenerateRequest, TokenChunk
from rollout_workers.engines.servers.actor import ServerEngineActor
from rollout_workers.submission import SubmitBatch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CLIENT = "bench"
ROUND_S = 300.0
"""Longest time that a workload may take."""
SLOTS = 128


class Served:
    """A real server on this machine, log-probabilities and versions included."""

    def __init__(self, kind: str, model: PreTrainedModel, threads: int) -> None:
        self.name = kind
        self._threads = threads
        self._rounds = 0
        self._loop = asyncio.new_event_loop()
        self._folder = tempfile.TemporaryDirectory(prefix=f"millrace-bench-{kind}-")
        folder = Path(self._folder.name)
        model.save_pretrained(folder / "model")
        _byte_tokenizer(int(model.config.vocab_size)).save_pretrained(folder / "model")
        self._config = EnginesConfig(
            kind=kind, slots=SLOTS, device=model.device.type, dtype="float32", stream_every=1, trace=False
        )
        self._actor = ServerEngineActor(kind, self._config, folder / "logs")
        self._wait(self._actor.load(folder / "model", "float32", threads, 0))

    def run(self, prompts: list[Prompt], lengths: list[int], arrivals: Arrivals | None = None) -> None:
        self._wait(asyncio.wait_for(self._round(prompts, lengths, arrivals), ROUND_S))

    def close(self) -> None:
        self._wait(self._actor.stop())
        self._loop.close()
        self._folder.cleanup()

    def server_cpu_s(self) -> float:
        """CPU seconds so far of the server and all that it started."""
        pid = self._wait(self._actor.server_pid())
        server = psutil.Process(pid)
        times = [process.cpu_times() for process in (server, *server.children(recursive=True))]
        return sum(time.user + time.system for time in times)

    async def _round(self, prompts: list[Prompt], lengths: list[int], arrivals: Arrivals | None) -> None:
        began = time.perf_counter()
        self._rounds += 1
        requests = [
            GenerateRequest(
                request_id=f"{self._rounds}.{row}", session_id=f"{row}", prompt=prompt, max_tokens=length, seed=row
            )
            for row, (prompt, length) in enumerate(zip(prompts, lengths, strict=True))
        ]
        await self._actor.submit(encode(SubmitBatch(client=CLIENT, requests=requests, releases=[], aborts=[])))
        counts, left = [0] * len(lengths), len(lengths)
        while left:
            chunks = decode(await self._actor.collect(CLIENT), list[TokenChunk])
            seconds = time.perf_counter() - began
            for chunk in chunks:
                row = int(chunk.request_id.rpartition(".")[2])
                counts[row] += len(chunk.tokens)
                if arrivals is not None:
                    arrivals.stamp(row, counts[row], seconds)
                if chunk.finish_reason is not None:
                    left -= 1
                    if chunk.finish_reason is not FinishReason.LENGTH:
                        raise RuntimeError(f"{self.name} ended a request by {chunk.finish_reason}: {chunk.error}")
        if sum(counts) != sum(lengths):
            raise RuntimeError(f"{self.name} generated {sum(counts)} tokens where {sum(lengths)} were asked for")

    def _wait(self, action: Coroutine[Any, Any, Any]) -> Any:
        return self._loop.run_until_complete(action)


def _byte_tokenizer(vocabulary: int) -> Any:
    """A token for each byte and nothing else: servers do not start without a tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())[:vocabulary]
    made = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made)
