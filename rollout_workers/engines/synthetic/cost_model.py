"""What a modelled accelerator costs, in the units of the run (wall seconds, carried tokens)."""

from __future__ import annotations

from dataclasses import dataclass

from rollout_workers.engines.synthetic.config import SyntheticEngineConfig


@dataclass(frozen=True)
class CostModel:
    """Rates and capacities of one accelerator; seconds and tokens are those of the run, after scaling."""

    prefill_rate: float
    """Prompt tokens a second."""
    decode_peak: float
    """Tokens a second of infinitely many sequences."""
    half_concurrency: float
    slots: int
    kv_tokens: float
    update_pause_s: float
    stage_s: float

    @classmethod
    def from_config(cls, config: SyntheticEngineConfig) -> CostModel:
        """The modelled cluster's figures divided by ``time_scale`` and ``token_scale``."""
        per_second = config.time_scale / config.token_scale
        return cls(
            prefill_rate=config.prefill_tokens_per_s * per_second,
            decode_peak=config.decode_tokens_per_s * per_second,
            half_concurrency=config.half_concurrency,
            slots=config.slots,
            kv_tokens=config.kv_tokens / config.token_scale,
            update_pause_s=config.update_pause_s / config.time_scale,
            stage_s=config.stage_s / config.time_scale,
        )

    def sequence_rate(self, running: int) -> float:
        """Tokens a second of each of ``running`` sequences; all together yield ``peak * c / (c + c0)``."""
        return self.decode_peak / (running + self.half_concurrency)
