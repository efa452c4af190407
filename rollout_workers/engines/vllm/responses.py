"""The streamed answers of ``/inference/v1/generate``.

An event holds the tokens since the one before, with their log-probabilities; the last one says which weights sampled
which of all tokens (``weight_versions``). Until then the parser knows it from the commits that fell into the stream
(`VllmStreamParser.switched`), and checks in the end that the server says the same.
"""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from rollout_workers.engines.protocol import FinishReason, GenerateRequest, TokenChunk
from rollout_workers.engines.servers.adapter import ServerAnswerError
from rollout_workers.engines.servers.event_stream import EventStream, shown
from rollout_workers.engines.vllm.stops import Stops

LOWEST_LOGPROB = -9000.0
"""vLLM writes -9999 for what is no number or minus infinity; no token is sampled with such a probability."""


class _Span(msgspec.Struct):
    version: str
    start: int
    end: int


class _Logprob(msgspec.Struct):
    token_id: int
    logprob: float | None = None


class _Logprobs(msgspec.Struct):
    content: list[_Logprob] | None = None


class _Choice(msgspec.Struct):
    token_ids: list[int] | None = None
    finish_reason: str | None = None
    logprobs: _Logprobs | None = None
    weight_versions: list[_Span] | None = None


class _PromptDetails(msgspec.Struct):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens_details: _PromptDetails | None = None


class _Error(msgspec.Struct):
    message: str = "no reason given"
    code: int = 500


class _Event(msgspec.Struct):
    choices: list[_Choice] | None = None
    usage: _Usage | None = None
    error: _Error | None = None


_EVENT = msgspec.json.Decoder(_Event)


