"""What of a Hugging Face configuration the Megatron-Core model is built from, and which ones can be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from learner.backends.megatron.settings import Sizes
from learner.errors import ModelError

SUPPORTED = {
    "llama": "Llama",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "qwen3_moe": "Qwen3-MoE",
}
"""``model_type`` of a Hugging Face configuration, and what people call it."""


@dataclass(frozen=True)
class Architecture:
    """Shapes and switches of a decoder: grouped-query attention, gated SiLU feed-forward layers, root-mean-square norms."""

    model_type: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_width: int
    feed_forward: int
    """Width of the feed-forward layer, or of one expert."""
    vocabulary: int
    epsilon: float
    tied: bool
    """The output layer is the embedding."""
    qkv_bias: bool
    qk_norm: bool
    experts: int = 0
    """0: one dense feed-forward layer."""
    experts_per_token: int = 0
    normalised_experts: bool = False
    """The weights of a token's experts sum to 1."""

    def check(self, sizes: Sizes) -> None:
        """Raises ModelError if the model cannot be divided so, naming the setting and the number that it does not divide."""
        for name, number in (
            ("attention heads", self.heads),
            ("key-value heads", self.kv_heads),
            ("columns of the feed-forward layer", 0 if self.experts else self.feed_forward),
        ):
            if number % sizes.tensor:
                raise ModelError(
                    f"learner.megatron.tensor_parallel={sizes.tensor} does not divide the model's {number} {name}: use one "
                    f"of {divisors(number)}"
                )
        if self.vocabulary < sizes.tensor**2:
            raise ModelError(
                f"learner.megatron.tensor_parallel={sizes.tensor} is too much for the model's vocabulary of {self.vocabulary} tokens"
            )
        if self.layers % sizes.pipeline:
            raise ModelError(
                f"learner.megatron.pipeline_parallel={sizes.pipeline} does not divide the model's {self.layers} layers: use "
                f"one of {divisors(self.layers)}"
            )
        if not self.experts and sizes.expert > 1:
            raise ModelError(
                f"learner.megatron.expert_parallel={sizes.expert}, and this {SUPPORTED[self.model_type]} model has no experts: "
                "use 1"
            )
        if self.experts % sizes.expert:
            raise ModelError(
                f"learner.megatron.expert_parallel={sizes.expert} does not divide the model's {self.experts} experts: use one "
                f"of {divisors(self.experts)}"
            )


def divisors(number: int) -> list[int]:
    """All of them up to 64.

    >>> divisors(12)
    [1, 2, 3, 4, 6, 12]
    """
    return [divisor for divisor in range(1, min(number, 64) + 1) if number % divisor == 0]


def read_architecture(config: Any) -> Architecture:
    """Of a Hugging Face configuration. Raises ModelError for a model that this backend cannot train, with the list of those it can."""
    kind = config.model_type
    if kind not in SUPPORTED:
        raise ModelError(
            f"learner.backend=megatron cannot train a {kind} model; it trains {', '.join(sorted(SUPPORTED))} (model_type in "
            "config.json). Use learner.backend=fsdp"
        )
    for what, wanted in _switches(config).items():
        found = getattr(config, what, wanted)
        if found != wanted:
            raise ModelError(
                f"learner.backend=megatron cannot train a {kind} model with {what}={found} (config.json), only {wanted}: use "
                "learner.backend=fsdp"
            )
    return Architecture(
        model_type=kind,
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_width=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        feed_forward=config.moe_intermediate_size if kind == "qwen3_moe" else config.intermediate_size,
        vocabulary=config.vocab_size,
        epsilon=config.rms_norm_eps,
        tied=bool(config.tie_word_embeddings),
        qkv_bias=kind == "qwen2",
        qk_norm=kind in ("qwen3", "qwen3_moe"),
        experts=config.num_experts if kind == "qwen3_moe" else 0,
        experts_per_token=config.num_experts_per_tok if kind == "qwen3_moe" else 0,
        normalised_experts=bool(getattr(config, "norm_topk_prob", False)),
    )


def _switches(config: Any) -> dict[str, Any]:
    """What must be set so for the model to be the one that is built here."""
    switches: dict[str, Any] = {"hidden_act": "silu", "mlp_bias": False, "attention_dropout": 0.0}
    if config.model_type != "qwen2":
        switches["attention_bias"] = False
    if config.model_type == "qwen3_moe":
        switches |= {"decoder_sparse_step": 1, "mlp_only_layers": []}
    return switches
