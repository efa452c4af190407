"""The decode engine's part of hand-offs: KV comes in between its steps, and requests wait for theirs to be complete."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import msgspec
import numpy as np
import torch
from torch import Tensor

from rollout_workers.disaggregation.config import HandoffConfig
from rollout_workers.disaggregation.counters import KvCounters
from rollout_workers.disaggregation.handoff import Handoff, HandoffError, HandoffState, Reason
from rollout_workers.disaggregation.link import KvLink, KvListener
from rollout_workers.disaggregation.messages import Announce, Answer, Cancel, Credit, End, Message, Piece, Written
from rollout_workers.engines.protocol import FinishReason, GenerateRequest, TokenChunk

if TYPE_CHECKING:
    from rollout_workers.engines.torch_engine import TorchEngine

logger = logging.getLogger(__name__)


@dataclass
class _Incoming:
    """KV on its way here, or here and not asked for yet."""

    session: str
    handoff: Handoff
    link: KvLink
    began_at: float
    slot: int | None = None
    """The prefill engine writes into this slot; None: pieces come through the ring."""
    request: GenerateRequest | None = None
    """Waits for it."""
    timer: asyncio.TimerHandle | None = field(default=None, repr=False)


class DecodeSide:
    """Between the connections and the engine. Everything happens on the event loop that steps the engine."""

    def __init__(
        self,
        engine: TorchEngine,
        config: HandoffConfig,
        counters: KvCounters,
        host: str,
        deliver: Callable[[list[TokenChunk]], None],
        wake: Callable[[], None],
    ) -> None:
        self._engine = engine
        self._config = config
        self._counters = counters
        self._deliver = deliver
        self._wake = wake
        self._loop = asyncio.get_running_loop()
        self._incoming: dict[str, _Incoming] = {}
        """By hand-off."""
        self._lent: dict[str, tuple[KvLink, int]] = {}
        """The slots that prefill engines write into, by hand-off: until its end or that of the connection."""
        self._memory: dict[KvLink, Tensor] = {}
        place = engine.kv.place if config.direct else None
        self._listener = KvListener(host, engine.kv.layout, place, self.on_message, self.on_lost)

    @property
    def address(self) -> str:
        """Where prefill engines reach this one."""
        return str(self._listener.address)

    @property
    def open(self) -> int:
        """Hand-offs that are coming in or wait for their request."""
        return len(self._incoming)

    def submit(self, request: GenerateRequest) -> None:
        """Take a request with a ``kv_source``: it starts when that hand-off is over, however it ends."""
        incoming = self._incoming.get(request.kv_source)
        request = msgspec.structs.replace(request, kv_source="")
        if incoming is not None and incoming.handoff.open:
            incoming.request = request
            return
        if incoming is not None:
            self._settle(incoming)
        self._engine.submit(request)

    def abort(self, request_id: str) -> bool:
        """End a request that waits for its KV; False if none of that id does."""
        for incoming in self._incoming.values():
            if incoming.request is not None and incoming.request.request_id == request_id:
                incoming.request = None
                self._deliver([_aborted(request_id)])
                return True
        return False

    def release(self, session: str) -> None:
        """A session is over: what waits for its KV ends, and what still comes is refused."""
        for incoming in [each for each in self._incoming.values() if each.session == session]:
            if incoming.request is not None:
                self.abort(incoming.request.request_id)
            self._refuse(incoming, Reason.DROPPED)

    def close(self) -> None:
        self._listener.close()
        for incoming in self._incoming.values():
            if incoming.timer is not None:
                incoming.timer.cancel()

    # ------------------------------------------------------------------------------------------------ the prefill side

    def on_message(self, link: KvLink, message: Message) -> None:
        """An announcement, a piece, or an end."""
        match message:
            case Announce():
                self._announced(link, message)
            case Written():
                self._written(message)
            case Piece():
                self._take(link, message)
                link.send(Credit(message.offset))
            case End():
                self._ended(message)
            case Cancel():
                self._cancelled(message)
            case _:
                logger.warning("%s sent a %s to a decode engine", link.peer, type(message).__name__)

    def on_lost(self, link: KvLink, error: Exception) -> None:
        """A prefill engine is gone. What came of its KV stays good."""
        self._memory.pop(link, None)
        for handoff_id in [each for each, (lender, _) in self._lent.items() if lender is link]:
            self._give_back(handoff_id)
        cut = [each for each in self._incoming.values() if each.link is link and each.handoff.open]
        logger.log(
            logging.WARNING if cut else logging.INFO,
            "connection from %s: %s (%d hand-offs)",
            link.peer,
            error,
            len(cut),
        )
        for incoming in cut:
            self._give_up(incoming, Reason.LOST)

    def _cancelled(self, cancel: Cancel) -> None:
        self._give_back(cancel.handoff_id)
        incoming = self._incoming.get(cancel.handoff_id)
        if incoming is None:
            return
        reason = Reason(cancel.reason) if cancel.reason in set(Reason) else Reason.DAMAGED
        self._give_up(incoming, reason)
        if reason is Reason.RELEASED and not self._engine.scheduler.busy(incoming.session):
            self._engine.release(incoming.session)

    def _announced(self, link: KvLink, announce: Announce) -> None:
        for other in [each for each in self._incoming.values() if each.session == announce.session]:
            self._refuse(other, Reason.ABORTED)
        room = self._room(announce)
        if isinstance(room, Reason):
            self._counters.handoffs_failed += 1
            link.send(Answer(announce.handoff_id, refused=room.value))
            return
        handoff = Handoff(announce.handoff_id, announce.version, len(announce.prompt) // 4)
        handoff.accepted(room)
        slot = self._engine.kv.lend(announce.session) if link.greeting.direct else None
        if slot is not None:
            self._lent[announce.handoff_id] = (link, slot)
        incoming = _Incoming(announce.session, handoff, link, self._loop.time(), slot)
        self._incoming[announce.handoff_id] = incoming
        link.send(Answer(announce.handoff_id, have=room, slot=slot))

    def _room(self, announce: Announce) -> int | Reason:
        """How much of it is here already, or why it is not wanted."""
        request, served = _request_of(announce), self._engine.weights
        if request is None or announce.handoff_id in self._lent:
            return Reason.DAMAGED
        fits = served.version == announce.version if announce.pin is None else announce.pin in served.pinned
        return self._engine.kv.expect(request) if fits else Reason.VERSION

    def _take(self, link: KvLink, piece: Piece) -> None:
        """Copy a piece to its session, if that still wants it."""
        incoming = self._incoming.get(piece.handoff_id)
        if incoming is None or not incoming.handoff.streaming:
            return  # the answer that says so is on its way
        kv = self._engine.kv
        if not self._moved(incoming, piece):
            return
        if link not in self._memory:
            self._memory[link] = torch.frombuffer(link.ring.buffer, dtype=torch.uint8, offset=link.ring.offset)
        data = self._memory[link][piece.offset : piece.offset + piece.nbytes]
        if not kv.copy_in(incoming.session, piece.start, piece.end, data, piece.oldest):
            self._refuse(incoming, Reason.DROPPED)
            return
        self._counters.received_bytes += piece.nbytes

    def _written(self, part: Written) -> None:
        """A prefill engine has written into a slot."""
        incoming = self._incoming.get(part.handoff_id)
        if incoming is None or not incoming.handoff.streaming or not self._moved(incoming, part):
            return
        kv, slot = self._engine.kv, incoming.slot
        if slot is None or not kv.written(incoming.session, slot, part.start, part.end, part.oldest):
            self._refuse(incoming, Reason.DROPPED)
            return
        self._counters.received_bytes += part.nbytes

    def _moved(self, incoming: _Incoming, part: Piece | Written) -> bool:
        """Whether this is what comes next; the hand-off ends if it is not."""
        try:
            incoming.handoff.moved(part.start, part.end, part.version, part.nbytes)
            if part.nbytes != (part.end - part.start) * self._engine.kv.token_bytes:
                raise HandoffError(f"{part.end - part.start} tokens in {part.nbytes} bytes")
        except HandoffError as error:
            logger.error("%s: %s", incoming.link.peer, error)
            self._refuse(incoming, Reason.DAMAGED)
            return False
        return True

    def _give_back(self, handoff_id: str) -> None:
        """The prefill engine writes no more for this hand-off."""
        link_and_slot = self._lent.pop(handoff_id, None)
        if link_and_slot is not None:
            self._engine.kv.give_back(link_and_slot[1])
            self._wake()

    def _ended(self, end: End) -> None:
        self._give_back(end.handoff_id)
        incoming = self._incoming.get(end.handoff_id)
        if incoming is None:
            return
        try:
            incoming.handoff.finish()
        except HandoffError as error:
            logger.error("%s: %s", incoming.link.peer, error)
            self._refuse(incoming, Reason.DAMAGED)
            return
        self._counters.handoffs += 1
        self._counters.handoff_s += self._loop.time() - incoming.began_at
        if incoming.request is not None or not end.wanted:
            self._settle(incoming)
        else:
            incoming.timer = self._loop.call_later(self._config.timeout_s, self._settle, incoming)

    # ---------------------------------------------------------------------------------------------------------- endings

    def _refuse(self, incoming: _Incoming, reason: Reason) -> None:
        """Tell the prefill side that no more is wanted."""
        if incoming.handoff.open:
            incoming.handoff.refused(reason)
            incoming.link.send(Answer(incoming.handoff.handoff_id, refused=reason.value))
        self._give_up(incoming, reason)

    def _give_up(self, incoming: _Incoming, reason: Reason) -> None:
        incoming.handoff.cancel(reason)
        if incoming.handoff.state is not HandoffState.COMPLETE:
            self._counters.handoffs_failed += 1
            logger.info("hand-off %s: %s", incoming.handoff.handoff_id, reason)
        self._settle(incoming)

    def _settle(self, incoming: _Incoming) -> None:
        """What has come is the session's; a request that waits for it starts."""
        if incoming.timer is not None:
            incoming.timer.cancel()
        if self._incoming.pop(incoming.handoff.handoff_id, None) is None:
            return
        self._engine.kv.settle(incoming.session)
        if incoming.request is not None:
            self._engine.submit(incoming.request)
            self._wake()


def _request_of(announce: Announce) -> GenerateRequest | None:
    """The request that an announcement is about, as far as it tells; None if it makes no sense."""
    if len(announce.prompt) < 4 or len(announce.prompt) % 4 or announce.max_tokens < 1:
        return None
    return GenerateRequest(
        request_id=announce.handoff_id,
        session_id=announce.session,
        prompt=np.frombuffer(announce.prompt, "<i4").astype(np.int32),
        max_tokens=announce.max_tokens,
        pinned_version=announce.pin,
        prefix_group=announce.prefix_group,
    )


def _aborted(request_id: str) -> TokenChunk:
    return TokenChunk(
        request_id=request_id,
        tokens=np.zeros(0, np.int32),
        logprobs=np.zeros(0, np.float32),
        versions=np.zeros(0, np.int32),
        finish_reason=FinishReason.ABORT,
    )
