"""Settings of the SGLang engine (``engines.sglang`` in a run's configuration)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from rollout_workers.engines.servers.settings import ServerConfig

_SIZES = "set engines.slots and engines.max_len; Millrace keeps its requests within them"
_WEIGHTS = "weights come from the learner; Millrace sets this"
_STREAM = "Millrace reads the answers, token ids and log-probabilities, in one form and sets this"
_SPLIT = "set engines.prefill and engines.decode; each server's part follows from them"

OWNED = {
    "model": "set model.path",
    "model_path": "set model.path",
    "tokenizer_path": "the model's directory holds its tokenizer; set model.path",
    "tokenizer_mode": "the tokenizer must be the learner's",
    "skip_tokenizer_init": "stop strings need the tokenizer",
    "served_model_name": "set model.path",
    "host": "a server listens on its own node; set engines.sglang.urls for servers elsewhere",
    "port": "every replica gets a free port; set engines.sglang.urls for servers elsewhere",
    "device": "set engines.device",
    "dtype": "set engines.dtype",
    "context_length": _SIZES,
    "max_running_requests": _SIZES,
    "allow_auto_truncate": "a shortened prompt would be another context than the trajectory's",
    "random_seed": "set seed",
    "sampling_backend": "a request's seed must decide its tokens, which the other backends do not heed",
    "stream_interval": "set engines.stream_every",
    "incremental_streaming_output": _STREAM,
    "enable_metrics": "Millrace reads the metrics and turns them on",
    "api_key": "owned servers listen on their own node only; put external ones behind a gateway",
    "weight_version": _WEIGHTS,
    "custom_weight_loader": _WEIGHTS,
    "load_format": _WEIGHTS,
    "disaggregation_mode": _SPLIT,
    "disaggregation_bootstrap_port": _SPLIT,
    "dp_size": "set engines.replicas: each replica is a server",
    "data_parallel_size": "set engines.replicas: each replica is a server",
    "config": "write its keys under engines.sglang.args",
}
"""Arguments of SGLang that Millrace sets, with what to do instead."""


@dataclass
class SglangConfig(ServerConfig):
    """How SGLang servers are started, or where they are."""

    kind: ClassVar[str] = "sglang"
    owned: ClassVar[Mapping[str, str]] = OWNED
