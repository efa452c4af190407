"""Accelerator-seconds of trajectories by the cost model: what rollout and training of them take when saturated."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from benchmarks.sync_vs_async.evidence import Generation, Sample
from orchestrator.config import Config


@dataclass(frozen=True)
class UnitCosts:
    """Seconds of one accelerator a token, both in the units of the run (wall seconds, carried tokens).

    Saturated means all slots of an accelerator decode: ``slots`` sequences yield ``peak * slots / (slots + c0)`` tokens/s.
    Each context token is computed once, as with a prefix cache that forgets nothing.
    """

    sampled_s: float
    context_s: float
    trained_s: float
    slots: int = 1
    """Sequences that share a saturated accelerator."""

    @classmethod
    def from_config(cls, config: Config) -> UnitCosts:
        engine, learner = config.engines.synthetic, config.learner.synthetic
        per_token = engine.token_scale / engine.time_scale
        decode = engine.decode_tokens_per_s * engine.slots / (engine.slots + engine.half_concurrency)
        return cls(
            sampled_s=per_token / decode,
            context_s=per_token / engine.prefill_tokens_per_s,
            trained_s=per_token * learner.seconds_per_token,
            slots=engine.slots,
        )

    def rollout_s(self, samples: Iterable[Sample]) -> float:
        """Accelerator-seconds to generate these trajectories."""
        return sum(s.sampled * self.sampled_s + s.context * self.context_s for s in samples)

    def training_s(self, samples: Iterable[Sample]) -> float:
        """Accelerator-seconds to train on these trajectories."""
        return sum(s.length for s in samples) * self.trained_s

    def generated_s(self, generations: Iterable[Generation], began_at: float, ended_at: float) -> float:
        """Accelerator-seconds of what was generated between two times.

        A turn counts by the part that lies between of the time in which it was served: its last seconds, as many as it takes
        beside others in all slots. Before that it waited for a slot.
        """
        total = 0.0
        for one in generations:
            work = one.sampled * self.sampled_s + one.context * self.context_s
            served_from = max(one.began_at, one.ended_at - work * self.slots)
            inside = min(one.ended_at, ended_at) - max(served_from, began_at)
            if inside > 0:
                total += work * min(1.0, inside / max(one.ended_at - served_from, 1e-9))
        return total
