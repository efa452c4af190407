"""What every inference engine offers, and the messages it exchanges.

Token ids in, token ids out: an engine never sees text except to match stop strings. Each sampled token carries its
log-probability under the distribution it was drawn from (temperature, top-k and top-p applied) and the policy version
of the weights that produced it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from enum import StrEnum
from typing import Protocol

import msgspec
import numpy as np
import numpy.typing as npt


class PauseMode(StrEnum):
    """What a pause does with the requests in flight."""

    KEEP_KV = "keep_kv"
    """Requests and their KV stay; they go on where they were."""
    KEEP_REQUESTS = "keep_requests"
    """Requests stay, their KV is dropped and recomputed on resume."""
    ABORT = "abort"
    """Requests end with finish reason ``abort`` and the tokens they have."""


class FinishReason(StrEnum):
    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"
    HANDED_OVER = "handed_over"
    """A prefill engine has done its part: the request goes on elsewhere. The client sees to that; nobody else meets it."""


class EngineRole(StrEnum):
    """What an engine is meant for. Each can do all: roles say where requests go."""

    MIXED = "mixed"
    PREFILL = "prefill"
    DECODE = "decode"


class KvPolicy(StrEnum):
    """What a weight update does with the KV of requests in flight and of sessions between turns."""

    KEEP = "keep"
    RECOMPUTE = "recompute"
    AUTO = "auto"


class KvTarget(msgspec.Struct, frozen=True, kw_only=True):
    """Where a prefill engine sends the keys and values that it computes for a request."""

    handoff_id: str
    """Names this hand-off to both engines."""
    engine: str
    """Name of the decode engine."""
    address: str
    """Where that engine listens for keys and values (`EngineActor.kv_address`)."""


class GenerateRequest(msgspec.Struct, frozen=True, kw_only=True):
    """One turn to generate. ``prompt`` is the whole context; a session's cached prefix is not computed again."""

    request_id: str
    session_id: str
    """Requests of one session share KV from turn to turn; one request at a time per session."""
    prompt: npt.NDArray[np.int32]
    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    seed: int = 0
    """With the position of a token this alone decides the random number it is drawn with."""
    pinned_version: int | None = None
    """Generate with exactly this version (which must have been pinned); None: whatever is served."""
    generated: int = 0
    """So many tokens at the end of ``prompt`` were sampled for this request before (elsewhere): stop strings may begin there."""
    kv_target: KvTarget | None = None
    """Prefill only: stop after the first token, and send the KV there."""
    kv_source: str = ""
    """A hand-off to this engine whose KV the request waits for; empty: none."""
    prefix_group: str = ""
    """Requests of one prefix group begin alike (the episodes of a group have one prompt): an engine may compute the
    common prefix once. What is really common is found by comparing tokens, never taken from this name."""


class TokenChunk(msgspec.Struct, frozen=True, kw_only=True):
    """Some more tokens of a request. The last chunk of a request carries ``finish_reason``."""

    request_id: str
    tokens: npt.NDArray[np.int32]
    logprobs: npt.NDArray[np.float32]
    versions: npt.NDArray[np.int32]
    finish_reason: FinishReason | None = None
    stop_match: str | None = None
    """The stop string that ended the request, if one did."""
    cached_tokens: int = 0
    """Prompt tokens whose KV was reused (told once, on the first chunk if the engine knows it by then)."""
    error: str | None = None


class WeightUpdate(msgspec.Struct, frozen=True, kw_only=True):
    """A staged version to switch to."""

    version: int
    kv: KvPolicy = KvPolicy.AUTO


class EngineHealth(msgspec.Struct, frozen=True, kw_only=True):
    """A snapshot of an engine's load and counters (counters are cumulative)."""

    version: int
    running: int = 0
    waiting: int = 0
    sessions: int = 0
    kv_used: float = 0.0
    """Share of the KV capacity in use, 0 to 1."""
    paused: bool = False
    generated_tokens: int = 0
    prefill_tokens: int = 0
    cached_tokens: int = 0
    """Prompt tokens whose KV was there already: of the session's own past, or of another session of its prefix group."""
    shared_tokens: int = 0
    """Of those, the ones copied from another session."""
    recomputed_tokens: int = 0
    evicted_sessions: int = 0
    busy_s: float = 0.0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    stall_s: float = 0.0
    """Seconds in which requests waited for a weight swap."""
    queued: int = 0
    """Requests whose prompt is not computed yet, those that wait for a slot included."""
    backlog_tokens: int = 0
    """Prompt tokens of theirs still to compute."""
    decoding: int = 0
    """Sequences that decode."""
    finished: int = 0
    """Requests that ended here."""
    kv_capacity_tokens: float = 0.0
    """Tokens of KV that the engine holds; 0: unknown."""
    kv_running_tokens: float = 0.0
    """KV of requests, and of sessions between two turns."""
    kv_suspended_tokens: float = 0.0
    role: EngineRole = EngineRole.MIXED
    parked_sessions: int = 0
    """Sessions whose KV lies in host memory now."""
    parked_mb: float = 0.0
    parks: int = 0
    """Times that a session's KV was parked."""
    park_hits: int = 0
    """Times that parked KV was brought back."""
    park_evictions: int = 0
    """Parked KV that made room for other sessions'."""
    kv_sent_mb: float = 0.0
    """KV handed to other engines, and received from them."""
    kv_received_mb: float = 0.0
    handoffs: int = 0
    """Hand-offs completed here, on either side."""
    handoff_s: float = 0.0
    """Seconds from the announcement to the end of the hand-offs received (several may overlap)."""
    handoffs_failed: int = 0
    """Hand-offs refused, cancelled or lost; their requests computed their KV elsewhere."""


class EngineLoad(msgspec.Struct, frozen=True, kw_only=True):
    """How busy an engine is with all its clients, as it tells one of them with each answer to a submission."""

    sessions: int
    """Sessions that were opened here and not released."""
    requests: int
    """Requests in flight."""
    own_sessions: int = 0
    """Of those, the client's that is told."""
    own_requests: int = 0
    waiting: int = 0
    """Requests that have no slot yet."""
    kv_used: float = 0.0
    """Share of the KV capacity in use, 0 to 1."""
    lost: int = 0
    """Sessions and requests whose KV had to make room for others, since the engine began."""
    finished: int = 0
    """Requests that ended, since the engine began."""
    kv_drops: int = 0
    """Times that it dropped the KV of all sessions between two turns (for new weights), since it began."""


class InferenceEngine(Protocol):
    """The contract that ``torch``, ``vllm``, ``sglang`` and ``synthetic`` engines keep."""

    def generate(self, request: GenerateRequest) -> AsyncIterator[TokenChunk]: ...

    async def abort(self, request_id: str) -> None: ...

    async def release(self, session_id: str) -> None: ...

    async def pause(self, keep: PauseMode) -> None: ...

    async def resume(self) -> None: ...

    async def apply(self, update: WeightUpdate) -> int:
        """Switch to a staged version at a token boundary; returns the version now served."""
        ...

    async def health(self) -> EngineHealth: ...
