"""Settings of the synthetic engine (``engines.synthetic`` in a run's configuration)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class SyntheticEngineConfig:
    """The modelled hardware, in seconds and tokens of the modelled cluster, and how much smaller the run carries it.

    A run sleeps ``1 / time_scale`` wall seconds for a modelled second and carries one token for ``token_scale``
    modelled ones. The defaults are of the size of a model of 8 billion parameters on one GPU with 80 GB.
    """

    accelerators: int = 4
    """Modelled accelerators of each engine replica; sessions stick to one of them."""
    prefill_tokens_per_s: float = 20_000.0
    """Prompt tokens that one accelerator computes in a second."""
    decode_tokens_per_s: float = 4_000.0
    """Peak decode rate of one accelerator: c running sequences yield ``peak * c / (c + half_concurrency)`` tokens/s."""
    half_concurrency: float = 32.0
    """Running sequences at which an accelerator decodes at half its peak."""
    slots: int = 64
    """Most sequences running on an accelerator; the rest wait in order of arrival."""
    kv_tokens: int = 2_000_000
    """Tokens of KV that an accelerator holds (in its own memory or within its reach); idle sessions are evicted, the one that has waited longest first."""
    update_pause_s: float = 0.5
    """Seconds that an accelerator stands still when it switches to new weights."""
    stage_s: float = 2.0
    """Seconds that new weights take to arrive while decoding goes on."""
    prefill_chunk_tokens: int = 0
    """Prompt tokens computed in one step together with a token of each running sequence; 0: decoding waits for whole prompts."""
    kv_bytes_per_token: float = 131_072.0
    """Bytes of KV of a token: what a split of prefill and decode moves."""
    kv_gb_per_s: float = 50.0
    """Gigabytes of KV that an accelerator sends in a second."""
    time_scale: float = 50.0
    """Modelled seconds in a wall second."""
    token_scale: float = 50.0
    """Modelled tokens in a carried token."""

    def validate(self) -> None:
        """Raise ValueError, naming the key and what it may be, if any setting is out of range."""
        for name in ("accelerators", "slots", "kv_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"engines.synthetic.{name}={getattr(self, name)}: must be at least 1")
        for name in ("prefill_tokens_per_s", "decode_tokens_per_s", "kv_gb_per_s", "time_scale", "token_scale"):
            if getattr(self, name) <= 0:
                raise ValueError(f"engines.synthetic.{name}={getattr(self, name)}: must be greater than 0")
        for name in (
            "half_concurrency",
            "update_pause_s",
            "stage_s",
            "prefill_chunk_tokens",
            "kv_bytes_per_token",
        ):
            if getattr(self, name) < 0:
                raise ValueError(f"engines.synthetic.{name}={getattr(self, name)}: must not be negative")
        if self.kv_tokens < 2 * self.token_scale:
            raise ValueError(
                f"engines.synthetic.kv_tokens={self.kv_tokens} holds less than two carried tokens at "
                f"engines.synthetic.token_scale={self.token_scale:g}: raise the one or lower the other"
            )
