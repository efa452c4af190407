"""The embedded engine against ``model.generate`` and transformers' continuous batching: tokens a second.

All three run in one process, on the same model (the quickstart's size, random weights), the same prompts and the same
numbers of tokens, repeat after repeat in turn, so that a busy machine slows them alike. Printed are the medians and
their ratios to ``model.generate``, by the clock and by CPU seconds of the process (which other processes
disturb less). Only tokens that were asked for count: ``generate`` runs a batch until its longest
row ends.
"""

from __future__ import annotations

import copy
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import click
import numpy as np
import numpy.typing as npt
import torch
from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from rollout_workers.engines.config import EnginesConfig
from rollout_workers.engines.protocol import GenerateRequest
from rollout_workers.engines.torch_engine import TorchEngine

VOCABULARY = 256
TIME_OUT_S = 120.0

Prompt = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Workload:
    """``requests`` requests at once; numbers of new tokens and of prompt tokens are uniform in their ranges."""

    name: str
    requests: int
    new_tokens: tuple[int, int]
    prompt_tokens: tuple[int, int]

    def lengths(self, seed: int) -> list[int]:
        rng = np.random.default_rng(seed)
        return [int(length) for length in rng.integers(*self.new_tokens, self.requests, endpoint=True)]

    def prompts(self, seed: int, vocabulary: int) -> list[Prompt]:
        rng = np.random.default_rng([seed, 1])
        sizes = rng.integers(*self.prompt_tokens, self.requests, endpoint=True)
        return [rng.integers(0, vocabulary, size).astype(np.int32) for size in sizes]


WORKLOADS = (
    Workload("uniform 32 x 64", 32, (64, 64), (20, 20)),
    Workload("uniform 128 x 32", 128, (32, 32), (20, 20)),
    Workload("ragged 32 x 8-128", 32, (8, 128), (20, 20)),
    Workload("ragged 128 x 8-128", 128, (8, 128), (20, 20)),
    Workload("ragged 32 x 8-128, prompts 8-32", 32, (8, 128), (8, 32)),
    Workload("ragged 128 x 8-128, prompts 8-32", 128, (8, 128), (8, 32)),
)


class Contender(Protocol):
    """Something that generates ``lengths[i]`` tokens after ``prompts[i]``, for all i at once."""

    name: str

    def run(self, prompts: list[Prompt], lengths: list[int]) -> None: ...

    def close(self) -> None: ...


class Embedded:
    """The embedded engine, log-probabilities and versions included."""

    name = "torch engine"

    def __init__(self, model: PreTrainedModel) -> None:
        self._engine = TorchEngine(copy.deepcopy(model), None, EnginesConfig(device=model.device.type))

    def run(self, prompts: list[Prompt], lengths: list[int]) -> None:
        for row, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
            self._engine.submit(
                GenerateRequest(request_id=f"{row}", session_id=f"{row}", prompt=prompt, max_tokens=length, seed=row)
            )
        count = 0
        while self._engine.has_work:
            count += sum(len(chunk.tokens) for chunk in self._engine.step())
        for row in range(len(lengths)):
            self._engine.release(f"{row}")
        _check(self.name, count, sum(lengths))

    def close(self) -> None:
        del self._engine


class Generate:
    """One ``model.generate`` call over the whole batch (padded on the left), without log-probabilities."""

    name = "model.generate"

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = copy.deepcopy(model)
        self._model.set_attn_implementation("sdpa")

    def run(self, prompts: list[Prompt], lengths: list[int]) -> None:
        width = max(len(prompt) for prompt in prompts)
        padded = np.stack([np.pad(prompt, (width - len(prompt), 0)) for prompt in prompts]).astype(np.int64)
        real = np.stack([np.arange(width) >= width - len(prompt) for prompt in prompts]).astype(np.int64)
        device = self._model.device
        ids, mask = torch.from_numpy(padded).to(device), torch.from_numpy(real).to(device)
        settings = GenerationConfig(
            max_new_tokens=max(lengths), do_sample=True, temperature=1.0, top_k=0, top_p=1.0, pad_token_id=0
        )
        with torch.inference_mode():
            out = self._model.generate(ids, attention_mask=mask, generation_config=settings)
        _check(self.name, out.shape[1] - width, max(lengths))

    def close(self) -> None:
        del self._model


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

    def run(self, prompts: list[Prompt], lengths: list[int]) -> None:
        for prompt, length in zip(prompts, lengths, strict=True):
            self._requests += 1
            self._manager.add_request(prompt.tolist(), request_id=f"{self._requests}", max_new_tokens=length)
        count, deadline = 0, time.perf_counter() + TIME_OUT_S
        for _ in lengths:
            result = self._manager.get_result(timeout=max(deadline - time.perf_counter(), 0.0))
            if result is None:
                raise TimeoutError(f"{self.name}: no result within {TIME_OUT_S:.0f} s")
            count += len(result.generated_tokens)
        _check(self.name, count, sum(lengths))

    def close(self) -> None:
        self._manager.stop(block=True, timeout=TIME_OUT_S)


