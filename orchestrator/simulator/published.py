"""Published systems, simulated: what they state, what is assumed where they are silent, and what the simulator makes of it.

Each system is brought to a synchronous step on all accelerators in turns. Where the shares of rollout and training in it are
stated, they fix the speeds of engines and learner; the accelerators are then split as stated, or, where that is not stated,
as balances both. Where the split is stated and the shares are not, the split is taken to be balanced, which fixes the learner's
speed. Then the asynchronous step is simulated. The gain is the outcome; nothing is fitted to it.
What no paper states is how widely lengths spread, so every system is simulated with a narrower and a wider law as well.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from env_pool.workloads.laws import LogNormal
from experience.workload_trace import TraceEpisode, TraceHeader, TraceTurn, WorkloadTraceWriter
from orchestrator.bound import Calibration, split_of
from orchestrator.config import Config, load
from orchestrator.simulator.report import Outcome
from orchestrator.simulator.simulate import calibration_of, simulate_mode

SHRINK = 4
"""Accelerators and trajectories are both divided by this: what is compared is a ratio, and the simulation is as much faster."""
SPREADS = (0.7, 1.0, 1.3)
"""Sigma of the log-normal law of lengths: narrower, as assumed, wider."""
SLOTS = 256
HALF_CONCURRENCY = 32.0
PROMPT_TOKENS = 500
STEPS = 8
SYNC_STEPS = 4
FAST = 1000.0
"""Tokens/s of the engines before they are brought to the stated rollout time."""


@dataclass(frozen=True)
class PublishedSystem:
    """One system as its authors describe it. Times are in units of one synchronous step (``step`` = 1)."""

    name: str
    source: str
    setting: str
    published: tuple[float, float]
    """The gain over their synchronous baseline: lowest and highest that they name."""
    accelerators: int
    rollout_accelerators: int | None
    """Of them, when asynchronous; None: not stated, as balances rollout and training."""
    trajectories: int
    """A step's."""
    group_size: int
    target_lag: float
    mean_tokens: float
    cap_tokens: float
    rollout_share: float
    """Of the synchronous step."""
    training_share: float | None
    """Of the synchronous step; None: not stated, such that the stated split is balanced."""
    other_share: float
    """Of the synchronous step: changing roles, moving weights."""
    async_training_share: float | None
    """Training on the asynchronous learner's accelerators, over the synchronous step; None: it scales with their number."""
    stated: tuple[str, ...]
    assumed: tuple[str, ...]


SYSTEMS = (
    PublishedSystem(
        name="verl fully_async_policy",
        source="verl documentation, Recipe: Fully Async Policy Trainer",
        setting="Qwen2.5-Math-7B, 128 H20, DAPO",
        published=(2.35, 2.67),
        accelerators=128,
        rollout_accelerators=64,
        trajectories=512 * 16,
        group_size=16,
        target_lag=0.5,
        mean_tokens=3000,
        cap_tokens=28_000,
        rollout_share=177.85 / 356.30,
        training_share=(53.92 + 113.81) / 356.30,
        other_share=(356.30 - 177.85 - 53.92 - 113.81) / 356.30,
        async_training_share=113.16 / 356.30,
        stated=(
            "128 GPUs, split 64:64",
            "512 prompts x 16 a step, at most 28K tokens",
            "synchronous step 356.30 s: generation 177.85, old log-probabilities 53.92, update 113.81",
            "asynchronous update 113.16 s without the old log-probabilities",
            "staleness_threshold 0.5 with partial rollout",
        ),
        assumed=("mean length 3,000 tokens", "lengths log-normal", "decode law c / (c + 32), 256 slots"),
    ),
    PublishedSystem(
        name="AReaL",
        source="arXiv 2505.24298",
        setting="R1-distilled 1.5B, math",
        published=(2.77, 2.77),
        accelerators=128,
        rollout_accelerators=96,
        trajectories=512 * 16,
        group_size=16,
        target_lag=4.0,
        mean_tokens=8000,
        cap_tokens=27_648,
        rollout_share=0.8,
        training_share=None,
        other_share=0.03,
        async_training_share=None,
        stated=(
            "16 nodes of 8 GPUs, three quarters of them for inference",
            "512 prompts x 16 a step, at most 27,648 new tokens",
            "requests are interrupted for new weights and go on",
        ),
        assumed=(
            "the split of 3 to 1 balances rollout and training",
            "changing roles takes 3 % of the synchronous step",
            "staleness 4 (the paper uses several)",
            "mean length 8,000 tokens",
            "lengths log-normal",
            "decode law c / (c + 32), 256 slots",
        ),
    ),
    PublishedSystem(
        name="DORA",
        source="arXiv 2604.26256",
        setting="open-source benchmarks",
        published=(2.12, 2.12),
        accelerators=128,
        rollout_accelerators=None,
        trajectories=512 * 16,
        group_size=16,
        target_lag=2.0,
        mean_tokens=4000,
        cap_tokens=32_000,
        rollout_share=0.65,
        training_share=0.30,
        other_share=0.05,
        async_training_share=None,
        stated=("rollout is 50-80 % of the synchronous step", "several policy versions roll out at once, no bubbles"),
        assumed=(
            "rollout 65 % (the middle of 50-80 %), training 30 %",
            "128 accelerators in a balanced split; 8,192 trajectories a step; staleness 2",
            "mean length 4,000, at most 32,000 tokens",
            "lengths log-normal",
            "decode law c / (c + 32), 256 slots",
        ),
    ),
    PublishedSystem(
        name="ROLL Flash",
        source="arXiv 2510.11345",
        setting="RLVR, Qwen3-8B",
        published=(2.12, 2.24),
        accelerators=128,
        rollout_accelerators=None,
        trajectories=256 * 16,
        group_size=16,
        target_lag=2.0,
        mean_tokens=4000,
        cap_tokens=32_000,
        rollout_share=0.72,
        training_share=0.25,
        other_share=0.03,
        async_training_share=None,
        stated=(
            "rollout is over 70 % of the synchronous step",
            "the longest answers exceed the median by more than 20 times",
        ),
        assumed=(
            "rollout 72 %, training 25 %",
            "128 accelerators in a balanced split; 4,096 trajectories a step; async ratio 2",
            "mean length 4,000, at most 32,000 tokens",
            "lengths log-normal",
            "decode law c / (c + 32), 256 slots",
        ),
    ),
)


