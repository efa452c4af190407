from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from typing import Any

import pytest
import torch
from transport_processes import receiver_process

WAIT_S = 60.0


class Engine:
    """A receiver in a process of its own."""

    def __init__(self, member: str) -> None:
        context = multiprocessing.get_context("spawn")
        self.member = member
        self.connection: Connection
        self.connection, theirs = context.Pipe()
        self.process: SpawnProcess = context.Process(target=receiver_process, args=(member, theirs), daemon=True)
        self.process.start()
        theirs.close()

    def begin(self, offer: bytes, kill_after: int | None = None) -> None:
        self.connection.send((offer, kill_after))

    def result(self) -> Any:
        if not self.connection.poll(WAIT_S):
            raise TimeoutError(f"engine {self.member} did not answer within {WAIT_S} s")
        return self.connection.recv()

    def stop(self) -> None:
        self.process.kill()
        self.process.join(WAIT_S)


@pytest.fixture
def start_engines() -> Iterator[Any]:
    torch.set_num_threads(1)
    started: list[Engine] = []

    def start(*members: str) -> list[Engine]:
        engines = [Engine(member) for member in members]
        started.extend(engines)
        for engine in engines:
            assert engine.result() == "ready"
        return engines

    yield start
    for engine in started:
        engine.stop()
