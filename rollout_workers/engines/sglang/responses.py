"""The streamed answers of ``/generate``.

Each event tells how many tokens the request has by now, and gives either all of them or those that are new (with
``--incremental-streaming-output``); both are understood. ``weight_versions`` says which weights sampled which of them.
"""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from rollout_workers.engines.protocol import FinishReason, GenerateRequest, TokenChunk
from rollout_workers.engines.servers.adapter import ServerAnswerError
from rollout_workers.engines.servers.event_stream import EventStream, shown
from rollout_workers.engines.sglang.requests import filtered, request_name


class _Span(msgspec.Struct):
    version: str
    start: int
    end: int


class _Finish(msgspec.Struct):
    type: str
    matched: Any = None
    message: str | None = None
    status_code: int | None = None


class _Meta(msgspec.Struct):
    id: str
    finish_reason: _Finish | None = None
    completion_tokens: int | None = None
    cached_tokens: int = 0
    output_token_logprobs: list[tuple[float | None, int, Any]] = []
    output_token_sampling_logprobs: list[float | None] | None = None
    """After top-k and top-p."""
    weight_versions: list[_Span] | None = None


class _Error(msgspec.Struct):
    message: str = "no reason given"


class _Event(msgspec.Struct):
    output_ids: list[int] = []
    meta_info: _Meta | None = None
    error: _Error | str | None = None


_EVENT = msgspec.json.Decoder(_Event)
_NO_FLOATS = np.zeros(0, np.float32)
_NO_INTS = np.zeros(0, np.int32)


