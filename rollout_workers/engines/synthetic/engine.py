"""The synthetic engine: several modelled accelerators behind one front, requests in, chunks out. No clock of its own.

A request makes exactly the tokens that it may make (``max_tokens``, or what is left of ``max_len``): lengths are the
workload's. Sessions stick to an accelerator, whose KV they can reuse. A request with a ``kv_target`` ends as handed over when its
prompt is computed and its KV has arrived there, in modelled time; one with a ``kv_source`` computes no prompt.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from experience.accounting import Cause
from rollout_workers.engines.protocol import EngineHealth, FinishReason, GenerateRequest, KvPolicy, TokenChunk
from rollout_workers.engines.synthetic.accelerator import Accelerator, Completion
from rollout_workers.engines.synthetic.cost_model import CostModel
from rollout_workers.engines.synthetic.sending import Sending
from rollout_workers.engines.synthetic.weights import VersionedWeights, Vocabulary
from rollout_workers.router import Router


@dataclass(frozen=True)
class _InFlight:
    request: GenerateRequest
    accelerator: int


class SyntheticEngine:
    """``accelerators`` accelerators of one cost model. Time is an argument that never runs backwards (Unix seconds)."""

    def __init__(
        self,
        cost: CostModel,
        accelerators: int,
        max_len: int,
        vocabulary: Vocabulary,
        weights: VersionedWeights,
        now: float,
        lane: str | None = None,
    ) -> None:
        """``lane``: the accelerators are lanes ``lane/0``, ``lane/1``, ... of a timeline; their spans must be taken."""
        self.cost = cost
        self.weights = weights
        self._max_len = max_len
        self._vocabulary = vocabulary
        self.accelerators = [
            Accelerator(cost, weights.version, now, None if lane is None else f"{lane}/{index}")
            for index in range(accelerators)
        ]
        self._router = Router()
        for index in range(accelerators):
            self._router.add(str(index))
        self._in_flight: dict[str, _InFlight] = {}
        self.sending = Sending(cost, accelerators)
        """KV on its way to engines that decode."""
        self._busy_sessions: set[str] = set()
        self._ended: list[TokenChunk] = []
        self._paused = False

    @property
    def requests(self) -> int:
        """Requests in flight."""
        return len(self._in_flight)

    def submit(self, request: GenerateRequest, now: float) -> None:
        """Start a request; one that cannot be served ends at once with an error."""
        refusal = self._refusal(request)
        if refusal is not None:
            self._ended.append(_empty(request.request_id, FinishReason.ERROR, refusal))
            return
        home = self._router.home(request.session_id)
        chosen = self._router.choose(request.session_id, len(request.prompt), request.prefix_group)
        assert chosen is not None, "an engine has accelerators"
        if home is not None and home != chosen:
            self.accelerators[int(home)].release(request.session_id, now)
        index = int(chosen)
        self._in_flight[request.request_id] = _InFlight(request, index)
        self._busy_sessions.add(request.session_id)
        prompt, accelerator = len(request.prompt), self.accelerators[index]
        if request.kv_target is not None:
            accelerator.prefill(request.request_id, request.session_id, prompt, now, now, group=request.prefix_group)
            return
        accelerator.submit(
            request.request_id,
            request.session_id,
            prompt,
            min(request.max_tokens, self._max_len - prompt),
            now,
            request.pinned_version,
            delivered=prompt if request.kv_source else 0,
            begun=bool(request.kv_source),
            group=request.prefix_group,
        )

    def abort(self, request_id: str, now: float) -> None:
        """End a request with the tokens it has; one that has ended is ignored."""
        known = self._in_flight.get(request_id)
        if known is None:
            return
        completion = self.accelerators[known.accelerator].abort(request_id, now)
        if completion is None and self.sending.stop(request_id):
            completion = Completion(request_id, [], 0)
        if completion is not None:
            self._ended.append(self._finish(completion, FinishReason.ABORT))

    def abort_all(self, now: float) -> None:
        for request_id in list(self._in_flight):
            self.abort(request_id, now)

    def release(self, session_id: str, now: float) -> None:
        """The session will not come back."""
        self.sending.forget(session_id)
        home = self._router.release(session_id)
        if home is not None:
            self.accelerators[int(home)].release(session_id, now)

    def commit(self, version: int, kv: KvPolicy, now: float) -> int:
        """Switch all accelerators to the staged ``version``; returns it."""
        self.weights.commit(version)
        for accelerator in self.accelerators:
            accelerator.commit(version, now, keep_kv=kv is not KvPolicy.RECOMPUTE)
        return version

    def unpin(self, version: int) -> None:
        """Forget a pinned version. Raises ValueError while requests that need it are in flight."""
        users = sum(known.request.pinned_version == version for known in self._in_flight.values())
        if users:
            raise ValueError(f"version {version} is in use by {users} requests in flight")
        self.weights.pinned.discard(version)

    def pause(self, now: float) -> None:
        """Stand still, requests kept."""
        self._paused = True
        for accelerator in self.accelerators:
            accelerator.pause(now)

    def resume(self, now: float) -> None:
        self._paused = False
        for accelerator in self.accelerators:
            accelerator.resume(now)

    def next_event(self) -> float | None:
        """When there will be chunks, or anything else to do, if nothing is submitted; None: never."""
        if self._ended:
            return 0.0
        times = [unit.next_event() for unit in self.accelerators] + [self.sending.next_event()]
        return min((at for at in times if at is not None), default=None)

    def advance(self, now: float) -> list[TokenChunk]:
        """Live up to ``now``; returns the chunks of the requests that have ended since the last call."""
        chunks, self._ended = self._ended, []
        for accelerator in self.accelerators:
            at = accelerator.next_event()
            if at is not None and at <= now:
                for done in accelerator.advance(now):
                    if not self._send(done, now):
                        chunks.append(self._finish(done, FinishReason.LENGTH))
        for request_id in self.sending.arrived(now):
            chunks.append(self._finish(Completion(request_id, [], 0), FinishReason.HANDED_OVER))
        return chunks

    def _send(self, done: Completion, now: float) -> bool:
        """If another engine decodes this request, its KV goes there."""
        known = self._in_flight[done.request_id]
        request, target = known.request, known.request.kv_target
        if target is None:
            return False
        self.sending.computed(
            request.request_id,
            request.session_id,
            target.engine,
            len(request.prompt),
            done.cached_tokens,
            known.accelerator,
            now,
        )
        return True

    def seconds(self, now: float) -> dict[Cause, float]:
        """Accelerator-seconds by cause, over all accelerators."""
        total: dict[Cause, float] = {}
        for accelerator in self.accelerators:
            for cause, seconds in accelerator.seconds(now).items():
                total[cause] = total.get(cause, 0.0) + seconds
        return total

    def health(self, now: float) -> EngineHealth:
        units, seconds = self.accelerators, self.seconds(now)
        prefill, decode = seconds.get(Cause.PREFILL, 0.0), seconds.get(Cause.DECODE, 0.0)
        return EngineHealth(
            version=self.weights.version,
            running=sum(unit.running for unit in units),
            waiting=sum(unit.waiting for unit in units),
            sessions=sum(unit.kv.sessions for unit in units),
            kv_used=sum(unit.kv.used for unit in units) / (self.cost.kv_tokens * len(units)),
            paused=self._paused,
            generated_tokens=sum(unit.generated_tokens for unit in units),
            prefill_tokens=sum(unit.prefilled_tokens for unit in units),
            cached_tokens=sum(unit.cached_tokens for unit in units),
            evicted_sessions=sum(unit.kv.evicted_sessions for unit in units),
            busy_s=prefill + decode,
            prefill_s=prefill,
            decode_s=decode,
            stall_s=seconds.get(Cause.WEIGHT_STALL, 0.0),
            queued=sum(unit.running + unit.waiting - unit.decoding for unit in units),
            backlog_tokens=round(sum(unit.backlog_tokens for unit in units)),
            decoding=sum(unit.decoding for unit in units),
            kv_capacity_tokens=self.cost.kv_tokens * len(units),
            kv_running_tokens=sum(unit.kv.reserved_tokens for unit in units),
            kv_suspended_tokens=sum(unit.kv.idle_tokens for unit in units),
        )

    def _refusal(self, request: GenerateRequest) -> str | None:
        """Why a request cannot be served, or None."""
        if request.request_id in self._in_flight:
            return f"request {request.request_id!r} is in flight already"
        if not len(request.prompt) or request.max_tokens < 1:
            return (
                f"request {request.request_id!r}: {len(request.prompt)} prompt tokens, max_tokens {request.max_tokens}"
            )
        if len(request.prompt) >= self._max_len:
            return f"the prompt has {len(request.prompt)} tokens, engines.max_len is {self._max_len}"
        if request.session_id in self._busy_sessions:
            return f"session {request.session_id!r} has a request in flight; one at a time"
        if request.pinned_version is not None and request.pinned_version not in self.weights.pinned:
            return f"version {request.pinned_version} is not pinned here; pinned are {sorted(self.weights.pinned)}"
        return None

    def _finish(self, done: Completion, reason: FinishReason) -> TokenChunk:
        known = self._in_flight.pop(done.request_id)
        request = known.request
        self._busy_sessions.discard(request.session_id)
        self._router.finished(str(known.accelerator))
        counts = [tokens for _, tokens in done.segments]
        made = sum(counts)
        return TokenChunk(
            request_id=done.request_id,
            tokens=self._vocabulary.sample(request.seed, len(request.prompt), made),
            logprobs=np.full(made, self._vocabulary.logprob, np.float32),
            versions=np.repeat(np.array([version for version, _ in done.segments], np.int32), counts),
            finish_reason=reason,
            cached_tokens=done.cached_tokens,
        )


def _empty(request_id: str, reason: FinishReason, error: str | None = None) -> TokenChunk:
    return TokenChunk(
        request_id=request_id,
        tokens=np.zeros(0, np.int32),
        logprobs=np.zeros(0, np.float32),
        versions=np.zeros(0, np.int32),
        finish_reason=reason,
        error=error,
    )
