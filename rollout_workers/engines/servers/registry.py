"""Which adapter drives which kind of server."""

from __future__ import annotations

from pathlib import Path

from rollout_workers.engines.config import SERVERS, EnginesConfig
from rollout_workers.engines.servers.adapter import ServerAdapter
from rollout_workers.engines.servers.settings import ServerConfig


def make_adapter(config: EnginesConfig, model_path: str | Path | None = None) -> ServerAdapter:
    """The adapter for ``config.kind``; with ``model_path`` it knows the model's tokenizer, where it needs one."""
    if config.kind == "vllm":
        from rollout_workers.engines.vllm.adapter import VllmAdapter
        from rollout_workers.engines.vllm.stops import tokenizer_of

        return VllmAdapter(config.vllm, tokenizer_of(model_path))
    if config.kind == "sglang":
        from rollout_workers.engines.sglang.adapter import SglangAdapter

        return SglangAdapter(config.sglang)
    raise ValueError(f"engines.kind={config.kind} is no server; servers are {', '.join(SERVERS)}")


def server_settings(config: EnginesConfig) -> ServerConfig:
    """The settings of the kind of server that ``config`` names."""
    return config.vllm if config.kind == "vllm" else config.sglang
