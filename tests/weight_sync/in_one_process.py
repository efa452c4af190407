"""A sender and receivers in one process, each receiver's fetch in a thread."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from weight_sync.errors import WeightTransferError
from weight_sync.transports.select import AnyReceiver

LIMIT_S = 60.0


def evolving_weights(seed: int = 0) -> Iterator[list[tuple[str, torch.Tensor]]]:
    """Weights of several dtypes of which every version changes a few."""
    generator = torch.Generator().manual_seed(seed)
    named = [
        ("embed.weight", torch.randn(200, 16, generator=generator).to(torch.bfloat16)),
        ("layer.q_proj.weight", torch.randn(140, 130, generator=generator)),
        ("layer.bias", torch.randn(33, generator=generator)),
    ]
    while True:
        yield [(name, tensor.clone()) for name, tensor in named]
        for _, tensor in named:
            rows = torch.randint(0, tensor.shape[0], (2,), generator=generator)
            tensor[rows] += 0.125


class Taker:
    """An engine's receiver, and what it was handed last."""

    def __init__(self, member: str, receiver: Any = None) -> None:
        self.member, self.receiver = member, receiver or AnyReceiver(member)
        self.tensors: dict[str, Any] = {}
        self.error = ""

    def fetch(self, offer: bytes) -> int | None:
        arrived: dict[str, Any] = {}
        try:
            version: int = self.receiver.fetch(offer, lambda name, t: arrived.__setitem__(name, t.clone()))
        except WeightTransferError as error:
            self.error = str(error)
            return None
        self.tensors, self.error = arrived, ""
        return version

    def expect(self, named: list[tuple[str, torch.Tensor]]) -> None:
        assert self.error == ""
        assert sorted(self.tensors) == sorted(name for name, _ in named)
        for name, tensor in named:
            assert self.tensors[name].dtype == tensor.dtype, name
            assert torch.equal(self.tensors[name], tensor), name


def move(sender: Any, takers: Sequence[Taker], offer: bytes | None = None) -> list[int | None]:
    """Offer the prepared version to all, and send; the versions that they hold after it. Errors of `send` come out."""
    encoded = offer if offer is not None else sender.offer([taker.member for taker in takers])
    results: dict[str, int | None] = {}

    def run(taker: Taker) -> None:
        results[taker.member] = taker.fetch(encoded)

    threads = [threading.Thread(target=run, args=(taker,), daemon=True) for taker in takers]
    for thread in threads:
        thread.start()
    try:
        sender.send()
    finally:
        for thread in threads:
            thread.join(LIMIT_S)
    return [results.get(taker.member) for taker in takers]