@dataclass(frozen=True)
class Comparison:
    """A system's published gain and the simulated ones, by spread."""

    system: PublishedSystem
    gains: dict[float, float]
    """Sigma of the lengths -> simulated synchronous step over the asynchronous one."""
    limits: dict[float, str]
    """Which side the asynchronous step waited for, by sigma."""

    @property
    def simulated(self) -> float:
        """With the spread that is assumed."""
        return self.gains[SPREADS[1]]


def compare_all(systems: Sequence[PublishedSystem] = SYSTEMS, shrink: int = SHRINK) -> list[Comparison]:
    """Simulate every system with every spread."""
    return [compare_system(system, shrink) for system in systems]


def compare_system(system: PublishedSystem, shrink: int = SHRINK) -> Comparison:
    """Simulate one system with every spread."""
    gains, limits = {}, {}
    for sigma in SPREADS:
        with tempfile.TemporaryDirectory(prefix="millrace-published-") as directory:
            trace = Path(directory) / "lengths.jsonl"
            write_lengths(trace, system, sigma, shrink)
            gains[sigma], limits[sigma] = _gain(system, trace, shrink)
    return Comparison(system, gains, limits)


def write_lengths(path: Path, system: PublishedSystem, sigma: float, shrink: int) -> None:
    """A workload trace of single-turn episodes whose lengths follow the system's law with this sigma."""
    steps = max(STEPS, SYNC_STEPS) + int(system.target_lag) + 2
    groups = system.trajectories // system.group_size // shrink * steps
    law = LogNormal.with_mean(system.mean_tokens, sigma, system.cap_tokens)
    lengths = law.sample(np.random.Generator(np.random.PCG64(0)), groups * system.group_size)
    with _writer(path) as writer:
        for place, length in enumerate(lengths.tolist()):
            index, member = divmod(place, system.group_size)
            turns = [TraceTurn(max(1, round(length)), 0.0, 0)]
            writer.write(
                TraceEpisode(
                    id=f"{index}-{member}",
                    index=index,
                    member=member,
                    arrived_at=0.0,
                    prompt_tokens=PROMPT_TOKENS,
                    turns=turns,
                )
            )


@contextmanager
def _writer(path: Path) -> Iterator[WorkloadTraceWriter]:
    writer = WorkloadTraceWriter(path, TraceHeader())
    try:
        yield writer
    finally:
        writer.close()


