"""The process group of the learner's ranks."""

from __future__ import annotations

import logging
import os
import socket
from datetime import timedelta

import torch
import torch.distributed as dist

from learner.errors import LearnerError

logger = logging.getLogger(__name__)


def free_address(host: str) -> str:
    """``host:port`` with a port that is free at this moment."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return f"{host}:{probe.getsockname()[1]}"


def join(address: str, rank: int, world: int, device: torch.device, timeout_s: float) -> None:
    """Join the default process group as ``rank`` of ``world``: NCCL for tensors on GPUs, gloo for those on CPUs.

    Raises LearnerError, naming the group, if the others do not come within ``timeout_s``; collectives time out after as long.
    """
    host, port = address.rsplit(":", 1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": "0"}
    # gloo beside NCCL: weights that are offloaded to host memory have their norms summed there.
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    limit = timedelta(seconds=timeout_s)
    try:
        store = torch._C._distributed_c10d.TCPStore(host, int(port), world, is_master=rank == 0, timeout=limit)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=limit)
    except (RuntimeError, ValueError) as error:
        raise LearnerError(
            f"rank {rank} of {world} did not find the other ranks of the learner at {address} within {timeout_s:g} s: {error}"
        ) from error
    logger.info("rank %d of %d has joined the learner's %s group", rank, world, backend)


def checkpoint_group(timeout_s: float) -> dist.ProcessGroup:
    """A gloo group of all ranks for writing checkpoints; all ranks call this together.

    Its own, because a checkpoint is written beside training: two threads that share a group mix up their messages.
    """
    group: dist.ProcessGroup = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
    return group
