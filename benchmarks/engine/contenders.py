"""The engines that are compared: each generates ``lengths[i]`` tokens after ``prompts[i]``, for all i at once."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from benchmarks.engine.workloads import Arrivals, Prompt
from rollout_workers.engines.config import SERVERS, EnginesConfig
from rollout_workers.engines.protocol import GenerateRequest
from rollout_workers.engines.torch_engine import TorchEngine

TIME_OUT_S = 120.0


class Contender(Protocol):
    """``run`` generates and counts; with ``arrivals`` each token is delivered, and stamped, as soon as it is there."""

    name: str

    def run(self, prompts: list[Prompt], lengths: list[int], arrivals: Arrivals | None = None) -> None: ...

    def close(self) -> None: ...


class Embedded:
    """The embedded engine, log-probabilities and versions included."""

    name = "torch engine"

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._engine = self._make()
        self._streaming: TorchEngine | None = None

    def run(self, prompts: list[Prompt], lengths: list[int], arrivals: Arrivals | None = None) -> None:
        engine = self._engine
        if arrivals is not None:
            engine = self._streaming = self._streaming or self._make(stream_every=1)
        began = time.perf_counter()
        for row, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
            engine.submit(
                GenerateRequest(request_id=f"{row}", session_id=f"{row}", prompt=prompt, max_tokens=length, seed=row)
            )
        counts = [0] * len(lengths)
        while engine.has_work:
            chunks = engine.step()
            seconds = time.perf_counter() - began
            for chunk in chunks:
                row = int(chunk.request_id)
                counts[row] += len(chunk.tokens)
                if arrivals is not None:
                    arrivals.stamp(row, counts[row], seconds)
        for row in range(len(lengths)):
            engine.release(f"{row}")
        _check(self.name, sum(counts), sum(lengths))

    def close(self) -> None:
        self._streaming = None
        del self._engine

    def _make(self, **settings: int) -> TorchEngine:
        return TorchEngine(copy.deepcopy(self._model), None, EnginesConfig(device=self._model.device.type, **settings))  # type: ignore[arg-type]


class Generate:
    """One ``model.generate`` call over the whole batch (padded on the left), without log-probabilities."""

    name = "model.generate"

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = copy.deepcopy(model)
        self._model.set_attn_implementation("sdpa")

    def run(self, prompts: list[Prompt], lengths: list[int], arrivals: Arrivals | None = None) -> None:
        began = time.perf_counter()
        width = max(len(prompt) for prompt in prompts)
        padded = np.stack([np.pad(prompt, (width - len(prompt), 0)) for prompt in prompts]).astype(np.int64)
        real = np.stack([np.arange(width) >= width - len(prompt) for prompt in prompts]).astype(np.int64)
        device = self._model.device
        ids, mask = torch.from_numpy(padded).to(device), torch.from_numpy(real).to(device)
        settings = GenerationConfig(
            max_new_tokens=max(lengths), do_sample=True, temperature=1.0, top_k=0, top_p=1.0, pad_token_id=0
        )
        streamer = None if arrivals is None else _Stamps(arrivals, len(lengths), began)
        with torch.inference_mode():
            out = self._model.generate(ids, attention_mask=mask, generation_config=settings, streamer=streamer)
        _check(self.name, out.shape[1] - width, max(lengths))

    def close(self) -> None:
        del self._model


class _Stamps(BaseStreamer):
    """Gets the prompts first, then the next token of every row, once a step."""

    def __init__(self, arrivals: Arrivals, rows: int, began: float) -> None:
        self._arrivals, self._rows, self._began = arrivals, rows, began
        self._steps = -1

    def put(self, value: Any) -> None:
        del value
        self._steps += 1
        seconds = time.perf_counter() - self._began
        for row in range(self._rows):
            self._arrivals.stamp(row, self._steps, seconds)

    def end(self) -> None:
        """Nothing is held back."""


class ContinuousBatching:
    """transformers' continuous batching, its thread started before and kept between the repeats."""

    name = "transformers CB"

    def __init__(self, model: PreTrainedModel) -> None:
        model = copy.deepcopy(model)
        model.set_attn_implementation("sdpa")
        self._manager = model.init_continuous_batching(
            generation_config=GenerationConfig(do_sample=True, top_k=0, eos_token_id=-1, pad_token_id=0),
            continuous_batching_config=ContinuousBatchingConfig(
                page_size=32, num_blocks=1024, max_batch_tokens=1024, return_logprobs=True
            ),
        )
        self._manager.start()
        self._requests = 0

    def run(self, prompts: list[Prompt], lengths: list[int], arrivals: Arrivals | None = None) -> None:
        began = time.perf_counter()
        rows = {}
        for row, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
            self._requests += 1
            rows[f"{self._requests}"] = row
            self._manager.add_request(
                prompt.tolist(), f"{self._requests}", max_new_tokens=length, streaming=arrivals is not None
            )
        count, left = 0, len(rows)
        while left:
            result = self._manager.get_result(timeout=max(began + TIME_OUT_S - time.perf_counter(), 0.0))
            if result is None:
                raise TimeoutError(f"{self.name}: no result within {TIME_OUT_S:.0f} s")
            if arrivals is not None:
                arrivals.stamp(rows[result.request_id], len(result.generated_tokens), time.perf_counter() - began)
            if result.is_finished():
                count += len(result.generated_tokens)
                left -= 1
        _check(self.name, count, sum(lengths))

    def close(self) -> None:
        self._manager.stop(block=True, timeout=TIME_OUT_S)


CONTENDERS: tuple[Callable[[PreTrainedModel], Contender], ...] = (Embedded, Generate, ContinuousBatching)


def skipped(measured: Sequence[str] = ()) -> list[dict[str, str]]:
    """The engines that are not measured, each with the reason."""
    reason = "a server; `--engines` measures it where `make engines` has been run"
    return [{"engine": name, "reason": reason} for name in SERVERS if name not in measured]


def _check(name: str, generated: int, expected: int) -> None:
    if generated != expected:
        raise RuntimeError(f"{name} generated {generated} tokens where {expected} were asked for")
