"""Settings of the vLLM engine (``engines.vllm`` in a run's configuration)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from rollout_workers.engines.servers.settings import ServerConfig

_SIZES = "set engines.slots and engines.max_len; Millrace keeps its requests within them"
_WEIGHTS = "weights come from the learner; Millrace sets this"
_ANSWERS = "Millrace reads the answers in one form (token ids, log-probabilities, versions) and sets this"
_PLACE = "a server listens on its own node; set engines.vllm.urls for servers elsewhere"

OWNED = {
    "model": "set model.path",
    "model_tag": "set model.path",
    "tokenizer": "the model's directory holds its tokenizer; set model.path",
    "skip_tokenizer_init": "stop strings need the tokenizer",
    "tokens_only": "stop strings need the tokenizer",
    "served_model_name": "set model.path",
    "host": _PLACE,
    "port": "every replica gets a free port; set engines.vllm.urls for servers elsewhere",
    "uds": _PLACE,
    "api_key": "owned servers listen on their own node only; put external ones behind a gateway",
    "dtype": "set engines.dtype",
    "max_model_len": _SIZES,
    "max_num_seqs": _SIZES,
    "max_num_batched_tokens": "set engines.prefill_tokens",
    "seed": "set seed",
    "stream_interval": "set engines.stream_every",
    "logprobs_mode": "log-probabilities must be those of the distribution sampled from; Millrace sets this",
    "enable_scale_out": _ANSWERS,
    "enable_prompt_tokens_details": _ANSWERS,
    "return_tokens_as_token_ids": _ANSWERS,
    "disable_log_stats": "Millrace reads the metrics, which this turns off",
    "worker_extension_cls": _WEIGHTS,
    "weight_transfer_config": _WEIGHTS,
    "data_parallel_size": "set engines.replicas: each replica is a server",
    "api_server_count": "set engines.replicas: each replica is a server",
    "config": "write its keys under engines.vllm.args",
}
"""Arguments of vLLM that Millrace sets, with what to do instead."""


@dataclass
class VllmConfig(ServerConfig):
    """How vLLM servers are started, or where they are; ``env`` may set ``VLLM_CPU_KVCACHE_SPACE`` (GiB of KV)."""

    kind: ClassVar[str] = "vllm"
    owned: ClassVar[Mapping[str, str]] = OWNED
