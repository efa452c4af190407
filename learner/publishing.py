"""The learner's side of the road of the weights: who sends, from one process or from every rank.

A version leaves tensor by tensor, as `TrainingBackend.named_tensors` gathers it. Of several ranks each sends the buckets of its
own share, by a sender of its own; the offers of all are one offer to an engine.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from weight_sync.config import WeightsConfig

if TYPE_CHECKING:
    import torch

    from learner.backends.rank_group import RankGroup
    from weight_sync.transports.protocol import WeightSender

    Named = Iterable[tuple[str, torch.Tensor]]


@dataclass(frozen=True)
class SendingPlace:
    """Where a learner's weights go out, and how."""

    weights: WeightsConfig
    kind: str
    """The transport, chosen."""
    engine_nodes: tuple[str, ...]
    """Host names of the engines."""
    disk_directory: str

    def make_sender(self, device: Any) -> WeightSender:
        """For this process. Raises WeightTransferError, ValueError."""
        from weight_sync.transports.select import make_sender

        here = socket.gethostname()
        host = "127.0.0.1" if all(node == here for node in self.engine_nodes) else here
        return make_sender(self.weights, self.kind, host=host, device=device, disk_directory=Path(self.disk_directory))


class Publisher(Protocol):
    """As `WeightSender`, for whatever the learner consists of; raises what that raises."""

    def prepare(self, version: int) -> None:
        """Copy the present weights aside as ``version``."""
        ...

    def offer(self, members: Sequence[str]) -> bytes: ...

    def send(self) -> None: ...

    def cancel(self) -> None: ...

    def taken(self, member: str, version: int) -> None: ...

    def close(self) -> None: ...


class OwnPublisher:
    """Sends from this process what ``named`` gives."""

    def __init__(self, place: SendingPlace, device: Any, named: Callable[[], Named]) -> None:
        self._sender, self._named, self._dtype = place.make_sender(device), named, place.weights.dtype

    def prepare(self, version: int) -> None:
        from weight_sync.wire_dtypes import on_the_wire

        self._sender.prepare(version, on_the_wire(self._named(), self._dtype), [])

    def offer(self, members: Sequence[str]) -> bytes:
        return self._sender.offer(members)

    def send(self) -> None:
        self._sender.send()

    def cancel(self) -> None:
        self._sender.cancel()

    def taken(self, member: str, version: int) -> None:
        self._sender.taken(member, version)

    def close(self) -> None:
        self._sender.close()


class RankSender:
    """One rank's share of every version. `prepare` is for all ranks at once: gathering takes all of them."""

    def __init__(self, place: SendingPlace, device: Any, rank: int, world: int) -> None:
        self.sender = place.make_sender(device)
        self._weights, self._rank, self._world = place.weights, rank, world

    def prepare(self, version: int, named: Named) -> None:
        from weight_sync.tensors import each_once
        from weight_sync.transports.sharded import share_of
        from weight_sync.wire_dtypes import on_the_wire

        share = share_of(each_once(named), self._rank, self._world, self._weights.bucket_bytes)
        try:
            self.sender.prepare(version, on_the_wire(share, self._weights.dtype), [])
        finally:
            # Also after an error here: the others wait for this rank at every tensor that is left.
            for _ in share:
                pass


class RanksPublisher:
    """Every rank sends its share."""

    def __init__(self, place: SendingPlace, group: RankGroup) -> None:
        self._group = group
        group.together("open_sender", place)

    def prepare(self, version: int) -> None:
        self._group.together("prepare_weights", version)

    def offer(self, members: Sequence[str]) -> bytes:
        from weight_sync.transports.sharded import join_offers

        return join_offers(self._group.together("offer_weights", list(members)))

    def send(self) -> None:
        try:
            self._group.together("send_weights")
        except Exception:
            self.cancel()  # what one rank could not send is of no use to anybody
            raise

    def cancel(self) -> None:
        self._group.together("cancel_send")

    def taken(self, member: str, version: int) -> None:
        self._group.together("taken", member, version)

    def close(self) -> None:
        self._group.together("close_sender")