def _gain(system: PublishedSystem, trace: Path, shrink: int) -> tuple[float, str]:
    """The gain, and what limits the asynchronous step. The unit of time is that of ``FAST`` engines."""
    total = system.accelerators // shrink
    bare = _config(system, trace, shrink, "sync", total, 0.0, 0.0)
    free = simulate_mode(bare, skip=1)
    step_s = sum(free.window.makespans) / len(free.window.makespans) / system.rollout_share
    context = free.window.context / free.window.steps
    w_s = calibration_of(bare).w_s
    if system.training_share is not None:
        per_token = system.training_share * step_s * total / context
    else:
        assert system.rollout_accelerators is not None, "either the split or the shares are stated"
        per_token = w_s * (system.accelerators / system.rollout_accelerators - 1) / (context / free.trajectories)
    synchronous = simulate_mode(
        _config(system, trace, shrink, "sync", total, per_token, system.other_share * step_s), skip=1
    )
    if system.rollout_accelerators is not None:
        rollout = system.rollout_accelerators // shrink
    else:
        rollout, _ = split_of(Calibration(w_s, per_token * context / free.trajectories, total))
    if system.async_training_share is not None:
        per_token = system.async_training_share * step_s * (total - rollout) / context
    asynchronous = simulate_mode(_config(system, trace, shrink, "async", rollout, per_token, 0.0), skip=3)
    return synchronous.step_s / asynchronous.step_s, _limit(asynchronous)


def _limit(outcome: Outcome) -> str:
    working = outcome.window.learner
    return "learner" if working and max(working, key=lambda c: working[c]).value == "train" else "rollout"


def _config(
    system: PublishedSystem,
    trace: Path,
    shrink: int,
    mode: str,
    rollout: int,
    seconds_per_token: float,
    switch_s: float,
) -> Config:
    total = system.accelerators // shrink
    learner = total if mode == "sync" else total - rollout
    groups = system.trajectories // system.group_size // shrink
    longest = int(system.cap_tokens) + PROMPT_TOKENS + 1
    settings: dict[str, Any] = {
        "mode": mode,
        "run.steps": SYNC_STEPS if mode == "sync" else STEPS,
        "tasks.options": f"{{suite: replay, file: '{trace}', time_scale: 1, token_scale: 1}}",
        "rollout.groups_per_update": groups,
        "rollout.group_size": system.group_size,
        "rollout.concurrency": max(rollout * SLOTS, groups * system.group_size),
        "rollout.max_tokens": longest - 1,
        "rollout.max_episode_tokens": longest,
        "queue.budget_mb": 1e6,
        "engines.replicas": 1,
        "engines.max_len": longest,
        "engines.synthetic.accelerators": rollout,
        "engines.synthetic.slots": SLOTS,
        "engines.synthetic.half_concurrency": HALF_CONCURRENCY,
        "engines.synthetic.decode_tokens_per_s": FAST,
        "engines.synthetic.prefill_tokens_per_s": 100 * FAST,
        "engines.synthetic.kv_tokens": 100 * SLOTS * longest,
        "engines.synthetic.update_pause_s": 0.0,
        "engines.synthetic.stage_s": 0.0,
        "engines.synthetic.time_scale": 1,
        "engines.synthetic.token_scale": 1,
        "learner.synthetic.accelerators": learner,
        "learner.synthetic.seconds_per_token": seconds_per_token,
        "learner.synthetic.step_overhead_s": 0.0,
        "learner.synthetic.switch_s": switch_s,
        "learner.synthetic.time_scale": 1,
        "learner.synthetic.token_scale": 1,
    }
    if mode == "async":
        settings["staleness.target_lag"] = system.target_lag
        settings["staleness.max_lag"] = 1000
    return load(["synthetic"], [f"{key}={value}" for key, value in settings.items()])


def render_published(comparisons: Sequence[Comparison]) -> Table:
    """Published and simulated gains, with what was stated and assumed."""
    table = Table(title="gain over the synchronous baseline", title_justify="left", box=None, pad_edge=False)
    for name in ("system", "published", "simulated", "spread 0.7-1.3", "limit"):
        table.add_column(name, justify="left" if name in ("system", "limit") else "right", no_wrap=True)
    table.add_column("stated / assumed")
    for comparison in comparisons:
        system = comparison.system
        table.add_row(
            f"{system.name}\n{system.setting}",
            _range(*system.published),
            f"{comparison.simulated:.2f}",
            _range(min(comparison.gains.values()), max(comparison.gains.values())),
            comparison.limits[SPREADS[1]],
            f"{'; '.join(system.stated)}\nassumed: {'; '.join(system.assumed)}\n",
        )
    return table


def document_of_published(comparisons: Sequence[Comparison]) -> dict[str, Any]:
    """The JSON file."""
    return {
        "command": "simulate --published",
        "shrink": SHRINK,
        "results": [
            {
                "system": c.system.name,
                "source": c.system.source,
                "setting": c.system.setting,
                "published": list(c.system.published),
                "simulated": c.simulated,
                "by_spread": {str(sigma): gain for sigma, gain in c.gains.items()},
                "limit": {str(sigma): limit for sigma, limit in c.limits.items()},
                "stated": list(c.system.stated),
                "assumed": list(c.system.assumed),
            }
            for c in comparisons
        ],
    }


def _range(low: float, high: float) -> str:
    return f"{low:.2f}" if low == high else f"{low:.2f}-{high:.2f}"