class SglangStreamParser:
    """Parses the answer to one request.

    Only the last event says which weights sampled which token. Until a commit falls into the stream (`switched`) all
    tokens are of ``served``; those that arrive after one are held back until the server has said whose they are.
    """

    def __init__(self, request: GenerateRequest, served: int) -> None:
        self._request = request
        self._name = request_name(request.request_id)
        self._filtered = filtered(request)
        self._events = EventStream()
        self._seen = 0
        self._served = served
        self._held: tuple[list[int], list[float]] = ([], [])
        self._assumed = 0
        """So many tokens were told to be of ``served`` before the server said so."""
        self._uncertain = False
        """Whether tokens to come may be of another version than ``served``."""
        self._started = self._finished = False

    def feed(self, data: bytes) -> list[TokenChunk]:
        return self._chunks(self._events.feed(data))

    def finish(self) -> list[TokenChunk]:
        chunks = self._chunks(self._events.finish())
        if not self._finished:
            raise ServerAnswerError(f"the answer ended after {self._seen} tokens without a finish reason")
        return chunks

    def switched(self, version: int, tokens: int | None) -> list[TokenChunk]:
        self._uncertain = True
        return []

    def _chunks(self, payloads: list[bytes]) -> list[TokenChunk]:
        chunks = (self._chunk(payload) for payload in payloads)
        return [chunk for chunk in chunks if chunk is not None]

    def _chunk(self, payload: bytes) -> TokenChunk | None:
        if self._finished:
            raise ServerAnswerError(f"more after the finish reason: {shown(payload)}")
        try:
            event = _EVENT.decode(payload)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise ServerAnswerError(f"no answer of /generate ({error}): {shown(payload)}") from None
        if event.error is not None:
            return self._ended(FinishReason.ERROR, event.error if isinstance(event.error, str) else event.error.message)
        meta = event.meta_info
        if meta is None:
            raise ServerAnswerError(f"an event without meta_info: {shown(payload)}")
        if meta.id != self._name:
            raise ServerAnswerError(f"an event of request {meta.id!r} in the answer to {self._name!r}")
        return self._tokens(event.output_ids, meta)

    def _tokens(self, output_ids: list[int], meta: _Meta) -> TokenChunk | None:
        """The tokens that are new in this event, and how the request ended if it did."""
        reason, error = _reason(meta.finish_reason)
        if reason is FinishReason.ABORT and len(meta.output_token_logprobs) < len(output_ids):
            # Aborted while it waited: the server repeats ids without log-probabilities.
            return self._ended(reason, error)
        ids, logprobs = self._new(output_ids, meta)
        self._seen += len(ids)
        sound = [lp for lp in logprobs if lp is not None]
        if len(sound) < len(ids):
            reason = FinishReason.ERROR
            error = f"{len(ids) - len(sound)} log-probabilities are not finite: damaged weights?"
            ids, sound, self._held = [], [], ([], [])
        ids, sound = self._held[0] + ids, self._held[1] + sound
        if reason is None and self._uncertain and meta.weight_versions is None:
            self._held = ids, sound
            return None
        if reason is not None and ids and meta.weight_versions is None:
            if reason not in (FinishReason.ABORT, FinishReason.ERROR):
                raise ServerAnswerError(f"the answer does not say which weights sampled its last {len(ids)} tokens")
            if self._uncertain:
                ids, sound = [], []
        self._held = [], []
        if not ids and reason is None:
            return None
        versions = self._versions_of(meta.weight_versions, len(ids))
        matched = meta.finish_reason.matched if meta.finish_reason is not None else None
        self._finished = reason is not None
        return TokenChunk(
            request_id=self._request.request_id,
            tokens=np.array(ids, np.int32),
            logprobs=np.array(sound, np.float32),
            versions=versions,
            finish_reason=reason,
            stop_match=matched if reason is FinishReason.STOP and isinstance(matched, str) else None,
            cached_tokens=self._cached(meta),
            error=error,
        )

    def _new(self, output_ids: list[int], meta: _Meta) -> tuple[list[int], list[float | None]]:
        """Ids and log-probabilities of the tokens after those seen already."""
        total = len(output_ids) if meta.completion_tokens is None else meta.completion_tokens
        fresh = total - self._seen
        if fresh < 0 or len(output_ids) not in (total, fresh) or len(meta.output_token_logprobs) < len(output_ids):
            raise ServerAnswerError(
                f"{len(output_ids)} ids and {len(meta.output_token_logprobs)} log-probabilities where {total} tokens are "
                f"said to be complete and {self._seen} had arrived"
            )
        begin = len(output_ids) - fresh
        ids, entries = output_ids[begin:], meta.output_token_logprobs[begin : len(output_ids)]
        if [entry[1] for entry in entries] != ids:
            raise ServerAnswerError("the log-probabilities are of other tokens than the ids")
        if not self._filtered:
            return ids, [entry[0] for entry in entries]
        sampled = meta.output_token_sampling_logprobs
        if sampled is None or len(sampled) < len(output_ids):
            raise ServerAnswerError(
                "the answer has no log-probabilities after top-k and top-p: use top_p=1 and top_k=0 with this SGLang"
            )
        return ids, sampled[begin : len(output_ids)]

    def _versions_of(self, spans: list[_Span] | None, count: int) -> npt.NDArray[np.int32]:
        """Of the last ``count`` tokens. Raises ServerAnswerError if those told before were not of ``served``."""
        if spans is None:
            self._assumed += count
            return np.full(count, self._served, np.int32)
        versions = _versions(spans, 0, self._seen)
        if (versions[: self._assumed] != self._served).any():
            raise ServerAnswerError(
                f"tokens were told to be of version {self._served}; in the end the server says {spans}"
            )
        return versions[len(versions) - count :]

    def _cached(self, meta: _Meta) -> int:
        started, self._started = self._started, True
        return 0 if started else meta.cached_tokens

    def _ended(self, reason: FinishReason, error: str | None) -> TokenChunk:
        self._finished = True
        return TokenChunk(
            request_id=self._request.request_id,
            tokens=_NO_INTS,
            logprobs=_NO_FLOATS,
            versions=_NO_INTS,
            finish_reason=reason,
            error=error,
        )


def _reason(finish: _Finish | None) -> tuple[FinishReason | None, str | None]:
    if finish is None:
        return None, None
    if finish.type == "stop":
        return FinishReason.STOP, None
    if finish.type == "length":
        return FinishReason.LENGTH, None
    if finish.type == "abort":
        # An abort that was asked for has no status; one by the server (too long, out of KV) has the reason for it.
        if finish.status_code is None:
            return FinishReason.ABORT, None
        return FinishReason.ERROR, finish.message or f"aborted by the server with status {finish.status_code}"
    raise ServerAnswerError(f"unknown finish reason {finish.type!r}")


def _versions(spans: list[_Span] | None, begin: int, end: int) -> npt.NDArray[np.int32]:
    """The version of each of the tokens ``begin..end`` of a request."""
    if begin == end:
        return _NO_INTS
    versions = np.full(end - begin, -1, np.int32)
    for span in spans or ():
        try:
            versions[max(span.start - begin, 0) : max(span.end - begin, 0)] = int(span.version)
        except (ValueError, OverflowError):
            raise ServerAnswerError(
                f"tokens of weight version {span.version!r}, which is no number that Millrace gave"
            ) from None
    if (versions < 0).any():
        raise ServerAnswerError(f"the answer does not say which weights sampled tokens {begin} to {end - 1}: {spans}")
    return versions
