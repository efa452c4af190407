"""The modelled cluster, the workloads on it, and the configuration of each layout of its engines.

An accelerator has the size of a model of 8 billion parameters on one GPU with 80 GB: it decodes 4,000 tokens/s at most and half
as many with 32 sequences, computes 20,000 prompt tokens/s, and moves KV of 128 KiB a token at 50 GB/s (a 400 Gbit/s network).
Its 2 million tokens of KV include what is parked in host memory. Engines that do both compute 512 prompt tokens in a step at most.
The learner costs nothing but its updates, so that a step lasts as long as its rollout.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from env_pool.workloads.laws import LogNormal
from experience.workload_trace import TraceEpisode, TraceHeader, TraceTurn, WorkloadTraceWriter
from orchestrator.composition import ConfigError
from orchestrator.config import Config, load, validate

BASE = "synthetic"
LARGEST = 131_072
"""Tokens of an episode; longer ones are cut."""
GROUP_SIZE = 8

PREFIX_PROMPT = LogNormal.with_median(40_000, 0.3, cap=64_000)
PREFIX_TURNS = 24
PREFIX_OUTPUT = LogNormal.with_median(120, 0.6, cap=1_000)
PREFIX_OBSERVATION = LogNormal.with_median(1_500, 0.8, cap=8_000)
PREFIX_TOOL_S = LogNormal(-0.2, 1.5, cap=120)


@dataclass(frozen=True)
class Case:
    """A workload, and what a weight update does with the KV of sessions."""

    suite: str
    in_flight: int
    """Episodes in flight: they fill about two thirds of the KV when all engines decode."""
    kv: str = "keep"
    groups: int = 12
    """A step."""

    @property
    def name(self) -> str:
        return self.suite if self.kv == "keep" else f"{self.suite}, KV recomputed"

    @property
    def skip(self) -> int:
        """Steps until the pipeline is full: an episode takes ``in_flight / B`` steps on average (Little's law), some twice that."""
        return 1 + math.ceil(1.5 * self.in_flight / (self.groups * GROUP_SIZE))

    def sized(self, share: float) -> Case:
        """The same load on ``share`` times as many engines."""
        in_flight = max(GROUP_SIZE, round(self.in_flight * share))
        return replace(self, in_flight=in_flight, groups=max(2, round(self.groups * share)))


ENGINES = 8
CASES = (
    Case("reason", in_flight=512, groups=32),
    Case("swe", in_flight=320),
    Case("long", in_flight=160),
    Case("mixed", in_flight=256),
    Case("prefixes", in_flight=176),
    Case("swe", in_flight=320, kv="recompute"),
    Case("prefixes", in_flight=176, kv="recompute"),
)
SUITES = tuple(dict.fromkeys(case.suite for case in CASES))


@dataclass(frozen=True)
class Layout:
    """How the engines share the work: ``prefill`` and ``decode`` of them, or (0 and 0) all do both."""

    prefill: int = 0
    decode: int = 0
    auto: bool = False

    @property
    def name(self) -> str:
        return f"auto from {self.prefill}:{self.decode}" if self.auto else self.split

    @property
    def split(self) -> str:
        return f"{self.prefill}:{self.decode}" if self.prefill else "mixed"


def parse_splits(text: str, engines: int) -> list[Layout]:
    """``1:7,2:6`` as layouts. Raises ConfigError for anything that does not use exactly ``engines`` engines."""
    layouts = []
    for part in filter(None, (one.strip() for one in text.split(","))):
        prefill, _, decode = part.partition(":")
        if not (prefill.isdigit() and decode.isdigit() and int(prefill) and int(decode)):
            raise ConfigError(f"--split {part}: give PREFILL:DECODE, both at least 1, such as 1:{engines - 1}")
        if int(prefill) + int(decode) != engines:
            raise ConfigError(
                f"--split {part}: {int(prefill) + int(decode)} engines; it is compared with {engines} that do both, so both "
                "numbers must add up to that (or set --engines)"
            )
        layouts.append(Layout(int(prefill), int(decode)))
    return list(dict.fromkeys(layouts))


def default_splits(engines: int) -> list[Layout]:
    """One engine to prefill, two, ... up to half of them."""
    return [Layout(prefill, engines - prefill) for prefill in range(1, max(2, engines // 2 + 1)) if prefill < engines]


def settings_of(case: Case, layout: Layout, engines: int, steps: int, seed: int, recording: Path) -> dict[str, object]:
    """The overrides of the packaged config that make this run. Tokens and seconds are not scaled."""
    episodes = case.groups * GROUP_SIZE
    settings: dict[str, object] = {
        "seed": seed,
        "run.steps": case.skip + steps,
        "tasks.options.suite": "replay" if case.suite == "prefixes" else case.suite,
        "rollout.groups_per_update": case.groups,
        "rollout.group_size": GROUP_SIZE,
        "rollout.concurrency": case.in_flight,
        "rollout.max_turns": 1000,
        "rollout.max_tokens": LARGEST // 2,
        "rollout.max_episode_tokens": LARGEST,
        "staleness.target_lag": 1 + 2 * case.in_flight / episodes,
        "staleness.max_lag": 1000,
        "queue.budget_mb": 1_000_000,
        "weights.kv": case.kv,
        "engines.max_len": LARGEST,
        "engines.synthetic.accelerators": 1,
        "engines.synthetic.prefill_tokens_per_s": 20_000,
        "engines.synthetic.decode_tokens_per_s": 4_000,
        "engines.synthetic.half_concurrency": 32,
        "engines.synthetic.slots": 128,
        "engines.synthetic.kv_tokens": 2_000_000,
        "engines.synthetic.prefill_chunk_tokens": 512,
        "learner.synthetic.seconds_per_token": 0.0,
        "learner.synthetic.accelerators": 1,
    }
    for part in ("tasks.options", "engines.synthetic", "learner.synthetic"):
        settings |= {f"{part}.time_scale": 1, f"{part}.token_scale": 1}
    if case.suite == "prefixes":
        settings["tasks.options.file"] = recording
    if layout.prefill:
        settings |= {"engines.replicas": 1, "engines.prefill": layout.prefill, "engines.decode": layout.decode}
        settings["engines.roles"] = "auto" if layout.auto else "fixed"
    else:
        settings["engines.replicas"] = engines
    return settings


def config_of(settings: dict[str, object], overrides: tuple[str, ...] = ()) -> Config:
    """The configuration; ``overrides`` come last and win. Raises ConfigError."""
    config = load([BASE], [f"{key}={value}" for key, value in settings.items()] + list(overrides))
    validate(config)
    return config


def write_prefixes(path: Path, seed: int, tasks: int) -> None:
    """Record the workload ``prefixes``: a long document or repository in the prompt, and many short turns about it.

    Per episode: a prompt LogNormal(median 40,000, s = 0.3, cap 64,000) tokens, which a group shares, and 24 turns of
    LogNormal(median 120, 0.6) tokens whose tools take LogNormal(-0.2, 1.5) s (cap 120) and return LogNormal(median 1,500, 0.8)
    tokens (cap 8,000).
    """
    path.unlink(missing_ok=True)
    writer = WorkloadTraceWriter(path, TraceHeader(run="prefixes", model="modelled", environment="workload"))
    try:
        for index in range(tasks):
            generator = np.random.default_rng([seed, index])
            prompt = round(float(PREFIX_PROMPT.sample(generator, 1)[0]))
            for member in range(GROUP_SIZE):
                writer.write(_prefix_episode(generator, index, member, prompt))
    finally:
        writer.close()


def _prefix_episode(generator: np.random.Generator, index: int, member: int, prompt: int) -> TraceEpisode:
    outputs = PREFIX_OUTPUT.sample(generator, PREFIX_TURNS).tolist()
    tools = PREFIX_TOOL_S.sample(generator, PREFIX_TURNS).tolist()
    seen = PREFIX_OBSERVATION.sample(generator, PREFIX_TURNS).tolist()
    turns = [
        TraceTurn(max(1, round(output)), tool_s, max(1, round(observation)))
        for output, tool_s, observation in zip(outputs, tools, seen, strict=True)
    ]
    return TraceEpisode(
        id=f"{index}/{member}", index=index, member=member, arrived_at=0.0, prompt_tokens=prompt, turns=turns
    )
