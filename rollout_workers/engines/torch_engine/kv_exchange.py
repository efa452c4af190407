"""Keys and values that leave a slot or come into one other than by computing: handed over, or parked in host memory.

| | from | to |
|---|---|---|
| ``copy_across`` | a slot | a slot of another engine's cache, in memory that both have |
| ``lend``, ``written``, ``give_back`` | another engine, which writes by itself | the session's slot |
| ``copy_out`` | a slot | bytes for another engine |
| ``expect``, ``copy_in``, ``settle`` | bytes of another engine | the session's slot, or the park while no slot is free |
| parking | the slot of an idle session that has to leave it | the park, as far as its budget goes |
| bringing back | the park | the slot that the session gets for its next turn |

A slot that is lent belongs to who writes into it until that one says that it has stopped, or its process ends. What happens
here meanwhile (a release, a commit, another request of the session) takes the session out of the slot, not the slot away.

A piece of KV is laid out layer by layer, keys before values, each ``[G, n, D]``: G key/value heads, n tokens, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from rollout_workers.disaggregation.cache_memory import CachePlace, PeerCache
from rollout_workers.disaggregation.handoff import Reason
from rollout_workers.disaggregation.parking import ParkingLot
from rollout_workers.engines.protocol import GenerateRequest, KvPolicy
from rollout_workers.engines.torch_engine.attention import SlotCache
from rollout_workers.engines.torch_engine.scheduler import Scheduler, worth_recomputing
from rollout_workers.engines.torch_engine.slot_table import SERVED

Tokens = npt.NDArray[np.int32]


@dataclass
class ParkedKv:
    """The KV of one session outside of the slots."""

    tokens: Tokens
    kv_length: int
    """So many of ``tokens`` have their KV here."""
    oldest: int
    """Oldest version that computed any of it."""
    pin: int
    remaining: int
    """Tokens that the session's request could still sample when it was parked."""
    received: int
    tensors: list[Tensor]
    """Keys and values of each layer, ``[G, capacity, D]`` in host memory."""

    def shared(self, prompt: Tokens) -> int:
        """Length of the longest prefix of ``prompt`` that has its KV here."""
        most = min(self.kv_length, len(prompt))
        differs = np.flatnonzero(self.tokens[:most] != prompt[:most])
        return int(differs[0]) if len(differs) else most


