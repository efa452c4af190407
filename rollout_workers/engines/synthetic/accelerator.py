"""One modelled accelerator: prefill, decoding shared by the running sequences, KV, weight updates. Event by event.

Decoding is processor sharing: c sequences run at ``peak / (c + c0)`` tokens a second each. All of them advance by the same
number of tokens, so one clock (`_depth`, the tokens a sequence would have that had run since the beginning) replaces
one counter a sequence: a request ends when the clock has moved by its output, and an update is one mark on the clock.
A prompt is computed before decoding goes on, one prompt at a time.

Time is an argument everywhere and never runs backwards; the caller sleeps until `next_event` and calls `advance`.
"""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from typing import NamedTuple

from experience.accounting import Account, Cause, Span
from rollout_workers.engines.synthetic.cost_model import CostModel
from rollout_workers.engines.synthetic.kv_cache import KvCache

__all__ = ["Accelerator", "Completion", "CostModel"]

ROUNDING = 1e-6
"""Tokens by which the clock may miss a whole number."""


class Completion(NamedTuple):
    """A request has ended: all its tokens (or, aborted, those it got) in the order in which they were made."""

    request_id: str
    segments: list[tuple[int, int]]
    """(version, tokens): how many tokens each version of the weights sampled."""
    cached_tokens: int
    """Prompt tokens whose KV was there already."""


class _Request:
    """A request's way through the accelerator: waiting, prefilling, decoding, gone."""

    __slots__ = ("cached", "gone", "id", "mark", "output", "pinned", "prefill", "prompt", "session", "started")

    def __init__(self, request_id: str, session: str, prompt: int, output: int, pinned: int | None) -> None:
        self.id, self.session, self.prompt, self.output, self.pinned = request_id, session, prompt, output, pinned
        self.prefill = 0.0
        """Prompt tokens still to compute, once it is admitted."""
        self.cached = 0
        self.started: float | None = None
        """The clock's depth when decoding began."""
        self.mark = 0
        """How many updates there had been then."""
        self.gone = False


class Accelerator:
    """A cost model run in time. Request ids are unique among those in flight; one request a session at a time."""

    def __init__(self, cost: CostModel, version: int, now: float, lane: str | None = None) -> None:
        """``lane``: keep the spans of every cause for a timeline under this name (they must be taken, or they pile up)."""
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
        self._depth = 0.0
        self._order = itertools.count()
        self._in_flight: dict[str, _Request] = {}
        self._waiting: deque[_Request] = deque()
        self._prefilling: deque[_Request] = deque()
        self._decoding: list[tuple[float, int, _Request]] = []
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
        self.updates = 0

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

    def submit(
        self,
        request_id: str,
        session_id: str,
        prompt_tokens: int,
        output_tokens: int,
        now: float,
        pinned_version: int | None = None,
    ) -> None:
        """Queue a request for ``output_tokens`` after a context of ``prompt_tokens`` (what is cached is not computed).

        Raises ValueError for an id in flight, no tokens to make, or a sequence larger than the whole KV.
        """
        if request_id in self._in_flight:
            raise ValueError(f"request {request_id} is in flight already")
        if output_tokens < 1 or prompt_tokens < 0:
            raise ValueError(
                f"request {request_id}: {prompt_tokens} prompt and {output_tokens} output tokens; need >= 1"
            )
        if prompt_tokens + output_tokens > self.cost.kv_tokens:
            raise ValueError(
                f"request {request_id} needs {prompt_tokens + output_tokens} tokens of KV, an accelerator has "
                f"{self.cost.kv_tokens:.0f}"
            )
        self._run_to(now)
        request = _Request(request_id, session_id, prompt_tokens, output_tokens, pinned_version)
        self._in_flight[request_id] = request
        self._waiting.append(request)
        self._replan()

    def abort(self, request_id: str, now: float) -> Completion | None:
        """End a request; returns the tokens it has. None when it is not in flight (it may be done: see `advance`)."""
        self._run_to(now)
        request = self._in_flight.get(request_id)
        if request is None:
            return None
        made = 0 if request.started is None else self._made(request, self._depth)
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
        return self._segments(request, self._made(request, self._depth))

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
        self._seconds[self._cause] = self._seconds.get(self._cause, 0.0) + elapsed
        if self._cause is Cause.PREFILL:
            self._prefilling[0].prefill -= elapsed * self.cost.prefill_rate
        elif self._cause is Cause.DECODE:
            self._depth += elapsed * self.cost.sequence_rate(self._running)
        self._now = until

    def _happen(self) -> None:
        """The event that was planned for now."""
        if self._cause is Cause.PREFILL:
            self._begin_decoding(self._prefilling.popleft())
        elif self._cause is Cause.DECODE:
            self._depth = max(self._depth, self._decoding[0][0])
            while self._decoding and self._decoding[0][0] <= self._depth + ROUNDING:
                request = heapq.heappop(self._decoding)[2]
                if not request.gone:
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
            self._next = self._now + max(0.0, self._prefilling[0].prefill) / self.cost.prefill_rate
        elif self._decoding:
            self._cause = Cause.DECODE
            left = self._decoding[0][0] - self._depth
            self._next = self._now + max(0.0, left) / self.cost.sequence_rate(self._running)
        else:
            self._cause, self._next = Cause.IDLE, None
        if self._account is not None:
            self._account.switch(self._cause, self._now)

    def _admit(self) -> None:
        while self._waiting and self._admitted < self.cost.slots:
            request = self._waiting[0]
            if request.gone:
                self._waiting.popleft()
                continue
            cached = self.kv.take(request.session, request.prompt, request.output)
            if cached is None:
                return
            self._waiting.popleft()
            self._admitted += 1
            request.cached = cached
            request.prefill = float(request.prompt - cached)
            self.cached_tokens += cached
            self.prefilled_tokens += request.prompt - cached
            self._prefilling.append(request)

    def _begin_decoding(self, request: _Request) -> None:
        request.started, request.mark = self._depth, len(self._updates)
        self._running += 1
        heapq.heappush(self._decoding, (self._depth + request.output, next(self._order), request))

    def _drop_gone(self) -> None:
        while self._prefilling and self._prefilling[0].gone:
            self._prefilling.popleft()
        while self._decoding and self._decoding[0][2].gone:
            heapq.heappop(self._decoding)

    # Requests

    def _end(self, request: _Request, made: int) -> Completion:
        request.gone = True
        del self._in_flight[request.id]
        decoding = request.started is not None
        if decoding:
            self._running -= 1
        if decoding or request in self._prefilling:
            self._admitted -= 1
            computed = request.prompt - max(0, round(request.prefill)) if not decoding else request.prompt
            self.prefilled_tokens -= request.prompt - computed
            self.kv.put_back(request.session, computed + made)
        self.generated_tokens += made
        return Completion(request.id, self._segments(request, made), request.cached)

    def _made(self, request: _Request, depth: float) -> int:
        """Whole tokens of a decoding request at a depth of the clock."""
        assert request.started is not None
        return min(request.output, max(0, int(depth - request.started + ROUNDING)))

    def _segments(self, request: _Request, made: int) -> list[tuple[int, int]]:
        if request.pinned is not None:
            return [(request.pinned, made)] if made else []
        segments, before = [], 0
        if request.started is not None:
            for depth, version in self._updates[request.mark :]:
                upto = min(made, self._made(request, depth))
                if upto > before:
                    segments.append((version, upto - before))
                    before = upto
        if made > before:
            segments.append((self.version, made - before))
        return segments
