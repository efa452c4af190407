"""Where a server computes, and with which data type, before it is started."""

from __future__ import annotations

import glob
import os
from collections.abc import Mapping

from rollout_workers.engines.servers.adapter import Launch


def on_cpu(launch: Launch) -> bool:
    """Whether the server computes on the CPU; ``auto`` takes a GPU where this machine has one to give."""
    if launch.device == "auto":
        return not gpu_at_hand(os.environ)
    return launch.device == "cpu"


def gpu_at_hand(environ: Mapping[str, str]) -> bool:
    """Whether a process started from here would see a CUDA device (torch is not asked: it would hold on to it)."""
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and visible.strip() in ("", "-1"):
        return False
    return bool(glob.glob("/dev/nvidia[0-9]*"))


def data_type(launch: Launch) -> str:
    """``auto`` is float32 on a CPU and bfloat16 on a GPU."""
    if launch.dtype != "auto":
        return launch.dtype
    return "float32" if on_cpu(launch) else "bfloat16"
