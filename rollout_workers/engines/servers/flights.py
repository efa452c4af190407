"""One request on its way to a server, and when a failure is worth another attempt. No I/O; time is an argument."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum

import msgspec

from rollout_workers.continuation import joined, remaining
from rollout_workers.engines.protocol import FinishReason, GenerateRequest, KvPolicy, TokenChunk
from rollout_workers.engines.requests import empty_chunk
from rollout_workers.engines.servers.adapter import StreamParser
from rollout_workers.engines.servers.errors import ServerRefused, ServerUnreachable

ATTEMPTS = 3
"""How often a request is made before its failure is final."""
FINAL_FAILURES = 3
"""So many requests failed for good, none served in between: the server is of no use."""
DELAYS_S = (0.2, 1.0)
"""Before the second and the third attempt."""

RECOMPUTE_GAIN = 8
"""Computing a context again takes about the time of decoding a token for every so many of its tokens."""


class Flight:
    """A request, the tokens that have come of it, and the ones not reported yet.

    Tokens are reported at least ``every`` at a time. After a failure the next attempt asks for what is left, under
    another id, because the server may still be busy with the one before.
    """

    def __init__(self, request: GenerateRequest, client: str, every: int, now: float) -> None:
        self.request = request
        self.client: str | None = client
        """Who hears of it; None once that client is gone."""
        self.attempt = 0
        self.heard_at = now
        """When the last byte for it arrived (or it was sent)."""
        self.aborted = False
        self.silent = False
        """Given up because nothing was heard of it."""
        self.tokens = 0
        self.parser: StreamParser | None = None
        """Of the answer that is being read; None while none is."""
        self.server_id = request.request_id
        """What the server knows the current attempt by."""
        self._every = every
        self._taken: list[TokenChunk] = []
        self._held: list[TokenChunk] = []

    @property
    def request_id(self) -> str:
        return self.request.request_id

    def begin(self, now: float) -> GenerateRequest | None:
        """What to ask for in the next attempt; None if nothing is left to ask for."""
        self.attempt += 1
        self.heard_at = now
        left = remaining(self.request, self._taken)
        if left.max_tokens <= 0:
            return None
        if self.attempt == 1:
            return left
        self.server_id = f"{self.request_id}~{self.attempt}"
        return msgspec.structs.replace(left, request_id=self.server_id)

    def take(self, chunks: Iterable[TokenChunk]) -> list[TokenChunk]:
        """New chunks of the server; returns what is due to be reported."""
        due = []
        for chunk in chunks:
            chunk = msgspec.structs.replace(chunk, request_id=self.request_id)
            if chunk.cached_tokens and any(taken.cached_tokens for taken in self._taken):
                chunk = msgspec.structs.replace(chunk, cached_tokens=0)
            self._taken.append(chunk)
            self._held.append(chunk)
            self.tokens += len(chunk.tokens)
            if chunk.finish_reason is not None or sum(len(held.tokens) for held in self._held) >= self._every:
                due += self.flush()
        return due

    def flush(self) -> list[TokenChunk]:
        """All that has not been reported."""
        held, self._held = self._held, []
        return [joined(held)] if held else []

    def end(self, reason: FinishReason, error: str | None = None) -> TokenChunk:
        """The last chunk of a request that the server does not end itself, with all that has not been reported."""
        held, self._held = self._held, []
        return joined([*held, empty_chunk(self.request_id, reason, error)])


class Verdict(Enum):
    """What becomes of a request that failed, and of its server."""

    AGAIN = "again"
    FAIL = "fail"
    """The request has failed; the server may be well."""
    DEAD = "dead"
    """The server is of no use: its requests continue elsewhere."""


@dataclass
class Patience:
    """Counts failures; `served` says that the server can still do its work."""

    final_failures: int = field(default=0, init=False)

    def judge(self, error: Exception, attempt: int) -> Verdict:
        """``attempt``: how often the request has been made."""
        if isinstance(error, ServerRefused):
            return Verdict.FAIL
        if attempt < ATTEMPTS:
            return Verdict.AGAIN
        self.final_failures += 1
        if isinstance(error, ServerUnreachable) or self.final_failures >= FINAL_FAILURES:
            return Verdict.DEAD
        return Verdict.FAIL

    def served(self) -> None:
        self.final_failures = 0


def delay_before(attempt: int) -> float:
    """Seconds to wait before the attempt of this number, from 2."""
    return DELAYS_S[min(attempt - 2, len(DELAYS_S) - 1)]


def choose_kv(policy: KvPolicy, flights: Iterable[Flight]) -> KvPolicy:
    """What a commit does with the KV of all requests in flight (servers cannot choose per request).

    ``auto`` recomputes while that costs less time than the tokens still to be sampled over old KV would take.
    """
    if policy is not KvPolicy.AUTO:
        return policy
    context = left = 0
    for flight in flights:
        context += len(flight.request.prompt) + flight.tokens
        left += flight.request.max_tokens - flight.tokens
    return KvPolicy.RECOMPUTE if context <= RECOMPUTE_GAIN * left else KvPolicy.KEEP
