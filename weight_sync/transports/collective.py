"""Weights by broadcast: gloo on CPUs, NCCL on GPUs, the same code.

The learner is rank 0 and hosts the store where the members meet. Each set of members is an *epoch* with a process
group of its own, built directly from the store, so the default group of the process stays free for the training
backend. After any failure the group is thrown away: the next offer names a new epoch. The learner packs a version into
buckets once and broadcasts them, two in flight; a receiver owns two bucket-sized buffers and hands one
on while the other fills.

A process sends at most one broadcast at a time and receives at most one (locks held from first to last bucket), so two
never interleave.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from weight_sync.errors import WeightTransferError
from weight_sync.plan import Manifest, PlanBuilder, TensorSpec, padded
from weight_sync.tensors import NamedTensors, bucket_tensors, pack, verify_bucket
from weight_sync.transports.protocol import CollectiveOffer, OnTensor, decode_offer, encode_offer

logger = logging.getLogger(__name__)

IN_FLIGHT = 2
"""Broadcasts under way at once: one on the wire, one being filled or handed on."""

RECEIVED = b"received"
BEGIN = "begin"

POLL_S = 0.003
"""How often the sender looks for the key of a member, beside whether one is known to be gone."""

_sending = threading.Lock()
_receiving = threading.Lock()


@contextmanager
def _one_at_a_time(lock: threading.Lock, what: str, timeout_s: float) -> Iterator[None]:
    if not lock.acquire(timeout=timeout_s):
        raise WeightTransferError(f"{what}: waited {timeout_s:g} s for another broadcast of this process to end")
    try:
        yield
    finally:
        lock.release()


def _gloo_options(offer: CollectiveOffer, timeout: timedelta) -> Any:
    """Options that make gloo listen at the address from which this process reaches the learner."""
    options: Any = torch._C._distributed_c10d.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    options._timeout = timeout
    if os.environ.get("GLOO_SOCKET_IFNAME"):
        options._devices = [dist.ProcessGroupGloo.create_default_device()]
        return options
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((offer.host, offer.port))
        options._devices = [dist.ProcessGroupGloo.create_device(hostname=probe.getsockname()[0])]
    return options


class _Group:
    """The process group of one epoch."""

    def __init__(self, store: Any, offer: CollectiveOffer, rank: int) -> None:
        self.epoch, self.rank, self.size = offer.epoch, rank, len(offer.ranks) + 1
        timeout = timedelta(seconds=offer.timeout_s)
        prefixed = torch._C._distributed_c10d.PrefixStore(f"epoch-{offer.epoch}", store)
        self._backend: Any
        if offer.backend == "nccl":
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = timeout
            self._backend = dist.ProcessGroupNCCL(prefixed, rank, self.size, options)
        else:
            self._backend = dist.ProcessGroupGloo(prefixed, rank, self.size, _gloo_options(offer, timeout))

    def broadcast(self, data: torch.Tensor) -> Any:
        """Starts the broadcast of a contiguous tensor from rank 0; returns the work to wait for."""
        options = dist.BroadcastOptions()
        options.rootRank = 0
        options.rootTensor = 0
        options.asyncOp = True
        return self._backend.broadcast([data], options)

    def discard(self) -> None:
        """Closes the connections, also when operations are outstanding: peers notice at once."""
        try:
            self._backend.abort()
        except RuntimeError as error:
            logger.debug("process group of epoch %d: %s", self.epoch, error)


class _Deadline:
    def __init__(self, timeout_s: float, what: str) -> None:
        self._end, self._timeout_s, self._what = time.monotonic() + timeout_s, timeout_s, what

    def left(self) -> timedelta:
        left = self._end - time.monotonic()
        if left <= 0:
            raise WeightTransferError(f"{self._what}: not done within {self._timeout_s:g} s")
        return timedelta(seconds=left)

    def wait(self, work: Any) -> None:
        work.wait(self.left())


class CollectiveSender:
    """Broadcasts each version to the members of the offer. ``host``: the address where engines reach this process."""

    kind = "collective"

    def __init__(
        self,
        *,
        host: str = "127.0.0.1",
        device: str | torch.device = "cpu",
        bucket_bytes: int = 64 << 20,
        timeout_s: float = 60.0,
        checksums: bool = False,
    ) -> None:
        self._device = torch.device(device)
        self._host, self._timeout_s, self._bucket_bytes = host, timeout_s, bucket_bytes
        self._checksums = checksums and self._device.type == "cpu"
        self._store = torch._C._distributed_c10d.TCPStore(
            host, 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=timeout_s), multi_tenant=False
        )
        self._epoch = 0
        self._group: _Group | None = None
        self._members: tuple[str, ...] | None = None
        self._manifest: Manifest | None = None
        self._buckets: list[torch.Tensor] = []
        self._offer: CollectiveOffer | None = None
        self._in_use = threading.Lock()
        self._cancelled = threading.Event()
        self._serial = 0

    def prepare(self, version: int, named: NamedTensors, members: Sequence[str]) -> bytes:
        if not self._in_use.acquire(timeout=self._timeout_s):
            raise WeightTransferError(
                f"version {version} waited {self._timeout_s:g} s for the broadcast before it to end"
            )
        try:
            self._manifest = None
            self._manifest = pack(version, named, self._bucket_bytes, self._place, checksums=self._checksums)
        finally:
            self._in_use.release()
        return self.offer(members)

    def _place(self, plan: PlanBuilder, spec: TensorSpec) -> torch.Tensor:
        """Each bucket has memory of its own, which the next version uses again."""
        index, start = plan.bucket
        begin = spec.offset - start
        if index == len(self._buckets):
            self._buckets.append(torch.empty(0, dtype=torch.uint8, device=self._device))
        needed = begin + padded(spec.nbytes)
        if self._buckets[index].numel() < needed:
            grown = torch.empty(max(needed, self._bucket_bytes), dtype=torch.uint8, device=self._device)
            grown[:begin].copy_(self._buckets[index][:begin])
            self._buckets[index] = grown
        return self._buckets[index][begin : begin + spec.nbytes]

    def offer(self, members: Sequence[str]) -> bytes:
        if not self._in_use.acquire(timeout=self._timeout_s):
            raise WeightTransferError(f"offer to {list(members)}: the broadcast before it did not end")
        try:
            return encode_offer(self._make_offer(members))
        finally:
            self._in_use.release()

    def _make_offer(self, members: Sequence[str]) -> CollectiveOffer:
        if self._manifest is None:
            raise WeightTransferError("no version has been prepared yet: call prepare first")
        # An offer to nobody needs no group, and must not cost the members of the last one theirs.
        if members and (tuple(members) != self._members or self._group is None):
            self._discard_group()
            self._epoch += 1
            self._members = tuple(members)
        self._serial += 1
        self._cancelled.clear()
        self._offer = CollectiveOffer(
            manifest=self._manifest,
            host=self._host,
            port=self._store.port,
            epoch=self._epoch,
            serial=self._serial,
            backend="nccl" if self._device.type == "cuda" else "gloo",
            ranks={name: rank for rank, name in enumerate(members, start=1)},
            timeout_s=self._timeout_s,
        )
        return self._offer

    def send(self) -> None:
        offer = self._offer
        if offer is None:
            raise WeightTransferError("nothing is on offer: call prepare or offer before each send")
        what = f"broadcast of version {offer.manifest.version} to {', '.join(offer.ranks) or 'nobody'}"
        with self._in_use, _one_at_a_time(_sending, what, offer.timeout_s):
            self._offer = None
            if not offer.ranks:
                return
            try:
                self._broadcast(offer, _Deadline(offer.timeout_s, what))
            except RuntimeError as error:
                self._discard_group()
                raise WeightTransferError(f"{what} failed: {error}") from error

    def _broadcast(self, offer: CollectiveOffer, deadline: _Deadline) -> None:
        if self._group is None:
            self._gather(offer, deadline)
            self._group = _Group(self._store, offer, rank=0)
        under_way: deque[Any] = deque()
        for bucket, data in zip(offer.manifest.buckets, self._buckets, strict=False):
            if len(under_way) == IN_FLIGHT:
                deadline.wait(under_way.popleft())
            under_way.append(self._group.broadcast(data[: bucket.nbytes]))
        while under_way:
            deadline.wait(under_way.popleft())
        # Small buckets fit into socket buffers: only an answer from each member proves that it has them.
        for member, rank in offer.ranks.items():
            self._collect_receipt(member, _receipt(offer, rank), deadline)

    def _gather(self, offer: CollectiveOffer, deadline: _Deadline) -> None:
        """Wait until every member is there; only then may anybody begin to connect, which cannot be given up half way."""
        begun = False
        try:
            for rank in offer.ranks.values():
                self._wait_for(_here(offer, rank), deadline)
            begun = True
        finally:
            self._store.set(_begin(offer), BEGIN if begun else "a member did not come")

    def _wait_for(self, key: str, deadline: _Deadline) -> None:
        while not self._store.check([key]):
            deadline.left()
            if self._cancelled.wait(POLL_S):
                raise WeightTransferError("a member is gone")

    def _collect_receipt(self, member: str, key: str, deadline: _Deadline) -> None:
        self._wait_for(key, deadline)
        answer = self._store.get(key)
        self._store.delete_key(key)
        if answer != RECEIVED:
            raise WeightTransferError(f"engine {member} could not take it: {answer.decode(errors='replace')}")

    def _discard_group(self) -> None:
        group, self._group = self._group, None
        if group is not None:
            group.discard()

    def cancel(self) -> None:
        self._cancelled.set()
        group = self._group
        if group is not None and self._in_use.locked():
            group.discard()

    def taken(self, member: str, version: int) -> None:
        """It makes no difference."""

    def close(self) -> None:
        self._discard_group()
        self._manifest = self._offer = None


def _receipt(offer: CollectiveOffer, rank: int) -> str:
    return f"receipt-{offer.serial}-{rank}"


def _here(offer: CollectiveOffer, rank: int) -> str:
    return f"here-{offer.epoch}-{rank}"


def _begin(offer: CollectiveOffer) -> str:
    return f"begin-{offer.epoch}"


class CollectiveReceiver:
    """Takes part in the broadcasts under the name ``member``; tensors arrive on ``device``."""

    def __init__(self, member: str, *, device: str | torch.device = "cpu") -> None:
        self._member, self._device = member, torch.device(device)
        self._group: _Group | None = None
        self._store: Any = None
        self._address: tuple[str, int] | None = None
        self._buffers: list[torch.Tensor] = []

    def fetch(self, offer: bytes, on_tensor: OnTensor) -> int:
        decoded = decode_offer(offer)
        if not isinstance(decoded, CollectiveOffer):
            raise WeightTransferError("a collective receiver got the offer of another transport")
        if self._member not in decoded.ranks:
            raise WeightTransferError(
                f"engine {self._member} is not a member of this broadcast: {sorted(decoded.ranks)}"
            )
        what = f"engine {self._member} receiving version {decoded.manifest.version}"
        with _one_at_a_time(_receiving, what, decoded.timeout_s):
            complete = False
            try:
                self._receive(decoded, on_tensor, _Deadline(decoded.timeout_s, what))
                complete = True
            except RuntimeError as error:
                raise WeightTransferError(f"{what} failed: {error}") from error
            finally:
                if not complete:
                    self._refuse(decoded)
        return decoded.manifest.version

    def _refuse(self, offer: CollectiveOffer) -> None:
        """Tell the sender at once, and leave the group."""
        try:
            if self._store is not None:
                self._store.set(_receipt(offer, offer.ranks[self._member]), "see the log of this engine")
        except RuntimeError as error:
            logger.warning("engine %s cannot reach the learner's store: %s", self._member, error)
        self.close()

    def _receive(self, offer: CollectiveOffer, on_tensor: OnTensor, deadline: _Deadline) -> None:
        group = self._join(offer, deadline)
        manifest = offer.manifest
        buffers = self._buffers_for(manifest)
        under_way: deque[tuple[int, torch.Tensor, Any]] = deque()
        for index, bucket in enumerate(manifest.buckets):
            if len(under_way) == IN_FLIGHT:
                self._hand_on(manifest, under_way.popleft(), on_tensor, deadline)
            data = buffers[index % IN_FLIGHT][: bucket.nbytes]
            under_way.append((index, data, group.broadcast(data)))
        while under_way:
            self._hand_on(manifest, under_way.popleft(), on_tensor, deadline)
        self._store.set(_receipt(offer, offer.ranks[self._member]), RECEIVED.decode())

    def _hand_on(
        self, manifest: Manifest, arriving: tuple[int, torch.Tensor, Any], on_tensor: OnTensor, deadline: _Deadline
    ) -> None:
        index, data, work = arriving
        deadline.wait(work)
        verify_bucket(manifest, index, data)
        for name, tensor in bucket_tensors(manifest, manifest.buckets[index], data):
            on_tensor(name, tensor)
        if data.device.type == "cuda":
            torch.cuda.current_stream(data.device).synchronize()

    def _join(self, offer: CollectiveOffer, deadline: _Deadline) -> _Group:
        address = (offer.host, offer.port)
        if self._group is not None and (self._address, self._group.epoch) == (address, offer.epoch):
            return self._group
        self.close()
        timeout = timedelta(seconds=offer.timeout_s)
        self._store = torch._C._distributed_c10d.TCPStore(offer.host, offer.port, is_master=False, timeout=timeout)
        self._address = address
        rank = offer.ranks[self._member]
        self._store.set(_here(offer, rank), self._member)
        self._store.wait([_begin(offer)], deadline.left())
        answer = self._store.get(_begin(offer)).decode()
        if answer != BEGIN:
            raise WeightTransferError(f"the broadcast of version {offer.manifest.version} did not begin: {answer}")
        self._group = _Group(self._store, offer, rank)
        return self._group

    def _buffers_for(self, manifest: Manifest) -> list[torch.Tensor]:
        if not self._buffers or self._buffers[0].numel() < manifest.largest_bucket:
            size = manifest.largest_bucket
            self._buffers = [torch.empty(size, dtype=torch.uint8, device=self._device) for _ in range(IN_FLIGHT)]
        return self._buffers

    def close(self) -> None:
        group, self._group, self._store, self._address = self._group, None, None, None
        if group is not None:
            group.discard()
