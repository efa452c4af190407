"""The prefill engine's part of hand-offs: KV leaves as it is computed, and the request goes on elsewhere after one token."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

import msgspec
import torch

from rollout_workers.disaggregation.config import HandoffConfig
from rollout_workers.disaggregation.counters import KvCounters
from rollout_workers.disaggregation.handoff import Handoff, Reason
from rollout_workers.disaggregation.link import KvLink, dial
from rollout_workers.disaggregation.messages import (
    Announce,
    Answer,
    Cancel,
    Credit,
    End,
    KvAddress,
    KvLinkError,
    Message,
    Piece,
    Written,
)
from rollout_workers.disaggregation.outgoing import Line, Outgoing, common_prefix, handed_over
from rollout_workers.disaggregation.ring_space import ALIGNMENT, RingSpace
from rollout_workers.engines.protocol import FinishReason, GenerateRequest, TokenChunk

if TYPE_CHECKING:
    from rollout_workers.engines.torch_engine import TorchEngine

logger = logging.getLogger(__name__)


class PrefillSide:
    """Between the engine and the connections. Everything happens on the event loop that steps the engine.

    ``deliver`` takes chunks that do not come from a step; ``wake`` has the engine stepped.
    """

    def __init__(
        self,
        engine: TorchEngine,
        config: HandoffConfig,
        counters: KvCounters,
        deliver: Callable[[list[TokenChunk]], None],
        wake: Callable[[], None],
    ) -> None:
        self._engine = engine
        self._config = config
        self._counters = counters
        self._deliver = deliver
        self._wake = wake
        self._loop = asyncio.get_running_loop()
        self._lines: dict[str, Line] = {}
        self._outgoing: dict[str, Outgoing] = {}
        """By request."""
        ring = config.ring_mb << 20
        # At least three pieces fit into a ring, so that one fills while another empties.
        self._piece_tokens = max(1, min(config.piece_kb << 10, ring // 4) // engine.kv.token_bytes)
        self._ring_bytes = max(ring, 3 * (engine.kv.token_bytes + ALIGNMENT))
        self._burst_tokens = max(1, ring // engine.kv.token_bytes)

    @property
    def open(self) -> int:
        """Hand-offs under way."""
        return len(self._outgoing)

    def submit(self, request: GenerateRequest) -> None:
        """Take a request with a ``kv_target``."""
        target = request.kv_target
        assert target is not None
        engine = self._engine
        for other in self._of_session(request.session_id):
            self._fail(other, Reason.ABORTED)
        try:
            line = self._line(target.address)
        except KvLinkError as error:
            logger.error("hand-off %s: %s; the request stays here", target.handoff_id, error)
            engine.submit(msgspec.structs.replace(request, kv_target=None))
            return
        before, idle = engine.kv.computed(request.session_id), not engine.has_work
        engine.submit(msgspec.structs.replace(request, max_tokens=1, kv_target=None))
        handoff = self._new_handoff(request)
        out = self._outgoing[request.request_id] = Outgoing(request, target, handoff, line, before)
        if idle:
            self._announce(out)

    def _new_handoff(self, request: GenerateRequest) -> Handoff:
        """Bound to the version that would compute now."""
        assert request.kv_target is not None
        pinned = request.pinned_version
        version = self._engine.weights.version if pinned is None else pinned
        return Handoff(request.kv_target.handoff_id, version, max(1, len(request.prompt)))

    def release(self, session: str) -> None:
        """A session is over: the decode engine shall not keep what has arrived."""
        for out in self._of_session(session):
            self._fail(out, Reason.RELEASED)

    def stepped(self, chunks: list[TokenChunk]) -> list[TokenChunk]:
        """After a step: send what it computed. Returns the chunks that go to the clients now."""
        if not self._outgoing:
            return chunks
        passed = []
        for chunk in chunks:
            out = self._outgoing.get(chunk.request_id)
            passed += [chunk] if out is None else self._ended(out, chunk)
        self.pump()
        return passed

    def pump(self) -> None:
        """Send of every hand-off what is computed and fits."""
        for out in list(self._outgoing.values()):
            self._pump(out)

    def close(self) -> None:
        for line in self._lines.values():
            line.link.close()
        for out in self._outgoing.values():
            if out.timer is not None:
                out.timer.cancel()

    # ------------------------------------------------------------------------------------------------------ the request

    def _ended(self, out: Outgoing, chunk: TokenChunk) -> list[TokenChunk]:
        """The engine's last chunk of the request: what goes to the client of it, now."""
        reason = chunk.finish_reason
        goes_on = reason is FinishReason.LENGTH and out.request.max_tokens > 1
        if out.handoff.reason is not None:
            self._forget(out)
            given_up = goes_on or (reason is FinishReason.ABORT and out.handoff.reason is not Reason.RELEASED)
            return [handed_over(chunk, out.handoff.reason) if given_up else chunk]
        if goes_on:
            self._engine.kv.hold(out.request.session_id)
            out.ending = chunk
            return []
        if reason in (FinishReason.STOP, FinishReason.LENGTH):
            self._engine.kv.hold(out.request.session_id)
            out.over = True
        else:
            out.over = True
            self._fail(out, Reason.ABORTED)
        return [chunk]

    def _fail(self, out: Outgoing, reason: Reason) -> None:
        """Give the hand-off up. Its request, if it goes on, is handed over without its KV."""
        handoff = out.handoff
        handoff.cancel(reason)
        self._counters.handoffs_failed += 1
        logger.info("hand-off %s to %s: %s", handoff.handoff_id, out.target.engine, handoff.reason)
        if out.announced and reason is not Reason.LOST:  # even if it was refused: nothing is written from now on
            out.line.link.send(Cancel(handoff.handoff_id, reason.value))
        if out.ending is not None:
            self._deliver([handed_over(out.ending, handoff.reason)])
        if out.ending is not None or out.over:
            self._forget(out)
            return
        self._engine.abort(out.request.request_id)  # the next step's chunks have what it has so far
        self._pump_followers(out)
        self._wake()

    def _of_session(self, session: str) -> list[Outgoing]:
        return [out for out in self._outgoing.values() if out.request.session_id == session]

    def _forget(self, out: Outgoing) -> None:
        if out.timer is not None:
            out.timer.cancel()
        if self._outgoing.get(out.request.request_id) is out:
            del self._outgoing[out.request.request_id]
        self._engine.kv.settle(out.request.session_id)
        self._pump_followers(out)

    # ----------------------------------------------------------------------------------------------------------- the KV

    def _announce(self, out: Outgoing) -> None:
        request, handoff = out.request, out.handoff
        out.announced = True
        self._wait(out)
        out.line.link.send(
            Announce(
                handoff_id=handoff.handoff_id,
                session=request.session_id,
                prompt=request.prompt.astype("<i4", copy=False).tobytes(),
                version=handoff.version,
                pin=request.pinned_version,
                max_tokens=request.max_tokens,
                prefix_group=request.prefix_group,
            )
        )

    def _pump(self, out: Outgoing) -> None:
        kv, session = self._engine.kv, out.request.session_id
        if not out.announced and out.handoff.open:
            out.handoff = self._new_handoff(out.request)  # an update while it waited changes nothing yet
        handoff = out.handoff
        finished = out.ending is not None or out.over
        if not handoff.open or not (finished or kv.running(session, out.request.request_id)):
            return
        computed = min(kv.computed(session), handoff.total)
        changed = out.request.pinned_version is None and self._engine.weights.version != handoff.version
        if computed < handoff.total and (changed or finished):
            self._fail(out, Reason.COMMIT if changed else Reason.DROPPED)
            return
        if not out.announced and (finished or computed > out.before) and not self._follows(out):
            self._announce(out)
        if not handoff.streaming:
            return
        before = handoff.position
        if out.slot is not None:
            self._write(out, out.slot, computed)
        else:
            while handoff.position < computed and self._send_piece(out, computed):
                out.blocked_since = None
        if handoff.position > before:
            self._pump_followers(out)
        if handoff.position < computed and out.slot is None:
            self._wait(out)
        elif handoff.position == handoff.total and finished:
            self._finish(out)

    def _follows(self, out: Outgoing) -> bool:
        """Whether a sibling is sending the beginning of the same prompt to the same engine, where it can be shared."""
        request = out.request
        return bool(request.prefix_group) and any(
            other.announced
            and other.handoff.open
            and other.line is out.line
            and other.request.prefix_group == request.prefix_group
            and other.request.pinned_version == request.pinned_version
            and other.handoff.position < common_prefix(other.request.prompt, request.prompt)
            for other in self._outgoing.values()
        )

    def _pump_followers(self, leader: Outgoing) -> None:
        """A sibling has sent some of its prompt, or sends no more."""
        if group := leader.request.prefix_group:
            for out in list(self._outgoing.values()):
                if not out.announced and out.request.prefix_group == group:
                    self._pump(out)

    def _send_piece(self, out: Outgoing, computed: int) -> bool:
        """Copy some tokens' KV into the ring and tell. False: there is no room yet."""
        kv, handoff, line = self._engine.kv, out.handoff, out.line
        start = handoff.position
        end = min(computed, start + self._piece_tokens)
        nbytes = (end - start) * kv.token_bytes
        offset = line.space.reserve(nbytes)
        if offset is None:
            return False
        if line.memory is None:
            ring = line.link.ring
            line.memory = torch.frombuffer(ring.buffer, dtype=torch.uint8, offset=ring.offset)
        session = out.request.session_id
        kv.copy_out(session, start, end, line.memory[offset : offset + nbytes])
        line.link.send(Piece(handoff.handoff_id, start, end, offset, nbytes, handoff.version, kv.oldest(session)))
        handoff.moved(start, end, handoff.version, nbytes)
        self._counters.sent_bytes += nbytes
        return True

    def _write(self, out: Outgoing, slot: int, computed: int) -> None:
        """Copy some tokens' KV to its place at the decode engine and tell. What is left then goes a little later, so that
        the event loop has its turns."""
        kv, handoff, link = self._engine.kv, out.handoff, out.line.link
        start, session = handoff.position, out.request.session_id
        end = min(computed, start + self._burst_tokens)
        if link.cache is None or end <= start:
            return
        nbytes = kv.copy_across(session, start, end, link.cache, slot)
        link.send(Written(handoff.handoff_id, start, end, nbytes, handoff.version, kv.oldest(session)))
        handoff.moved(start, end, handoff.version, nbytes)
        self._counters.sent_bytes += nbytes
        if end < computed and not out.goes_on:
            out.goes_on = True
            self._loop.call_soon(self._go_on, out)

    def _go_on(self, out: Outgoing) -> None:
        out.goes_on = False
        if self._outgoing.get(out.request.request_id) is out:
            self._pump(out)

    def _finish(self, out: Outgoing) -> None:
        out.handoff.finish()
        self._counters.handoffs += 1
        out.line.link.send(End(out.handoff.handoff_id, wanted=out.ending is not None))
        if out.ending is not None:
            self._deliver([handed_over(out.ending, None)])
        self._forget(out)

    # ------------------------------------------------------------------------------------------------- the decode side

    def on_message(self, link: KvLink, message: Message) -> None:
        """An answer or a credit."""
        if isinstance(message, Credit):
            self._credit(link, message)
        elif isinstance(message, Answer):
            for out in list(self._outgoing.values()):
                if out.handoff.handoff_id == message.handoff_id and out.handoff.open:
                    self._answered(out, message)
        else:
            logger.warning("%s sent a %s to a prefill engine", link.peer, type(message).__name__)

    def on_lost(self, link: KvLink, error: Exception) -> None:
        """A decode engine is gone, or cannot be reached."""
        logger.warning("connection to the decode engine at %s: %s", link.peer, error)
        for address in [address for address, line in self._lines.items() if line.link is link]:
            del self._lines[address]
        for out in [out for out in self._outgoing.values() if out.line.link is link]:
            self._fail(out, Reason.LOST)

    def _answered(self, out: Outgoing, answer: Answer) -> None:
        out.blocked_since = None
        if answer.refused:
            reason = Reason(answer.refused) if answer.refused in set(Reason) else Reason.DAMAGED
            out.handoff.refused(reason)
            self._fail(out, reason)
            return
        cache = out.line.link.cache
        if answer.slot is not None and not (
            cache is not None and 0 <= answer.slot < cache.slots and out.handoff.total <= cache.max_len
        ):
            logger.error("%s: slot %d is none of its cache", out.line.link.peer, answer.slot)
            self._fail(out, Reason.DAMAGED)
            return
        out.slot = answer.slot
        out.handoff.accepted(min(answer.have, out.handoff.total))
        self._pump(out)

    def _credit(self, link: KvLink, credit: Credit) -> None:
        for line in self._lines.values():
            if line.link is link:
                try:
                    line.space.release(credit.offset)
                except ValueError as error:
                    link.close()
                    self.on_lost(link, error)
                    return
        for out in [out for out in self._outgoing.values() if out.line.link is link]:
            if out.handoff.streaming:
                out.blocked_since = None
                self._pump(out)

    def _line(self, address: str) -> Line:
        """The connection to an address, made on first use."""
        line = self._lines.get(address)
        if line is None:
            link = dial(
                KvAddress.parse(address),
                self._engine.kv.layout,
                self._ring_bytes,
                self._config.transport,
                self._engine.kv.tensors() if self._config.direct else None,
                self.on_message,
                self.on_lost,
            )
            line = self._lines[address] = Line(link, RingSpace(self._ring_bytes))
        return line

    def _wait(self, out: Outgoing) -> None:
        """From now on the decode side is waited for, but not for ever."""
        if out.blocked_since is None:
            out.blocked_since = self._loop.time()
        if out.timer is None:
            out.timer = self._loop.call_later(self._config.timeout_s, self._check, out)

    def _check(self, out: Outgoing) -> None:
        out.timer = None
        if not out.handoff.open or out.blocked_since is None:
            return
        left = out.blocked_since + self._config.timeout_s - self._loop.time()
        if left > 0:
            out.timer = self._loop.call_later(left, self._check, out)
            return
        logger.warning(
            "hand-off %s: %s did not go on within engines.handoff.timeout_s=%g s",
            out.handoff.handoff_id,
            out.target.engine,
            self._config.timeout_s,
        )
        self._fail(out, Reason.LATE)