class VllmStreamParser:
    """Parses the answer to one request; the last chunk comes when the server has said all.

    After a chunk with a finish reason whatever follows is passed over: it may come early, for a stop string that began
    in tokens sampled elsewhere, which the server cannot see. The stream is then to be closed.
    """

    def __init__(self, request: GenerateRequest, served: int, stops: Stops | None = None) -> None:
        self._request = request
        self._stops = stops or Stops(None, request.stop)
        self._events = EventStream()
        self._tokens: list[int] = []
        self._logprobs: list[float] = []
        self._released = 0
        self._since: list[tuple[int, int]] = [(0, served)]
        """(token, version): sampled by this version from that token on."""
        self._unknown_from: int | None = None
        self._spans: list[_Span] | None = None
        self._reason: FinishReason | None = None
        self._cached = 0
        self._finished = False

    def feed(self, data: bytes) -> list[TokenChunk]:
        if self._finished:
            return []
        return self._take(self._events.feed(data))

    def finish(self) -> list[TokenChunk]:
        chunks = [] if self._finished else self._take(self._events.finish())
        if not self._finished and self._reason is not None:
            chunks += self._end(self._reason)
        if not self._finished:
            raise ServerAnswerError(f"the answer ended after {len(self._tokens)} tokens without a finish reason")
        return chunks

    def switched(self, version: int, tokens: int | None) -> list[TokenChunk]:
        if self._finished or self._spans is not None:
            return []
        received = len(self._tokens)
        if tokens is None:
            # What has arrived was sampled before; what is still to come may have been sampled on either side.
            self._unknown_from = received if self._unknown_from is None else self._unknown_from
            return []
        if tokens < received:
            raise ServerAnswerError(f"{received} tokens arrived of which the server says that it sampled {tokens}")
        self._since.append((tokens, version))
        return []

    def _take(self, payloads: list[bytes]) -> list[TokenChunk]:
        chunks: list[TokenChunk] = []
        for payload in payloads:
            if not self._finished:
                chunks += self._event(payload)
        if self._events.done and not self._finished:
            # An abort without new tokens has no event of its own.
            chunks += self._end(self._reason or FinishReason.ABORT)
        return chunks

    def _event(self, payload: bytes) -> list[TokenChunk]:
        try:
            event = _EVENT.decode(payload)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise ServerAnswerError(f"no answer of /inference/v1/generate ({error}): {shown(payload)}") from None
        if event.error is not None:
            if event.error.code >= 500:
                raise ServerAnswerError(f"the server failed in the middle of its answer: {event.error.message}")
            return self._end(FinishReason.ERROR, event.error.message)
        if event.choices is None:
            raise ServerAnswerError(f"an event without choices: {shown(payload)}")
        if event.usage is not None and event.usage.prompt_tokens_details is not None:
            self._cached = event.usage.prompt_tokens_details.cached_tokens or 0
        if len(event.choices) > 1:
            raise ServerAnswerError(f"an answer with {len(event.choices)} choices: {shown(payload)}")
        return [chunk for choice in event.choices for chunk in self._choice(choice)]

    def _choice(self, choice: _Choice) -> list[TokenChunk]:
        if self._reason is not None:
            raise ServerAnswerError("tokens after the finish reason")
        known = len(self._tokens)
        if not self._append(choice):
            return self._end(FinishReason.ERROR, "log-probabilities are not finite: damaged weights?")
        if choice.weight_versions is not None:
            self._spans = choice.weight_versions
        self._reason = _reason(choice.finish_reason)
        kept = self._stops.straddling(self._tokens, known)
        if kept is not None and self._certain() >= kept:
            del self._tokens[kept:], self._logprobs[kept:]
            return self._end(FinishReason.STOP)
        return [] if self._reason is not None else self._release()

    def _append(self, choice: _Choice) -> bool:
        """Take an event's tokens; False if one has a log-probability that is none."""
        ids = choice.token_ids or []
        entries = (choice.logprobs.content if choice.logprobs is not None else None) or []
        if [entry.token_id for entry in entries] != ids:
            raise ServerAnswerError(
                f"{len(entries)} log-probabilities that are not of the {len(ids)} tokens beside them"
            )
        if len(self._tokens) + len(ids) > self._request.max_tokens:
            raise ServerAnswerError(f"more than the {self._request.max_tokens} tokens that were asked for")
        logprobs = [entry.logprob for entry in entries if entry.logprob is not None and entry.logprob > LOWEST_LOGPROB]
        if len(logprobs) < len(ids):
            return False
        self._tokens += ids
        self._logprobs += logprobs
        return True

    def _certain(self) -> int:
        """Of so many tokens it is known which version sampled them."""
        if self._spans is not None:
            return max((span.end for span in self._spans), default=0)
        return len(self._tokens) if self._unknown_from is None else self._unknown_from

    def _release(self) -> list[TokenChunk]:
        end = min(self._certain(), len(self._tokens))
        return [self._chunk(end)] if end > self._released else []

    def _end(self, reason: FinishReason, error: str | None = None) -> list[TokenChunk]:
        """The last chunk. What nobody says the version of is left out (an abort in the moment of a commit)."""
        self._finished = True
        end = min(self._certain(), len(self._tokens))
        if end < len(self._tokens) and reason not in (FinishReason.ABORT, FinishReason.ERROR):
            raise ServerAnswerError(
                f"the answer does not say which weights sampled tokens {end} to {len(self._tokens)}"
            )
        match = self._stops.completed_by(self._tokens) if reason is FinishReason.STOP else None
        return [self._chunk(end, reason, match, error)]

    def _chunk(
        self, end: int, reason: FinishReason | None = None, match: str | None = None, error: str | None = None
    ) -> TokenChunk:
        new = slice(self._released, end)
        versions = self._versions(end)
        self._released = max(end, self._released)
        return TokenChunk(
            request_id=self._request.request_id,
            tokens=np.array(self._tokens[new], np.int32),
            logprobs=np.array(self._logprobs[new], np.float32),
            versions=versions[new],
            finish_reason=reason,
            stop_match=match,
            cached_tokens=self._cached if reason is not None else 0,
            error=error,
        )

    def _versions(self, end: int) -> npt.NDArray[np.int32]:
        """The version of each of the first ``end`` tokens. Raises ServerAnswerError if those told before were others."""
        told = np.empty(end, np.int32)
        for start, version in self._since:
            told[start:] = version
        if self._spans is None:
            return told
        versions = _spanned(self._spans, end)
        wrong = np.nonzero(versions[: self._released] != told[: self._released])[0]
        if len(wrong):
            raise ServerAnswerError(
                f"token {wrong[0]} was reported with version {told[wrong[0]]}; in the end the server says "
                f"{versions[wrong[0]]}"
            )
        return versions


def _spanned(spans: list[_Span], size: int) -> npt.NDArray[np.int32]:
    versions = np.full(size, -1, np.int32)
    for span in spans:
        try:
            versions[max(span.start, 0) : max(span.end, 0)] = int(span.version)
        except (ValueError, OverflowError):
            raise ServerAnswerError(
                f"tokens of weight version {span.version!r}, which is no number that Millrace gave"
            ) from None
    if (versions < 0).any():
        raise ServerAnswerError(f"the answer does not say which weights sampled some of its {size} tokens: {spans}")
    return versions


def _reason(text: str | None) -> FinishReason | None:
    if text is None:
        return None
    known: dict[str, FinishReason] = {
        "stop": FinishReason.STOP,
        "length": FinishReason.LENGTH,
        "abort": FinishReason.ABORT,
    }
    if text not in known:
        raise ServerAnswerError(f"unknown finish reason {text!r}")
    return known[text]


def error_text(body: bytes) -> str:
    """What an error answer says, in one line."""
    try:
        answer: Any = msgspec.json.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return shown(body)
    for key in ("error", "message", "detail"):
        if isinstance(answer, dict) and key in answer:
            answer = answer[key]
    return " ".join(str(answer).split())
