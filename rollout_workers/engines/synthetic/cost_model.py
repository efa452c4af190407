"""What a modelled accelerator costs, in the units of the run (wall seconds, carried tokens)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from rollout_workers.engines.synthetic.config import SyntheticEngineConfig


class SharedStep(NamedTuple):
    """What an accelerator does while it computes a prompt and decodes in the same steps."""

    sequence_rate: float
    """Tokens a second of each running sequence."""
    prefill_rate: float
    """Prompt tokens a second."""
    prefill_share: float
    """Share of a step that the prompt takes."""


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
    prefill_chunk: float = 0.0
    """Prompt tokens in a step that decodes as well; 0: a prompt is computed before decoding goes on."""
    kv_token_s: float = 0.0
    """Seconds that the KV of a token takes from one accelerator to another."""

    @property
    def local_prefill_cost(self) -> float:
        """Seconds of decoding that a second of computing prompts costs an accelerator that decodes.

        Less than 1 with chunks: a shared step reads the weights once for both.
        """
        if not self.prefill_chunk:
            return 1.0
        return max(0.0, 1.0 - self.half_concurrency / self.decode_peak / (self.prefill_chunk / self.prefill_rate))

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
            prefill_chunk=config.prefill_chunk_tokens / config.token_scale,
            kv_token_s=config.kv_bytes_per_token / (config.kv_gb_per_s * 1e9) / per_second,
        )

    def sequence_rate(self, running: int) -> float:
        """Tokens a second of each of ``running`` sequences; all together yield ``peak * c / (c + c0)``."""
        return self.decode_peak / (running + self.half_concurrency)

    def shared_step(self, running: int) -> SharedStep:
        """Steps of ``prefill_chunk`` prompt tokens and a token of each of ``running`` sequences.

        A decode step takes ``(c + c0) / peak``. Its fixed part (reading the weights) is covered by computing the chunk, if that
        takes longer; the part of each sequence (reading its KV) comes on top.
        """
        chunk_s = max(self.prefill_chunk / self.prefill_rate, self.half_concurrency / self.decode_peak)
        step_s = chunk_s + running / self.decode_peak
        return SharedStep(1.0 / step_s, self.prefill_chunk / step_s, chunk_s / step_s)
