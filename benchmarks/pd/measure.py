"""One layout of the engines on one workload, simulated: what its requests and its steps were like."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from typing import Any

from benchmarks.pd.cases import Case, Layout
from experience.accounting import Cause
from orchestrator.config import Config
from orchestrator.simulator.accounts import Accounts
from orchestrator.simulator.simulation import Simulation, SimulationOptions
from orchestrator.simulator.split_engines import SplitEngines
from rollout_workers.engines.protocol import EngineRole
from rollout_workers.engines.synthetic.recorder import Recorder, Use


@dataclass(frozen=True)
class SplitFigures:
    """What only engines with roles have; totals are of the whole run."""

    prefill_busy: float
    """Share of their time in which the prefill engines computed."""
    decode_busy: float
    prefill_kv: float
    """Share of the prefill engines' KV in use."""
    handed_over: int
    moved_tokens: int
    exposed_ms: float
    """Mean milliseconds that a request waited for its KV after its prompt was computed."""
    redone: int
    flips: int
    roles: str
    """Prefill:decode at the end."""
    reasons: list[str] = field(default_factory=list)
    """Of the flips, in order, and of flips that were refused."""


@dataclass(frozen=True)
class PdRow:
    """Seconds are those of the modelled cluster. Latencies are of all requests of the window."""

    case: str
    layout: str
    step_s: float
    tokens_per_s: float
    """Sampled tokens a second, all engines together."""
    first_token_p50_s: float
    first_token_p99_s: float
    inter_token_p50_ms: float
    inter_token_p99_ms: float
    decoding: float
    """Sequences an engine that decodes has in decoding on average."""
    prompt_share: float
    """Share of the engines' working time that went into prompts."""
    idle: float
    """Share of all engines' time without work."""
    computed_per_sampled: float
    """Prompt tokens computed for each sampled token."""
    prefix_hit: float
    kv_running: float
    """Share of the KV of the engines that decode held by requests, and by sessions that wait for their tools."""
    kv_suspended: float
    evicted_per_sampled: float
    """Tokens of suspended sessions' KV that made room, for each sampled token."""
    steps: int
    wall_s: float
    """What the simulation took."""
    split: SplitFigures | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def measure(case: Case, layout: Layout, config: Config) -> PdRow:
    """Simulate, and leave the steps out in which the pipeline fills. Raises SimulationStalled."""
    began_at = time.perf_counter()
    simulation = Simulation(config, SimulationOptions(record=True))
    simulation.run()
    first = min(case.skip, len(simulation.states) - 2)
    window = simulation.states[-1].since(simulation.states[first])
    recorded = [now.since(then) for now, then in zip(simulation.recorded[-1], simulation.recorded[first], strict=True)]
    return row_of(case, layout, window, recorded, _split_figures(simulation, recorded), time.perf_counter() - began_at)


def row_of(
    case: Case, layout: Layout, window: Accounts, recorded: list[Recorder], split: SplitFigures | None, wall_s: float
) -> PdRow:
    """The figures of a window. ``recorded``: of the engines that decode, then (split) of those that prefill."""
    felt, use = recorded[0], recorded[0].use
    prefill, decode = (window.rollout.get(cause, 0.0) for cause in (Cause.PREFILL, Cause.DECODE))
    total, work, sampled = sum(window.rollout.values()), prefill + decode, max(1, window.generated)
    return PdRow(
        case=case.name,
        layout=layout.name,
        step_s=window.at / window.steps,
        tokens_per_s=window.generated / window.at,
        first_token_p50_s=felt.first_token.quantile(0.5),
        first_token_p99_s=felt.first_token.quantile(0.99),
        inter_token_p50_ms=1000 * felt.inter_token.quantile(0.5),
        inter_token_p99_ms=1000 * felt.inter_token.quantile(0.99),
        decoding=use.sequence_s / use.seconds if use.seconds else 0.0,
        prompt_share=prefill / work if work else 0.0,
        idle=1 - work / total if total else 0.0,
        computed_per_sampled=(window.prompt - window.cached) / sampled,
        prefix_hit=window.cached / window.prompt if window.prompt else 0.0,
        kv_running=_share(use, use.kv_running),
        kv_suspended=_share(use, use.kv_suspended),
        evicted_per_sampled=use.evicted_tokens / sampled,
        steps=window.steps,
        wall_s=wall_s,
        split=split,
    )


def _split_figures(simulation: Simulation, recorded: list[Recorder]) -> SplitFigures | None:
    engines = simulation.engines
    if not isinstance(engines, SplitEngines):
        return None
    decode, prefill = recorded[0].use, recorded[1].use
    counts = engines.counts
    roles = [engines.role(name) for name in engines.names]
    reasons = [f"{at:.0f} s: {flip.name} to {flip.to.value}: {flip.reason}" for at, flip in counts.flips]
    return SplitFigures(
        prefill_busy=prefill.busy_s / prefill.seconds if prefill.seconds else 0.0,
        decode_busy=decode.busy_s / decode.seconds if decode.seconds else 0.0,
        prefill_kv=_share(prefill, prefill.kv_running + prefill.kv_suspended),
        handed_over=counts.handed_over,
        moved_tokens=counts.moved_tokens,
        exposed_ms=1000 * counts.exposed_s / max(1, counts.handed_over),
        redone=counts.redone,
        flips=len(counts.flips),
        roles=f"{roles.count(EngineRole.PREFILL)}:{roles.count(EngineRole.DECODE)}",
        reasons=reasons + [f"{at:.0f} s: refused: {reason}" for at, reason in counts.refusals],
    )


def _share(use: Use, tokens: float) -> float:
    return tokens / use.kv_capacity if use.kv_capacity else 0.0
