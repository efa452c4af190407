"""What the processes of the transport tests run (spawned: everything here must be importable)."""

from __future__ import annotations

import os
import signal
from multiprocessing.connection import Connection
from typing import Any

import torch

from weight_sync.errors import WeightTransferError
from weight_sync.transports.select import AnyReceiver


def make_weights(version: int, scale: int = 1) -> list[tuple[str, torch.Tensor]]:
    """Weights of several dtypes and sizes, the last one tied to the first."""
    generator = torch.Generator().manual_seed(version)
    embedding = torch.randn(300 * scale, 16, generator=generator)
    named = [("model.embed_tokens.weight", embedding)]
    for layer in range(6):
        named.append((f"model.layers.{layer}.weight", torch.randn(64 * scale, 32, generator=generator)))
        named.append((f"model.layers.{layer}.bias", torch.randn(33, generator=generator).to(torch.bfloat16)))
    named.append(("model.scale", torch.tensor(1.5)))
    named.append(("lm_head.weight", embedding))
    return named


def receiver_process(member: str, connection: Connection) -> None:
    """Fetches every offer that comes; answers with the version and the tensors, or with the error.

    A request ``(offer, kill_after)`` with ``kill_after`` set ends the process by SIGKILL at that tensor.
    """
    torch.set_num_threads(1)
    receiver = AnyReceiver(member)
    connection.send("ready")
    while True:
        request: tuple[bytes, int | None] | None = connection.recv()
        if request is None:
            break
        connection.send(_fetch(receiver, *request))
    receiver.close()


def _fetch(receiver: AnyReceiver, offer: bytes, kill_after: int | None) -> tuple[Any, Any]:
    arrived: dict[str, Any] = {}

    def on_tensor(name: str, tensor: torch.Tensor) -> None:
        if kill_after is not None and len(arrived) >= kill_after:
            os.kill(os.getpid(), signal.SIGKILL)
        arrived[name] = tensor.clone().float().numpy()

    try:
        return receiver.fetch(offer, on_tensor), arrived
    except WeightTransferError as error:
        return None, str(error)
