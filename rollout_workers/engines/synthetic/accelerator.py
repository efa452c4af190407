"""One modelled accelerator: prefill, decoding shared by the running sequences, KV, weight updates. Event by event.

Decoding is processor sharing: c sequences run at ``peak / (c + c0)`` tokens a second each. All of them advance by the same
number of tokens, so one clock (`_depth`, the tokens a sequence would have that had run since the beginning) replaces
one counter a sequence: a request ends when the clock has moved by its output, and an update is one mark on the clock.
A prompt is computed before decoding goes on, one prompt at a time; with ``prefill_chunk`` both go on in the same steps.
Where prefill and decode are split, one accelerator computes the prompt (`Accelerator.prefill`), and another one decodes what
was ``delivered`` to it.

Time is an argument everywhere and never runs backwards; the caller sleeps until `next_event` and calls `advance`.
"""

from __future__ import annotations

import heapq
import itertools
from collections import deque

from experience.accounting import WORK, Account, Cause, Span
from rollout_workers.engines.synthetic.cost_model import CostModel, SharedStep
from rollout_workers.engines.synthetic.kv_cache import KvCache
from rollout_workers.engines.synthetic.recorder import Recorder, TokenClock
from rollout_workers.engines.synthetic.request import ROUNDING, Completion, Request

__all__ = ["Accelerator", "Completion", "CostModel"]


