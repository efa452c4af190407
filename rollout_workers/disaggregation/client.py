"""A worker's view of engines of which some prefill and others decode: each request goes to a pair of them."""

from __future__ import annotations

import logging
from collections.abc import Callable

import msgspec

from rollout_workers.continuation import remaining
from rollout_workers.disaggregation.config import HandoffConfig
from rollout_workers.disaggregation.handoff import Reason
from rollout_workers.disaggregation.pair_chooser import PairChooser
from rollout_workers.engine_client import EngineClient
from rollout_workers.engines.protocol import EngineLoad, EngineRole, FinishReason, GenerateRequest, KvTarget, TokenChunk
from rollout_workers.submission import EngineHandle, Pending, holders

logger = logging.getLogger(__name__)

ATTEMPTS = 2
"""Hand-offs of one request that may fail because an engine is lost before its decode engine prefills by itself."""


class PairedEngineClient(EngineClient):
    """As `EngineClient`; a request that a prefill engine hands over goes on at the decode engine from its last token.

    A hand-off that fails costs computing, nothing else: the request goes on with the tokens it has, on an engine that
    computes the KV itself, or through another pair where an engine was lost.
    """

    def __init__(
        self,
        client: str,
        min_tokens: int,
        engine_timeout_s: float = 120.0,
        on_engine_lost: Callable[[str, BaseException], None] | None = None,
        on_load: Callable[[str, EngineLoad], None] | None = None,
    ) -> None:
        super().__init__(client, engine_timeout_s, None, on_engine_lost, on_load)
        self.pairs = PairChooser(min_tokens)
        self._router = self.pairs
        self._addresses: dict[str, str] = {}
        self._serial = 0
        self._handoff_of: dict[str, tuple[str, int | None]] = {}
        """request -> the hand-off that it is in, and the version that it is pinned to there."""
        self._kv_drops: dict[str, int] = {}
        """How often each engine had dropped its KV when it was last heard of."""
        self._attempts: dict[str, int] = {}
        """request -> hand-offs that failed because an engine was lost."""
        self.handed_over = 0
        """Requests that went on at a decode engine with their KV."""
        self.failed: dict[str, int] = {}
        """Hand-offs that failed, by reason."""

    def add_paired_engine(
        self, name: str, handle: EngineHandle, role: EngineRole, address: str, since: int = 0
    ) -> None:
        """An engine joins that has no older version than ``since``; ``address``: where it takes KV."""
        self._addresses[name] = address
        self.pairs.add(name, role)
        self.add_engine(name, handle, since)

    def set_role(self, name: str, role: EngineRole) -> None:
        """An engine has another role from now on; what it has in flight, it finishes."""
        self.pairs.set_role(name, role)

    async def generate(self, request: GenerateRequest) -> TokenChunk:
        tokens = None
        try:
            chunk = await super().generate(request)
            tokens = len(request.prompt) + len(chunk.tokens)
            return chunk
        finally:
            self._handoff_of.pop(request.request_id, None)
            self._attempts.pop(request.request_id, None)
            self.pairs.ended(request.session_id, tokens)

    def _place(self, request: GenerateRequest) -> tuple[str | None, GenerateRequest]:
        session = request.session_id
        home = self.pairs.home(session)
        among = holders(self._engines, self.pairs.members, request)
        if among is not None and not set(among) & set(
            self.pairs.decoders
        ):  # as in `EngineClient`: who came later answers
            among, request = None, msgspec.structs.replace(request, pinned_version=None)
        name = self.pairs.choose(session, len(request.prompt), request.prefix_group, among)
        decode = self.pairs.decode_of(session)
        if home is not None and home != decode and home in self._engines:
            self._engines[home].releases.append(session)
            self.pairs.forget_held(session, home)
        self._handoff_of.pop(request.request_id, None)
        if name is None or decode is None or name == decode:
            return name, request
        self._serial += 1
        handoff_id = f"{self.client}/{self._serial}"
        self._handoff_of[request.request_id] = (handoff_id, request.pinned_version)
        target = KvTarget(handoff_id=handoff_id, engine=decode, address=self._addresses[decode])
        return name, msgspec.structs.replace(request, kv_target=target)

    def _heard(self, name: str, load: EngineLoad) -> None:
        if load.kv_drops != self._kv_drops.get(name, 0):
            self._kv_drops[name] = load.kv_drops
            self.pairs.dropped_kv(name)
        super()._heard(name, load)

    def _accept(self, name: str, chunk: TokenChunk) -> None:
        if chunk.finish_reason is not FinishReason.HANDED_OVER:
            super()._accept(name, chunk)
            return
        pending = self._pending.get(chunk.request_id)
        if pending is None or pending.engine != name or pending.future.done():
            return
        if len(chunk.tokens):
            pending.chunks.append(msgspec.structs.replace(chunk, finish_reason=None, error=None))
        session = pending.request.session_id
        self.pairs.handed_over(session, complete=chunk.error is None)
        if chunk.error is None:
            self._hand_over(pending)
        else:
            self._go_on_without(pending, chunk.error)
        self._check_empty(name)

    def _hand_over(self, pending: Pending) -> None:
        """The KV is at the decode engine: so is the request, from now on."""
        request = pending.request
        decode = self.pairs.decode_of(request.session_id)
        engine = self._engines.get(decode) if decode is not None else None
        handoff_id, pinned = self._handoff_of.pop(request.request_id, ("", request.pinned_version))
        if decode is None or engine is None or engine.draining:
            self._go_on(pending)
            return
        self.handed_over += 1
        pending.engine, pending.leaving = decode, False
        left = remaining(request, pending.chunks)
        engine.requests.append(msgspec.structs.replace(left, kv_source=handoff_id, pinned_version=pinned))
        engine.wake.set()

    def _go_on_without(self, pending: Pending, reason: str) -> None:
        """The KV did not get across."""
        request_id = pending.request.request_id
        self.failed[reason] = self.failed.get(reason, 0) + 1
        self._attempts[request_id] = self._attempts.get(request_id, 0) + 1
        if reason != Reason.LOST or self._attempts[request_id] >= ATTEMPTS:
            self.pairs.stay_alone(pending.request.session_id)
        self._go_on(pending)

    def _release_now(self, session_id: str) -> None:
        for name in self.pairs.release_all(session_id):
            engine = self._engines.get(name)
            if engine is not None:
                engine.releases.append(session_id)
                self._send_releases(name)


def make_client(
    client: str,
    handoff: HandoffConfig | None,
    barrier: Callable[[int], bool] | None,
    on_load: Callable[[str, EngineLoad], None],
    engine_timeout_s: float = 120.0,
) -> EngineClient:
    """The client of a worker; ``handoff``: where prefill and decode are split."""
    if handoff is None:
        return EngineClient(client, engine_timeout_s, barrier, on_load=on_load)
    return PairedEngineClient(client, handoff.min_tokens, engine_timeout_s, on_load=on_load)