CONTENDERS: tuple[Callable[[PreTrainedModel], Contender], ...] = (Embedded, Generate, ContinuousBatching)


def quickstart_sized_model(seed: int, device: str) -> PreTrainedModel:
    """A Qwen3 of the quickstart's shape (2 layers, hidden 128, 0.3 M parameters) with random float32 weights."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        intermediate_size=256,
        tie_word_embeddings=True,
        initializer_range=0.06,
        max_position_embeddings=1024,
        bos_token_id=None,
        eos_token_id=None,
    )
    return Qwen3ForCausalLM(config).eval().to(device)


def run(
    json_path: str | None = None,
    *,
    repeats: int = 7,
    threads: int = 1,
    seed: int = 0,
    device: str = "cpu",
    workloads: tuple[Workload, ...] = WORKLOADS,
) -> dict[str, Any]:
    """Measure every workload; returns (and writes to ``json_path``) the result of `millrace bench engine`."""
    torch.set_num_threads(threads)
    model = quickstart_sized_model(seed, device)
    contenders = [make(model) for make in CONTENDERS]
    try:
        rows = [_measure(workload, contenders, repeats, seed) for workload in workloads]
    finally:
        for contender in contenders:
            contender.close()
    result = {
        "bench": "engine",
        "machine": _machine(device),
        "versions": {name: version(name) for name in ("torch", "transformers", "numpy")},
        "seeds": [seed],
        "settings": {"repeats": repeats, "threads": threads, "device": device},
        "results": rows,
    }
    if json_path is not None:
        Path(json_path).write_text(json.dumps(result, indent=2) + "\n")
    return result


def _measure(workload: Workload, contenders: list[Contender], repeats: int, seed: int) -> dict[str, Any]:
    """Median tokens/s of each contender on one workload; a first, unmeasured round warms up."""
    prompts = workload.prompts(seed, VOCABULARY)
    lengths = workload.lengths(seed)
    rates: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    cpu_rates: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    for repeat in range(repeats + 1):
        for contender in contenders:
            began, cpu_began = time.perf_counter(), time.process_time()
            contender.run(prompts, lengths)
            seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - cpu_began
            if repeat > 0:
                rates[contender.name].append(sum(lengths) / seconds)
                cpu_rates[contender.name].append(sum(lengths) / cpu_seconds)
    medians = {name: statistics.median(values) for name, values in rates.items()}
    cpu_medians = {name: statistics.median(values) for name, values in cpu_rates.items()}
    return {
        "workload": asdict(workload),
        "tokens": sum(lengths),
        "tokens_per_s": {name: round(rate, 1) for name, rate in medians.items()},
        "tokens_per_s_range": {name: [round(min(v), 1), round(max(v), 1)] for name, v in rates.items()},
        "ratio_to_generate": {name: round(rate / medians[Generate.name], 3) for name, rate in medians.items()},
        "tokens_per_cpu_s": {name: round(rate, 1) for name, rate in cpu_medians.items()},
        "cpu_ratio_to_generate": {
            name: round(rate / cpu_medians[Generate.name], 3) for name, rate in cpu_medians.items()
        },
    }


def _check(name: str, generated: int, expected: int) -> None:
    if generated != expected:
        raise RuntimeError(f"{name} generated {generated} tokens where {expected} were asked for")


def _machine(device: str) -> dict[str, Any]:
    return {
        "platform": platform.platform(),
        "python": platform.python_version(),
        "processor": torch.backends.cpu.get_cpu_capability(),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
    }


@click.command()
@click.option("--json", "json_path", type=click.Path(dir_okay=False), help="Write the result to this file.")
@click.option("--repeats", default=7, show_default=True, help="Measured rounds; the median counts.")
@click.option("--threads", default=1, show_default=True, help="CPU threads of torch.")
@click.option("--seed", default=0, show_default=True)
@click.option("--device", default="cpu", show_default=True, type=click.Choice(["cpu", "cuda"]))
def engine(json_path: str | None, repeats: int, threads: int, seed: int, device: str) -> None:
    """Tokens/s of the embedded engine against model.generate and transformers' continuous batching."""
    result = run(json_path, repeats=repeats, threads=threads, seed=seed, device=device)
    names = list(result["results"][0]["tokens_per_s"])
    click.echo(f"{'tokens/s (ratio; by CPU time)':36}" + "".join(f"{name:>24}" for name in names))
    for row in result["results"]:
        cells = [
            f"{row['tokens_per_s'][n]:,.0f} ({row['ratio_to_generate'][n]:.2f}; {row['cpu_ratio_to_generate'][n]:.2f})"
            for n in names
        ]
        click.echo(f"{row['workload']['name']:36}" + "".join(f"{cell:>24}" for cell in cells))
