"""Settings of the SGLang engine (``engines.sglang`` in a run's configuration)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Dict, List, Optional  # noqa: UP035  (OmegaConf reads these annotations)

from rollout_workers.engines.servers.arguments import check_arguments

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
class SglangConfig:
    """How SGLang servers are started, or where they are."""

    args: Dict[str, Any] = field(default_factory=dict)  # noqa: UP006
    """Passed through: ``mem_fraction_static: 0.7`` becomes ``--mem-fraction-static 0.7``; true is a flag, null leaves a default out."""
    urls: List[str] = field(default_factory=list)  # noqa: UP006
    """Servers that run already, one for each replica, instead of ones that the run starts."""
    python: Optional[str] = None  # noqa: UP045
    """Interpreter of the environment that holds SGLang; None: ``.venv-sglang`` beside the repository (`make engines`)."""
    startup_timeout_s: float = 600.0
    """Until a started server must answer, in seconds."""
    request_timeout_s: float = 120.0
    """Longest silence of a server during a call, in seconds."""
    env: Dict[str, str] = field(default_factory=dict)  # noqa: UP006
    """Environment variables of the servers, over those that Millrace sets."""

    def validate(self) -> None:
        """Raise ValueError, naming the key and what would be right."""
        check_arguments("engines.sglang.args", self.args, OWNED)
        for url in self.urls:
            if not url.startswith(("http://", "https://")):
                raise ValueError(f"engines.sglang.urls: {url!r} is no address; write http://host:port")
        for name in ("startup_timeout_s", "request_timeout_s"):
            if not getattr(self, name) > 0:
                raise ValueError(f"engines.sglang.{name}={getattr(self, name)}: must be greater than 0 (seconds)")