class KvExchange:
    """One engine's. ``park_bytes``: the budget of the park; 0 parks nothing."""

    def __init__(self, scheduler: Scheduler, cache: SlotCache, park_bytes: int) -> None:
        self.scheduler = scheduler
        self.table = scheduler.table
        self.cache = cache
        self.park: ParkingLot[ParkedKv] = ParkingLot(park_bytes)
        self._expected: set[str] = set()
        """Sessions whose KV is on its way here, or has arrived and was not asked for yet."""
        scheduler.on_evicted, scheduler.on_seated = self._leave, self._return

    @property
    def layout(self) -> str:
        """What engines must have in common to exchange KV."""
        first = next(iter(self.cache.layers.values()))[0]
        shapes = {(k.shape[1], k.shape[3], v.shape[1], v.shape[3]) for k, v in self.cache.layers.values()}
        return f"{first.dtype} {len(self.cache.layers)} layers of {sorted(shapes)}"

    def tensors(self) -> list[Tensor]:
        """``[S, G, L, D]``: keys and values of each layer in order."""
        return [tensor for _, pair in sorted(self.cache.layers.items()) for tensor in pair]

    @property
    def token_bytes(self) -> int:
        """Bytes of KV of one token."""
        return sum(tensor[0, :, 0].nbytes for tensor in self.tensors())

    @property
    def place(self) -> CachePlace | None:
        """Where other processes can write into this engine's slots; None: nowhere."""
        return None if self.cache.memory is None else self.cache.memory.place(self.tensors())

    # ------------------------------------------------------------------------------------------- the side that prefills

    def computed(self, session: str) -> int:
        """How many tokens of a session have their KV in its slot; 0 when it has none."""
        slot = self.table.slot_of.get(session)
        return 0 if slot is None else int(self.table.kv_length[slot])

    def running(self, session: str, request_id: str) -> bool:
        """Whether this request has its slot."""
        slot = self.table.slot_of.get(session)
        request = None if slot is None else self.table.request[slot]
        return request is not None and request.request_id == request_id

    def oldest(self, session: str) -> int:
        """The oldest version that computed any of the session's KV."""
        return int(self.table.kv_oldest[self.table.slot_of[session]])

    def hold(self, session: str) -> None:
        """Keep an idle session from leaving its slot until `settle`."""
        self.table.idle.pop(self.table.slot_of.get(session, -1), None)

    @torch.inference_mode()
    def copy_out(self, session: str, start: int, end: int, into: Tensor) -> None:
        """Copy the KV of tokens ``start .. end`` into ``into``, uint8 ``[(end - start) * token_bytes]`` in host memory."""
        slot, at = self.table.slot_of[session], 0
        for tensor in self.tensors():
            part = tensor[slot, :, start:end]
            size = part.numel() * part.element_size()
            into[at : at + size].view(part.dtype).view(part.shape).copy_(part)
            at += size

    @torch.inference_mode()
    def copy_across(self, session: str, start: int, end: int, peer: PeerCache, slot: int) -> int:
        """Copy the KV of tokens ``start .. end`` into a slot of another engine. Returns the bytes."""
        own = self.table.slot_of[session]
        for mine, theirs in zip(self.tensors(), peer.tensors, strict=True):
            theirs[slot, :, start:end].copy_(mine[own, :, start:end])
        return (end - start) * self.token_bytes

    # -------------------------------------------------------------------------------------------- the side that decodes

    def expect(self, request: GenerateRequest) -> int | Reason:
        """Make room for the KV of the request's prompt. Returns how many of its tokens have theirs here (the session's own,
        or what its siblings have), or why there is no room."""
        session = request.session_id
        if self.scheduler.busy(session):
            return Reason.BUSY
        if len(request.prompt) + request.max_tokens > self.table.max_len:
            return Reason.NO_ROOM
        slot = self.scheduler.seat(session)
        if slot is not None:
            self.table.expect(slot, request)
            have = self.scheduler.share(slot, request)
        else:
            pin = SERVED if request.pinned_version is None else request.pinned_version
            room = self._expect_parked(session, request.prompt, pin, request.max_tokens)
            if room is None:
                return Reason.NO_ROOM
            have = room
        self._expected.add(session)
        return have

    @torch.inference_mode()
    def copy_in(self, session: str, start: int, end: int, piece: Tensor, oldest: int) -> bool:
        """Take the KV of tokens ``start .. end``. False when what is before them is not here any more."""
        if session not in self._expected:
            return False
        slot = self.table.slot_of.get(session)
        if slot is None:
            return self._copy_in_parked(session, start, end, piece, oldest)
        if self.table.kv_length[slot] != start:
            return False
        self._scatter([tensor[slot] for tensor in self.tensors()], start, end, piece)
        self._arrived(slot, start, end, oldest)
        return True

    def lend(self, session: str) -> int | None:
        """Let another process write into the slot of a session whose KV is expected. None: it is parked."""
        slot = self.table.slot_of.get(session)
        if slot is not None:
            self.table.lend(slot)
        return slot

    def written(self, session: str, slot: int, start: int, end: int, oldest: int) -> bool:
        """The KV of tokens ``start .. end`` is in the slot. False when the session has left it, or lost what was before."""
        if session not in self._expected or self.table.slot_of.get(session) != slot:
            return False
        if self.table.kv_length[slot] != start:
            return False
        self._arrived(slot, start, end, oldest)
        return True

    def give_back(self, slot: int) -> None:
        """Who was lent the slot writes no more."""
        self.table.give_back(slot)

    def settle(self, session: str) -> None:
        """What was expected or held is here (as far as it came): an ordinary idle session from now on, without KV if its
        slot is still lent."""
        self._expected.discard(session)
        slot = self.table.slot_of.get(session)
        if slot is not None:
            self.table.rest(slot)
        self.park.hold(session, held=False)

    # ------------------------------------------------------------------------------------------------------- the engine

    def released(self, session: str) -> None:
        """The session is over."""
        self._expected.discard(session)
        self.park.drop(session)

    def committed(self, version: int, policy: KvPolicy) -> None:
        """A weight update: what was parked goes as idle slots do, and what was expected and lost its KV is refused."""
        if policy is KvPolicy.KEEP:
            return

        def stale(kv: ParkedKv) -> bool:
            if kv.pin != SERVED:
                return False
            recompute = policy is KvPolicy.RECOMPUTE
            return recompute or bool(worth_recomputing(kv.kv_length, kv.remaining, version - kv.oldest))

        self.park.drop_where(stale)
        for session in list(self._expected):
            slot = self.table.slot_of.get(session)
            parked = self.park.look(session)
            pin = self.table.pin[slot] if slot is not None else parked.pin if parked is not None else SERVED
            length = self.table.kv_length[slot] if slot is not None else parked.kv_length if parked is not None else 0
            if pin == SERVED and length == 0:
                self._expected.discard(session)

    def drop_all(self) -> None:
        """Forget all KV that is not in a slot, and what is on its way."""
        self._expected.clear()
        self.park.drop_where(lambda kv: True)

    # -------------------------------------------------------------------------------------------------------- internals

    def _arrived(self, slot: int, start: int, end: int, oldest: int) -> None:
        table = self.table
        table.kv_oldest[slot] = oldest if start == 0 else min(oldest, int(table.kv_oldest[slot]))
        table.kv_length[slot] = end
        table.received[slot] += end - start

    @staticmethod
    def _scatter(tensors: list[Tensor], start: int, end: int, piece: Tensor) -> None:
        """Copy a piece into ``tensors``, each ``[G, L, D]``."""
        at = 0
        for tensor in tensors:
            part = tensor[:, start:end]
            size = part.numel() * part.element_size()
            part.copy_(piece[at : at + size].view(part.dtype).view(part.shape))
            at += size

    @torch.inference_mode()
    def _leave(self, slot: int, coming: str) -> None:
        """Park the session of a slot that is about to be freed for ``coming``, which may have to come out of the park."""
        table = self.table
        self.park.hold(coming, held=True)
        session, length = table.session[slot], int(table.kv_length[slot])
        nbytes = length * self.token_bytes if self.park.budget else 0
        if session is None or not nbytes or not self.park.fits(nbytes, instead_of=session):
            return
        kv = ParkedKv(
            tokens=table.tokens[slot, : table.length[slot]].copy(),
            kv_length=length,
            oldest=int(table.kv_oldest[slot]),
            pin=int(table.pin[slot]),
            remaining=max(1, int(table.limit[slot] - table.length[slot])),
            received=int(table.received[slot]),
            tensors=[tensor[slot, :, :length].to("cpu", copy=True) for tensor in self.tensors()],
        )
        self.park.park(session, kv, nbytes)

    @torch.inference_mode()
    def _return(self, slot: int) -> None:
        """Bring what is parked of a slot's session into the slot."""
        table = self.table
        session = table.session[slot]
        kv = self.park.take(session) if session is not None else None
        if kv is None:
            return
        table.tokens[slot, : len(kv.tokens)] = kv.tokens
        table.length[slot] = len(kv.tokens)
        table.kv_length[slot] = kv.kv_length
        table.kv_oldest[slot] = kv.oldest
        table.pin[slot] = kv.pin
        table.limit[slot] = len(kv.tokens) + kv.remaining
        table.received[slot] = kv.received
        for tensor, parked in zip(self.tensors(), kv.tensors, strict=True):
            tensor[slot, :, : kv.kv_length].copy_(parked[:, : kv.kv_length])

    @torch.inference_mode()
    def _expect_parked(self, session: str, prompt: Tokens, pin: int, max_tokens: int) -> int | None:
        """A place in the park for KV that is on its way while no slot is free."""
        nbytes = len(prompt) * self.token_bytes
        if not self.park.fits(nbytes, instead_of=session):
            return None
        before = self.park.look(session)
        have = before.shared(prompt) if before is not None and before.pin == pin else 0
        tensors = [
            torch.empty(tensor.shape[1], len(prompt), tensor.shape[3], dtype=tensor.dtype) for tensor in self.tensors()
        ]
        if before is not None and have:
            for tensor, old in zip(tensors, before.tensors, strict=True):
                tensor[:, :have].copy_(old[:, :have])
        oldest = before.oldest if before is not None else 0
        kv = ParkedKv(prompt.copy(), have, oldest, pin, max_tokens, 0, tensors)
        return have if self.park.park(session, kv, nbytes, held=True) else None

    def _copy_in_parked(self, session: str, start: int, end: int, piece: Tensor, oldest: int) -> bool:
        kv = self.park.look(session)
        if kv is None or kv.kv_length != start:
            return False
        self._scatter(kv.tensors, start, end, piece)
        kv.oldest = oldest if start == 0 else min(oldest, kv.oldest)
        kv.kv_length = end
        kv.received += end - start
        return True
