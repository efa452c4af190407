"""The command line and the environment of a vLLM server."""

from __future__ import annotations

from typing import Any

from rollout_workers.engines.servers.adapter import Launch
from rollout_workers.engines.servers.arguments import merged, normal, to_command
from rollout_workers.engines.servers.device import data_type, on_cpu
from rollout_workers.engines.vllm.config import VllmConfig
from rollout_workers.engines.vllm.split import role_arguments, role_environment

ENTRY_POINT = "vllm.entrypoints.openai.api_server"
EXTENSION = "weight_sync.engine_plugin.vllm_extension.MillraceWorker"
"""Mixed into the worker class of the server, in its own process: Millrace's side of a weight update there."""

CPU_BLOCK = 32
"""Tokens of a KV block on a CPU, where vLLM takes multiples of 32 only; smaller blocks share more of a prefix."""
CPU_KV_GIB = "1"
KV_SIZES = {"kv_cache_memory_bytes", "gpu_memory_utilization"}
"""Arguments that say how much KV there is; on a CPU the variable would overrule them."""


def command(config: VllmConfig, launch: Launch) -> list[str]:
    """The command line, beginning with ``launch.python``."""
    cpu = on_cpu(launch)
    defaults = {
        **(_cpu_arguments() if cpu else {}),
        **role_arguments(launch, cpu),
        "uvicorn_log_level": "warning",
    }
    owned = {
        "model": launch.model_path,
        "host": launch.host,
        "port": launch.port,
        "dtype": data_type(launch),
        "max_model_len": launch.max_len,
        "max_num_seqs": launch.slots,
        # A step holds the decodes of all requests beside its part of the prompts.
        "max_num_batched_tokens": launch.prefill_tokens + launch.slots,
        "seed": launch.seed,
        "stream_interval": launch.stream_every,
        "logprobs_mode": "processed_logprobs",
        "enable_scale_out": True,
        "enable_prompt_tokens_details": True,
        "worker_extension_cls": EXTENSION,
    }
    words = to_command(merged(defaults, config.args) | owned)
    return [launch.python, "-m", ENTRY_POINT, *words]


def environment(config: VllmConfig, launch: Launch) -> dict[str, str]:
    """Variables on top of those of this process; the configuration's own win."""
    cpu = on_cpu(launch)
    variables = {
        "VLLM_SERVER_DEV_MODE": "1",  # pausing, aborting and weight updates are its routes
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        **role_environment(launch, cpu),
    }
    if cpu:
        if not KV_SIZES & {normal(name) for name in config.args}:
            variables["VLLM_CPU_KVCACHE_SPACE"] = CPU_KV_GIB
        # Several servers on a machine would all bind their threads to the same first cores.
        variables["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
        # A single worker computes in the engine's process; in one of its own it spins on a core while it waits for steps.
        variables["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    if launch.threads is not None:
        variables["OMP_NUM_THREADS"] = str(launch.threads)
    if launch.plugin_path:
        variables["PYTHONPATH"] = launch.plugin_path
    return variables | config.env


def _cpu_arguments() -> dict[str, Any]:
    return {"enforce_eager": True, "block_size": CPU_BLOCK}
