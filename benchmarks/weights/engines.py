"""Receivers in processes of their own: what an engine does with an offer, without the engine."""

from __future__ import annotations

import multiprocessing as mp
import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

ANSWER_S = 300.0


@dataclass(frozen=True)
class Fetched:
    """An offer that was fetched, or why not. Times in seconds of the monotonic clock that all processes have."""

    version: int | None
    began_at: float
    ended_at: float
    error: str = ""


class Shadow:
    """An engine's second copy of its weights; the process gets SIGKILL at tensor ``kill_at``, if that is not negative."""

    def __init__(self, pipe: Connection) -> None:
        self.taken, self.kill_at = 0, -1
        self._pipe = pipe
        self._held: dict[str, Any] = {}

    def take(self, name: str, tensor: Any) -> None:
        if self.taken == self.kill_at:
            self._pipe.send(time.monotonic())
            os.kill(os.getpid(), signal.SIGKILL)
        self.taken += 1
        held = self._held.get(name)
        if held is None or held.shape != tensor.shape or held.dtype != tensor.dtype:
            held = self._held[name] = tensor.clone()
        else:
            held.copy_(tensor)


def receiver_process(member: str, pipe: Connection) -> None:
    """Obeys ``pipe``: ``fetch`` an offer into tensors that are there already, ``raw`` broadcast, ``kill_at`` a tensor, ``end``."""
    import torch

    from weight_sync.errors import WeightTransferError
    from weight_sync.transports.select import AnyReceiver

    torch.set_num_threads(1)
    receiver, shadow = AnyReceiver(member), Shadow(pipe)
    pipe.send("ready")
    while True:
        command, argument = pipe.recv()
        if command == "end":
            receiver.close()
            return
        if command == "kill_at":
            shadow.kill_at = argument
            continue
        if command == "raw":
            pipe.send(raw_broadcast(1, *argument))
            continue
        shadow.taken = 0
        began_at = time.monotonic()
        try:
            version = receiver.fetch(argument, shadow.take)
            pipe.send(Fetched(version, began_at, time.monotonic()))
        except WeightTransferError as error:
            pipe.send(Fetched(None, began_at, time.monotonic(), str(error)))


def raw_broadcast(rank: int, store: str, world: int, nbytes: int) -> float:
    """One flat buffer from rank 0 to all by torch.distributed over gloo; seconds, after a barrier."""
    import torch
    import torch.distributed as dist

    if not dist.is_initialized():
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    key = f"flat-{nbytes}"
    flat = _FLATS.setdefault(key, torch.ones(nbytes, dtype=torch.uint8))
    dist.barrier()
    began_at = time.monotonic()
    dist.broadcast(flat, 0)
    dist.barrier()
    return time.monotonic() - began_at


_FLATS: dict[str, Any] = {}


class Receivers:
    """``members`` in processes of their own."""

    def __init__(self, members: Sequence[str]) -> None:
        context = mp.get_context("spawn")
        self.pipes: dict[str, Connection] = {}
        self.processes: dict[str, Any] = {}
        for member in members:
            ours, theirs = context.Pipe()
            process = context.Process(target=receiver_process, args=(member, theirs), daemon=True)
            process.start()
            theirs.close()
            self.pipes[member], self.processes[member] = ours, process
        for member in members:
            self.answer(member)

    def tell(self, command: str, argument: Any, members: Sequence[str] | None = None) -> None:
        for member in members or list(self.pipes):
            self.pipes[member].send((command, argument))

    def answer(self, member: str) -> Any:
        """Raises RuntimeError if it takes too long, EOFError if the process is gone."""
        if not self.pipes[member].poll(ANSWER_S):
            raise RuntimeError(f"receiver {member} did not answer within {ANSWER_S:g} s")
        return self.pipes[member].recv()

    def close(self) -> None:
        for member, process in self.processes.items():
            if process.is_alive():
                self.pipes[member].send(("end", None))
            process.join(5)
            if process.is_alive():
                process.kill()
                process.join(5)
