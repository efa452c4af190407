"""The Megatron-Core model of one rank: its stage's layers, its share of their matrices."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch

from learner.attention import make_layout
from learner.backends.megatron.architecture import Architecture
from learner.backends.megatron.cpu import make_experts_ready
from learner.backends.megatron.layers import Norm, Packed, RaggedCoreAttention
from learner.backends.megatron.layouts import padded
from learner.backends.megatron.parallel import Ranks
from learner.batching import MicroBatch


def transformer_config(model: Architecture, ranks: Ranks, dtype: torch.dtype) -> Any:
    """The `TransformerConfig`: no dropout, no fused kernels that need more than torch, summed gradients."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    sizes = ranks.sizes
    experts: dict[str, Any] = {}
    if model.experts:
        experts = {
            "num_moe_experts": model.experts,
            "moe_ffn_hidden_size": model.feed_forward,
            "moe_router_topk": model.experts_per_token,
            "moe_router_pre_softmax": not model.normalised_experts,
            "moe_router_load_balancing_type": "none",
            "moe_aux_loss_coeff": 0.0,
        }
    return TransformerConfig(
        num_layers=model.layers,
        hidden_size=model.hidden,
        num_attention_heads=model.heads,
        num_query_groups=model.kv_heads,
        kv_channels=model.head_width,
        ffn_hidden_size=model.feed_forward,
        normalization="RMSNorm",
        layernorm_epsilon=model.epsilon,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_qkv_bias=model.qkv_bias,
        qk_layernorm=model.qk_norm,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=sizes.tensor,
        pipeline_model_parallel_size=sizes.pipeline,
        expert_model_parallel_size=sizes.expert,
        expert_tensor_parallel_size=1,
        sequence_parallel=is_sequence_parallel(model, ranks),
        pipeline_dtype=dtype,
        params_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        calculate_per_token_loss=True,
        variable_seq_lengths=sizes.pipeline > 1,
        moe_token_dispatcher_type="alltoall",
        use_cpu_initialization=not torch.cuda.is_available(),
        perform_initialization=False,
        gradient_accumulation_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        persist_layer_norm=False,
        add_bias_linear=False,
        **experts,
    )


def is_sequence_parallel(model: Architecture, ranks: Ranks) -> bool:
    """Whether tensor-parallel ranks divide the tokens between matrices among them: experts need it, nothing else gains on a row."""
    return bool(model.experts) and ranks.sizes.tensor > 1


def build_stage(model: Architecture, ranks: Ranks, config: Any) -> Any:
    """The `GPTModel` of this rank's stage; its weights are not set yet."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build

    _without_random_numbers()
    if model.experts:
        make_experts_ready()
    layer = get_gpt_layer_local_spec(
        num_experts=model.experts or None, qk_layernorm=model.qk_norm, normalization="RMSNorm"
    )
    parts = layer.submodules
    parts.input_layernorm = parts.pre_mlp_layernorm = Norm
    attention = parts.self_attention.submodules
    attention.core_attention = RaggedCoreAttention
    if model.qk_norm:
        attention.q_layernorm = attention.k_layernorm = Norm
    block = TransformerBlockSubmodules(layer_specs=[layer] * get_num_layers_to_build(config), layer_norm=Norm)
    return GPTModel(
        config=config,
        transformer_layer_spec=block,
        vocab_size=padded(model.vocabulary, ranks.sizes.tensor),
        max_sequence_length=0,
        pre_process=ranks.first_stage,
        post_process=ranks.last_stage,
        share_embeddings_and_output_weights=model.tied,
        position_embedding_type="none",
    )


def _without_random_numbers() -> None:
    """No dropout, and weights come from files: the generators that Megatron-Core switches between need not exist."""
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    CudaRNGStatesTracker.fork = lambda self, *_, **__: nullcontext()


def recompute_layers(stage: Any) -> None:
    """Keep only the input of each layer and compute the rest again in the backward pass."""
    from functools import partial

    from torch.utils.checkpoint import checkpoint

    for layer in stage.decoder.layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)


class RotaryTable:
    """Cosines and sines as the Hugging Face model of this configuration has them, whatever scaling it asks for."""

    def __init__(self, config: Any, device: torch.device) -> None:
        from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

        self._rotary = LlamaRotaryEmbedding(config).to(device)

    @torch.no_grad()
    def packed(self, batch: MicroBatch, padding: int = 0) -> Packed:
        """``padding`` tokens at the end are a sequence of their own, each."""
        positions, layout = batch.position_ids, batch.layout
        if padding:
            positions = torch.nn.functional.pad(positions, (0, padding))
            lengths = [len(sample) for sample in batch.samples] + [1] * padding
            layout = make_layout(lengths, positions.device)
        like = torch.zeros(1, device=positions.device)
        cosines, sines = self._rotary(like, positions)
        return Packed(layout, cosines[0][:, None], sines[0][:, None])
