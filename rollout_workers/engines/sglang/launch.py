"""The command line and the environment of an SGLang server."""

from __future__ import annotations

from typing import Any

from rollout_workers.engines.servers.adapter import Launch
from rollout_workers.engines.servers.arguments import merged, normal, to_command
from rollout_workers.engines.servers.device import data_type, on_cpu
from rollout_workers.engines.sglang.config import SglangConfig
from rollout_workers.engines.sglang.disaggregation import role_arguments, role_environment
from rollout_workers.engines.sglang.requests import WHOLE_VOCABULARY
from weight_sync.engine_plugin.sglang_messages import MODEL_PATH

LOADER = "weight_sync.engine_plugin.sglang_loader.load"
"""Called by SGLang's scheduler in its own process: Millrace's side of a weight update there."""

SAMPLING = "pytorch"
"""The sampling backend in which Millrace's plugin makes seeds count; the others end the server over one."""

HEADROOM = 16
"""Tokens of context beyond ``max_len``: SGLang keeps some for itself."""


def command(config: SglangConfig, launch: Launch) -> list[str]:
    """The command line, beginning with ``launch.python``."""
    cpu = on_cpu(launch)
    defaults = {
        **(_cpu_arguments(launch) if cpu else {}),
        "skip_server_warmup": True,
        # The figures that /metrics gives are taken when they are logged.
        "decode_log_interval": 8,
        "log_level": "warning",
        "chunked_prefill_size": launch.prefill_tokens,
        "sampling_mask_max_tokens": WHOLE_VOCABULARY,
        **role_arguments(launch, cpu),
    }
    owned = {
        "model_path": launch.model_path,
        "host": launch.host,
        "port": launch.port,
        "device": "cpu" if cpu else "cuda",
        "dtype": data_type(launch),
        "context_length": launch.max_len + HEADROOM,
        "max_running_requests": launch.slots,
        "random_seed": launch.seed,
        "sampling_backend": SAMPLING,
        "stream_interval": launch.stream_every,
        "incremental_streaming_output": True,
        "enable_metrics": True,
        "weight_version": launch.version,
        "custom_weight_loader": [LOADER],
    }
    words = to_command(merged(defaults, config.args) | owned, lists_as_words=True)
    return [launch.python, "-m", "sglang.launch_server", *words]


def environment(config: SglangConfig, launch: Launch) -> dict[str, str]:
    """Variables on top of those of this process; the configuration's own win."""
    cpu = on_cpu(launch)
    variables = {
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        MODEL_PATH: launch.model_path,
        # Positions beyond the model's are never used: Millrace's own max_len is checked against the model.
        "SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN": "1",
        **role_environment(launch, cpu),
    }
    if cpu:
        variables["SGLANG_USE_CPU_ENGINE"] = "1"
    if launch.threads is not None:
        variables["OMP_NUM_THREADS"] = str(launch.threads)
    if launch.plugin_path:
        variables["PYTHONPATH"] = launch.plugin_path
    return variables | config.env


def ranks(config: SglangConfig) -> int:
    """Processes among which the server splits each tensor."""
    given = {normal(name): value for name, value in config.args.items()}
    return int(next((given[name] for name in ("tp_size", "tensor_parallel_size", "tp") if name in given), 1))


def _cpu_arguments(launch: Launch) -> dict[str, Any]:
    """What SGLang needs on a CPU without matrix instructions of its own, and a KV cache of the size that was asked for."""
    return {
        "attention_backend": "torch_native",
        "disable_cuda_graph": True,
        "disable_overlap_schedule": True,
        "mem_fraction_static": 0.5,
        "max_total_tokens": launch.slots * (launch.max_len + HEADROOM),
    }
