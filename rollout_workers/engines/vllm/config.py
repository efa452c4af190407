"""Settings of the vLLM engine (``engines.vllm`` in a run's configuration)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Dict, List, Optional  # noqa: UP035  (OmegaConf reads these annotations)

from rollout_workers.engines.servers.arguments import check_arguments

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
class VllmConfig:
    """How vLLM servers are started, or where they are."""

    args: Dict[str, Any] = field(default_factory=dict)  # noqa: UP006
    """Passed through: ``gpu_memory_utilization: 0.8`` becomes ``--gpu-memory-utilization 0.8``; true is a flag, null leaves a default out."""
    urls: List[str] = field(default_factory=list)  # noqa: UP006
    """Servers that run already, one for each replica, instead of ones that the run starts."""
    python: Optional[str] = None  # noqa: UP045
    """Interpreter of the environment that holds vLLM; None: ``.venv-vllm`` beside the repository (`make engines`)."""
    startup_timeout_s: float = 600.0
    """Until a started server must answer, in seconds."""
    request_timeout_s: float = 120.0
    """Longest silence of a server during a call, in seconds."""
    env: Dict[str, str] = field(default_factory=dict)  # noqa: UP006
    """Environment variables of the servers, over those that Millrace sets (``VLLM_CPU_KVCACHE_SPACE``: GiB of KV)."""

    def validate(self) -> None:
        """Raise ValueError, naming the key and what would be right."""
        check_arguments("engines.vllm.args", self.args, OWNED)
        for url in self.urls:
            if not url.startswith(("http://", "https://")):
                raise ValueError(f"engines.vllm.urls: {url!r} is no address; write http://host:port")
        for name in ("startup_timeout_s", "request_timeout_s"):
            if not getattr(self, name) > 0:
                raise ValueError(f"engines.vllm.{name}={getattr(self, name)}: must be greater than 0 (seconds)")