class Accelerator:
    """A cost model run in time. Request ids are unique among those in flight; one request a session at a time."""

    def __init__(
        self, cost: CostModel, version: int, now: float, lane: str | None = None, recorder: Recorder | None = None
    ) -> None:
        """``lane``: keep the spans of every cause for a timeline under this name (they must be taken, or they pile up).

        ``recorder`` hears of times to tokens and of KV in use.
        """
        self.cost = cost
        self.version = version
        self.kv = KvCache(cost.kv_tokens)
        self.lane = lane or ""
        self.began_at = now
        self._account = None if lane is None else Account(lane, now, Cause.IDLE)
        self._seconds: dict[Cause, float] = {}
        self._now = now
        self._cause = Cause.IDLE
        self._next: float | None = None
        self._step: SharedStep | None = None
        """What goes on while a prompt is computed in the steps of the sequences that run."""
        self._prompt_ends_first = True
        self._tokens: TokenClock | None = None
        self.recorder = recorder
        self._depth = 0.0
        self._order = itertools.count()
        self._in_flight: dict[str, Request] = {}
        self._waiting: deque[Request] = deque()
        self._prefilling: deque[Request] = deque()
        self._decoding: list[tuple[float, int, Request]] = []
        self._admitted = 0
        self._running = 0
        self._updates: list[tuple[float, int]] = []
        self._stalled_until = now
        self._paused = False
        self._finished: list[Completion] = []
        self.generated_tokens = 0
        """Tokens of requests that have ended."""
        self.prefilled_tokens = 0
        self.cached_tokens = 0
        self.received_tokens = 0
        """Prompt tokens whose KV came from other accelerators."""
        self.finished_requests = 0
        """Those that ended with all their tokens."""
        self.updates = 0

    @property
    def recorder(self) -> Recorder | None:
        """Who hears of times to tokens and of KV in use."""
        return None if self._tokens is None else self._tokens.recorder

    @recorder.setter
    def recorder(self, recorder: Recorder | None) -> None:
        self._tokens = None if recorder is None else TokenClock(recorder)

    @property
    def evicted_tokens(self) -> int:
        """KV tokens of idle sessions that made room for others."""
        return self.kv.evicted_tokens

    @property
    def has_requests(self) -> bool:
        return bool(self._in_flight)

    @property
    def running(self) -> int:
        """Sequences that hold a slot."""
        return self._admitted

    @property
    def waiting(self) -> int:
        """Requests without a slot yet."""
        return len(self._in_flight) - self._admitted

    @property
    def decoding(self) -> int:
        """Sequences that decode."""
        return self._running

    @property
    def backlog_tokens(self) -> float:
        """Prompt tokens still to compute of all requests in flight, if nothing cached is evicted meanwhile."""
        begun = sum(one.prefill for one in self._prefilling if not one.gone)
        waiting = [one.prompt - max(one.delivered, self.kv.held(one.session)) for one in self._waiting if not one.gone]
        return begun + sum(max(0, tokens) for tokens in waiting)

    def submit(
        self,
        request_id: str,
        session_id: str,
        prompt_tokens: int,
        output_tokens: int,
        now: float,
        pinned_version: int | None = None,
        *,
        delivered: int = 0,
        asked_at: float | None = None,
        begun: bool = False,
        group: str = "",
    ) -> None:
        """Queue a request for ``output_tokens`` after a context of ``prompt_tokens`` (what is cached is not computed).

        ``delivered``: prompt tokens whose KV comes with the request from another accelerator. ``asked_at``: since when it waits
        for a token, if that is not now; ``begun``: the token it waits for is not its first one. ``group``: whose prompts begin
        like this one.

        Raises ValueError for an id in flight, no tokens to make, or a sequence larger than the whole KV.
        """
        if output_tokens < 1 or prompt_tokens < 0:
            raise ValueError(
                f"request {request_id}: {prompt_tokens} prompt and {output_tokens} output tokens; need >= 1"
            )
        request = Request(request_id, session_id, prompt_tokens, output_tokens, now if asked_at is None else asked_at)
        request.pinned, request.delivered, request.begun = pinned_version, min(delivered, prompt_tokens), begun
        request.group = group if pinned_version is None else ""
        self._enqueue(request, now)

    def prefill(
        self,
        request_id: str,
        session_id: str,
        prompt_tokens: int,
        now: float,
        asked_at: float,
        begun: bool = False,
        group: str = "",
    ) -> None:
        """Queue a prompt that is to be decoded elsewhere: the request ends, without tokens, when its KV is computed.

        Raises ValueError for an id in flight, or a prompt larger than the whole KV.
        """
        request = Request(request_id, session_id, prompt_tokens, 0, asked_at)
        request.begun, request.group = begun, group
        self._enqueue(request, now)

    def _enqueue(self, request: Request, now: float) -> None:
        if request.id in self._in_flight:
            raise ValueError(f"request {request.id} is in flight already")
        if request.prompt + request.output > self.cost.kv_tokens:
            raise ValueError(
                f"request {request.id} needs {request.prompt + request.output} tokens of KV, an accelerator has "
                f"{self.cost.kv_tokens:.0f}"
            )
        self._run_to(now)
        self._in_flight[request.id] = request
        self._waiting.append(request)
        self._replan()

    def abort(self, request_id: str, now: float) -> Completion | None:
        """End a request; returns the tokens it has. None when it is not in flight (it may be done: see `advance`)."""
        self._run_to(now)
        request = self._in_flight.get(request_id)
        if request is None:
            return None
        made = 0 if request.started is None else request.made(self._depth)
        completion = self._end(request, made)
        self._replan()
        return completion

    def release(self, session_id: str, now: float) -> None:
        """The session will not come back: its KV is free (at the end of its request, if one is in flight)."""
        self._run_to(now)
        self.kv.release(session_id)
        self._replan()

    def commit(self, version: int, now: float, keep_kv: bool = True) -> None:
        """Switch to ``version``: tokens made before carry the old one; the accelerator stands still for the update.

        Without ``keep_kv`` idle sessions lose their KV (it is computed again on their next request).
        """
        self._run_to(now)
        self._updates.append((self._depth, self.version))
        self.version = version
        self.updates += 1
        self._stalled_until = max(self._stalled_until, self._now) + self.cost.update_pause_s
        self.kv.forget_prefixes()
        if not keep_kv:
            self.kv.forget_idle()
        self._replan()

    def pause(self, now: float) -> None:
        """Stand still, requests kept, until `resume`."""
        self._run_to(now)
        self._paused = True
        self._replan()

    def resume(self, now: float) -> None:
        self._run_to(now)
        self._paused = False
        self._replan()

    def next_event(self) -> float | None:
        """When `advance` has something to do next; None while nothing will happen by itself."""
        return self._now if self._finished else self._next

    def advance(self, now: float) -> list[Completion]:
        """Live through everything up to ``now``; returns the requests that have ended since the last call."""
        self._run_to(now)
        finished, self._finished = self._finished, []
        return finished

    def partial(self, request_id: str) -> list[tuple[int, int]]:
        """Segments of what a request has so far, at the time of the last call; empty when it is not decoding."""
        request = self._in_flight.get(request_id)
        if request is None or request.started is None:
            return []
        return request.segments(request.made(self._depth), self._updates, self.version)

    def seconds(self, now: float) -> dict[Cause, float]:
        """Seconds since the beginning by cause (prefill, decode, weight stall, idle); they add up to the time passed."""
        self._run_to(now)
        return dict(self._seconds)

    def take_spans(self, now: float | None = None) -> list[Span]:
        """Spans of the accelerator's lane since the last call; with ``now`` the present one is cut there and included."""
        if now is not None:
            self._run_to(now)
        return [] if self._account is None else self._account.take_spans(now)

    # The passage of time

    def _run_to(self, now: float) -> None:
        while self._next is not None and self._next <= now:
            self._pass(max(self._next, self._now))
            self._happen()
            self._replan()
        self._pass(max(now, self._now))

    def _pass(self, until: float) -> None:
        """Time passes in which nothing ends or begins."""
        elapsed = until - self._now
        if elapsed <= 0:
            return
        rate = 0.0
        if self._cause is Cause.PREFILL and self._step is not None:
            rate = self._step.sequence_rate
            self._pass_shared(self._step, elapsed)
        else:
            self._seconds[self._cause] = self._seconds.get(self._cause, 0.0) + elapsed
            if self._cause is Cause.PREFILL:
                self._prefilling[0].prefill -= elapsed * self.cost.prefill_rate
            elif self._cause is Cause.DECODE:
                rate = self.cost.sequence_rate(self._running)
                self._depth += elapsed * rate
        if self._tokens is not None:
            self._tokens.passed(elapsed, rate, self._running)
            self._tokens.recorder.use.add(elapsed, self._cause in WORK, self._running, self.kv)
        self._now = until

    def _pass_shared(self, step: SharedStep, elapsed: float) -> None:
        """A prompt is computed in the steps of the running sequences; the lane shows both parts one after the other."""
        self._prefilling[0].prefill -= elapsed * step.prefill_rate
        self._depth += elapsed * step.sequence_rate
        at, prefill_s = self._now, step.prefill_share * elapsed
        for cause, seconds in ((Cause.PREFILL, prefill_s), (Cause.DECODE, elapsed - prefill_s)):
            self._seconds[cause] = self._seconds.get(cause, 0.0) + seconds
            if self._account is not None:
                self._account.switch(cause, at)
            at += seconds

    def _happen(self) -> None:
        """The event that was planned for now."""
        if self._cause is Cause.PREFILL and self._prompt_ends_first:
            self._prompt_computed(self._prefilling.popleft())
        elif self._cause in (Cause.PREFILL, Cause.DECODE):
            self._depth = max(self._depth, self._decoding[0][0])
            while self._decoding and self._decoding[0][0] <= self._depth + ROUNDING:
                request = heapq.heappop(self._decoding)[2]
                if not request.gone:
                    self.finished_requests += 1
                    self._finished.append(self._end(request, request.output))

    def _replan(self) -> None:
        """Admit what fits, and see what the accelerator does now and until when."""
        self._admit()
        self._drop_gone()
        if self._paused or self._stalled_until > self._now:
            self._cause = Cause.WEIGHT_STALL if self._in_flight else Cause.IDLE
            self._next = None if self._paused else self._stalled_until
        elif self._prefilling:
            self._cause = Cause.PREFILL
            self._plan_prompt(max(0.0, self._prefilling[0].prefill))
        elif self._decoding:
            self._cause = Cause.DECODE
            left = self._decoding[0][0] - self._depth
            self._next = self._now + max(0.0, left) / self.cost.sequence_rate(self._running)
        else:
            self._cause, self._next = Cause.IDLE, None
        if self._account is not None:
            self._account.switch(self._cause, self._now)

    def _plan_prompt(self, left: float) -> None:
        """See when a prompt of which ``left`` tokens are to be computed ends, or a sequence that decodes in the same steps."""
        self._prompt_ends_first, self._step = True, None
        if not self.cost.prefill_chunk or not self._running:
            self._next = self._now + left / self.cost.prefill_rate
            return
        self._step = step = self.cost.shared_step(self._running)
        prompt_s = left / step.prefill_rate
        decode_s = max(0.0, self._decoding[0][0] - self._depth) / step.sequence_rate
        self._prompt_ends_first = prompt_s <= decode_s
        self._next = self._now + min(prompt_s, decode_s)

    def _admit(self) -> None:
        while self._waiting and self._admitted < self.cost.slots:
            request = self._waiting[0]
            if request.gone:
                self._waiting.popleft()
                continue
            evicted = self.kv.evicted_tokens
            cached = self.kv.take(request.session, request.prompt, request.output, request.group)
            if cached is None:
                return
            if self._tokens is not None:
                self._tokens.recorder.use.evicted_tokens += self.kv.evicted_tokens - evicted
            self._waiting.popleft()
            self._admitted += 1
            request.admitted = True
            there = max(cached, request.delivered)
            request.prefill = float(request.prompt - there)
            self.prefilled_tokens += request.prompt - there
            if not request.delivered:
                request.cached = cached
                self.cached_tokens += cached
            else:
                self.received_tokens += there - cached
                if there == request.prompt:
                    self._begin_decoding(request)
                    continue
            self._prefilling.append(request)

    def _prompt_computed(self, request: Request) -> None:
        if request.output:
            self._begin_decoding(request)
            return
        self._note_token(request)
        self._finished.append(self._end(request, 0))

    def _note_token(self, request: Request) -> None:
        """The token that a request has waited for is there."""
        if self._tokens is not None:
            recorder = self._tokens.recorder
            (recorder.inter_token if request.begun else recorder.first_token).add(self._now - request.asked_at)

    def _begin_decoding(self, request: Request) -> None:
        self._note_token(request)
        request.started, request.mark = self._depth, len(self._updates)
        self._running += 1
        heapq.heappush(self._decoding, (self._depth + request.output, next(self._order), request))

    def _drop_gone(self) -> None:
        while self._prefilling and self._prefilling[0].gone:
            self._prefilling.popleft()
        while self._decoding and self._decoding[0][2].gone:
            heapq.heappop(self._decoding)

    # Requests

    def _end(self, request: Request, made: int) -> Completion:
        request.gone = True
        del self._in_flight[request.id]
        decoding = request.started is not None
        if decoding:
            self._running -= 1
        if request.admitted:
            self._admitted -= 1
            computed = request.prompt - max(0, round(request.prefill)) if not decoding else request.prompt
            self.prefilled_tokens -= request.prompt - computed
            self.kv.put_back(request.session, computed + made)
        self.generated_tokens += made
        return Completion(request.id, request.segments(made, self._updates, self.version), request.cached)
