"""The embedded engine: continuous batching of a Hugging Face causal LM, in one process, one step at a time.

    submit ──► waiting ──► running ──► forward ──► sample ──► record ──► TokenChunk
                  ▲ slots free or idle    ▲ weights switch only between steps

| | consumes | produces | waits for | unblocked by |
|---|---|---|---|---|
| ``step`` | waiting and running requests | chunks of tokens | nothing: does what can be done now | |

The engine has no thread and no loop of its own; :class:`~.async_engine.AsyncTorchEngine` steps it. The same calls in
the same order give the same results bit for bit (one machine, one number of threads).
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import PreTrainedModel

from rollout_workers.disaggregation.cache_memory import cache_memory
from rollout_workers.engines.config import EnginesConfig
from rollout_workers.engines.protocol import (
    EngineHealth,
    FinishReason,
    GenerateRequest,
    KvPolicy,
    PauseMode,
    TokenChunk,
)
from rollout_workers.engines.requests import empty_chunk, refusal
from rollout_workers.engines.torch_engine import loader
from rollout_workers.engines.torch_engine.attention import SlotCache
from rollout_workers.engines.torch_engine.counters import Counters
from rollout_workers.engines.torch_engine.forward import forward_of
from rollout_workers.engines.torch_engine.kv_exchange import KvExchange
from rollout_workers.engines.torch_engine.load import load_of
from rollout_workers.engines.torch_engine.sampler import sample
from rollout_workers.engines.torch_engine.scheduler import Scheduler, StepPlan
from rollout_workers.engines.torch_engine.slot_table import SERVED, IntArray, SlotTable
from rollout_workers.engines.torch_engine.stop_strings import StopStrings, eos_mask
from rollout_workers.engines.torch_engine.weights import WeightStore

if TYPE_CHECKING:
    from tokenizers import Tokenizer


class TorchEngine:
    """A causal LM with its KV cache, weights and requests.

    Chunks come from :meth:`step` only; what other calls cause (aborts, refused requests) is in the next step's chunks.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: Tokenizer | None, config: EnginesConfig, version: int = 0
    ) -> None:
        config.validate()
        loader.attach_attention(model)
        loader.check_lengths(model.config, config.max_len)
        self.model = model.eval()
        self.model.requires_grad_(False)
        self.config = config
        self.weights = WeightStore(model, version)
        self.table = SlotTable(config.slots, config.max_len)
        self.scheduler = Scheduler(self.table, config.prefill_tokens, config.share_prefixes)
        shared = config.split and config.handoff.direct and model.device.type == "cpu"
        self.cache = SlotCache(config.slots, config.max_len, cache_memory() if shared else None)
        self.scheduler.on_shared = self.cache.copy
        self.kv = KvExchange(self.scheduler, self.cache, config.park_mb << 20)
        self.counters = Counters()
        self.paused = False
        self._compute = forward_of(model, self.cache, config.trace)
        self._vocabulary = int(model.config.get_text_config().vocab_size)
        self._stops = StopStrings(tokenizer, self._vocabulary)
        self._eos = eos_mask(model, self._vocabulary)
        self._requests: dict[str, GenerateRequest] = {}
        self._outbox: list[TokenChunk] = []

    @property
    def weight_bytes(self) -> int:
        """Size of one version of the weights."""
        return self.weights.nbytes()

    @property
    def traced(self) -> bool:
        """Whether the forward pass is replayed from a trace."""
        return self._compute.traced

    @property
    def has_work(self) -> bool:
        """Whether the next step would do or report anything."""
        return bool(self._outbox) or (not self.paused and bool(self._requests))

    # ------------------------------------------------------------------------------------------------- requests

    def submit(self, request: GenerateRequest) -> None:
        """Queue a request. One that cannot be served ends with an ``error`` chunk, before any work on it.

        Raises ValueError if a request of this id is in flight or not reported yet (chunks could not tell them apart).
        """
        if request.request_id in self._requests or any(c.request_id == request.request_id for c in self._outbox):
            raise ValueError(f"request {request.request_id!r} is already in flight; request ids must be unique")
        reason = self._refusal(request)
        if reason is not None:
            self._outbox.append(empty_chunk(request.request_id, FinishReason.ERROR, reason))
            return
        self._requests[request.request_id] = request
        self.scheduler.enqueue(request)

    def abort(self, request_id: str) -> None:
        """End a request with the tokens it has (perhaps none); its session keeps its KV. Unknown ids are ignored."""
        request = self._requests.get(request_id)
        if request is None:
            return
        if self.scheduler.remove_waiting(lambda waiting: waiting.request_id == request_id):
            del self._requests[request_id]
            self._outbox.append(empty_chunk(request_id, FinishReason.ABORT))
            return
        self._outbox.append(self._finish(self.table.slot_of[request.session_id], FinishReason.ABORT))

    def release(self, session_id: str) -> None:
        """Free a session's slot; a request of it that is in flight is aborted."""
        for request in [r for r in self._requests.values() if r.session_id == session_id]:
            self.abort(request.request_id)
        self.scheduler.release(session_id)
        self.kv.released(session_id)

    def step(self) -> list[TokenChunk]:
        """Admit, compute one forward pass, sample; returns the chunks that are due. Does nothing while paused."""
        began = time.perf_counter()
        chunks, self._outbox = self._outbox, []
        if self.paused:
            return chunks
        for slot in self.scheduler.admit():
            self._prepare(slot)
        moves = self.scheduler.compact()
        if moves is not None:
            self.cache.swap(*moves, self.table.swap(*moves))
        plan = self.scheduler.plan()
        if plan is None:
            return chunks
        self.weights.activate(None if plan.pin == SERVED else plan.pin)
        version = self.weights.version if plan.pin == SERVED else plan.pin
        tokens, logprobs = self._forward(plan)
        self.scheduler.computed(plan, version)
        chunks += self._record(plan.sample_slots, tokens, logprobs, version)
        self.counters.stepped(time.perf_counter() - began, plan.prefilled, plan.decodes)
        return chunks

    # ------------------------------------------------------------------------------------------------- control

    def pause(self, keep: PauseMode) -> None:
        """Stop stepping; :class:`PauseMode` says what becomes of the requests in flight."""
        self.paused = True
        if keep is PauseMode.KEEP_REQUESTS:
            self.counters.recomputed_tokens += self.scheduler.drop_all_kv()
            self.kv.drop_all()
        elif keep is PauseMode.ABORT:
            for request_id in list(self._requests):
                self.abort(request_id)

    def resume(self) -> None:
        self.paused = False

    def stage(self, version: int, named_tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Copy a whole version (Hugging Face names, tied tensors once) beside the served one."""
        self.stage_begin(version)
        for name, tensor in named_tensors:
            self.stage_tensor(name, tensor)
        self.stage_end()

    def stage_begin(self, version: int) -> None:
        """Begin to stage a version tensor by tensor. All three may run in another thread than :meth:`step`."""
        self.weights.stage_begin(version)

    def stage_tensor(self, name: str, tensor: Tensor) -> None:
        """Copy one tensor. Raises WeightError if the model has none of this name and shape."""
        self.weights.stage_tensor(name, tensor)

    def stage_end(self) -> None:
        """Raises WeightError if any parameter has not arrived."""
        self.weights.stage_end()

    def commit(self, version: int, kv: KvPolicy = KvPolicy.AUTO) -> int:
        """Serve the staged version from the next step on, requests in flight included; returns it.

        The KV of pinned requests is untouched. Raises WeightError if this version is not completely staged.
        """
        began = time.perf_counter()
        self.weights.commit(version)
        self.counters.recomputed_tokens += self.scheduler.invalidate(version, kv)
        self.kv.committed(version, kv)
        if self._requests:
            self.counters.stall_s += time.perf_counter() - began
        return version

    def pin(self, version: int) -> None:
        """Keep the served version, which must be ``version``, for requests with this ``pinned_version``."""
        self.weights.pin(version)

    def unpin(self, version: int) -> None:
        """Forget a pinned version. Raises ValueError while requests that need it are in flight."""
        users = [r.request_id for r in self._requests.values() if r.pinned_version == version]
        if users:
            raise ValueError(f"version {version} is in use by {len(users)} requests in flight, {users[0]!r} among them")
        self.weights.unpin(version)

    def health(self) -> EngineHealth:
        table = self.table
        return EngineHealth(
            version=self.weights.version,
            running=int(table.running.sum()),
            waiting=len(self.scheduler.waiting),
            sessions=len(table.slot_of),
            kv_used=float(table.kv_length.sum()) / table.tokens.size,
            paused=self.paused,
            evicted_sessions=self.scheduler.evicted,
            shared_tokens=self.scheduler.shared_tokens,
            parked_sessions=len(self.kv.park),
            parked_mb=self.kv.park.used / 2**20,
            parks=self.kv.park.parks,
            park_hits=self.kv.park.hits,
            park_evictions=self.kv.park.evictions,
            **load_of(table, self.scheduler.waiting),
            **self.counters.snapshot(),
        )

    # ------------------------------------------------------------------------------------------------- internals

    def _refusal(self, request: GenerateRequest) -> str | None:
        """Why a request cannot be served, or None."""
        reason = refusal(request, self._vocabulary, self.config.max_len, self.weights.pinned)
        if reason is not None:
            return reason
        if self.scheduler.busy(request.session_id):
            return f"session {request.session_id!r} has a request in flight; one at a time"
        try:
            _ = self._stops.matcher(request.stop) if request.stop else None
        except ValueError as error:
            return str(error)
        return None

    def _prepare(self, slot: int) -> None:
        """Set up what only the engine knows of a request that was just admitted."""
        request = self.table.request[slot]
        assert request is not None
        self.counters.cached_tokens += int(self.table.cached[slot])
        self.table.report_at[slot] = len(request.prompt) + min(self.config.stream_every, request.max_tokens)
        if request.stop:
            self.table.matcher[slot] = self._stops.matcher(request.stop)

    @torch.inference_mode()
    def _forward(self, plan: StepPlan) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
        """One pass over the step's tokens; returns a sampled token and its log-probability for each sample row."""
        slots = plan.sample_slots
        if not len(slots):
            self._compute(plan)
            return np.zeros(0, np.int32), np.zeros(0, np.float32)
        table = self.table
        draws = table.uniforms[slots, table.length[slots]]
        if table.plain[slots].all():
            tokens, logprobs = self._compute.draw(plan, draws)
        else:
            settings = table.temperature[slots], table.top_k[slots], table.top_p[slots]
            tokens, logprobs = sample(self._compute(plan), *settings, draws)
        return tokens.cpu().numpy().astype(np.int32), logprobs.cpu().numpy()

    def _record(
        self, slots: IntArray, tokens: npt.NDArray[np.int32], logprobs: npt.NDArray[np.float32], version: int
    ) -> list[TokenChunk]:
        """Append the sampled tokens to their sequences, end those that are complete, and report what is due."""
        table = self.table
        chunks = []
        if not math.isfinite(logprobs.sum()):
            sound = np.isfinite(logprobs)
            chunks = [self._poisoned(slot, version) for slot in slots[~sound].tolist()]
            slots, tokens, logprobs = slots[sound], tokens[sound], logprobs[sound]
        positions = table.length[slots]
        table.tokens[slots, positions] = tokens
        table.logprobs[slots, positions] = logprobs
        table.versions[slots, positions] = version
        lengths = positions + 1
        table.length[slots] = lengths
        self.counters.generated_tokens += len(slots)
        stopped, matches = self._eos[tokens], dict[int, str]()
        if table.stops[slots].any():
            stopped |= (table.stop_ids[slots] == tokens[:, None]).any(1)
            matches = self._stop_strings(slots, tokens)
            stopped |= np.isin(slots, list(matches))
        report = stopped | (lengths >= table.report_at[slots])
        for index in report.nonzero()[0].tolist():
            slot = int(slots[index])
            if stopped[index]:
                chunks.append(self._finish(slot, FinishReason.STOP, stop_match=matches.get(slot)))
            elif table.length[slot] >= table.limit[slot]:
                chunks.append(self._finish(slot, FinishReason.LENGTH))
            else:
                chunks.append(self._chunk(slot))
        return chunks

    def _stop_strings(self, slots: IntArray, tokens: npt.NDArray[np.int32]) -> dict[int, str]:
        """The slots whose last token completes a stop string, with that string."""
        matches = {}
        for slot, token in zip(slots.tolist(), tokens.tolist(), strict=True):
            matcher = self.table.matcher[slot]
            if matcher is not None and matcher.may_complete[token]:
                request = self.table.request[slot]
                assert request is not None
                began = len(request.prompt) - request.generated
                found = matcher.match(self.table.tokens[slot, began : self.table.length[slot]])
                if found is not None:
                    matches[slot] = found
        return matches

    def _poisoned(self, slot: int, version: int) -> TokenChunk:
        """End a request whose logits are not numbers, and clean its slot."""
        self.table.kv_length[slot] = 0
        self.cache.clear([slot])
        error = f"the logits of version {version} are not finite; its weights are damaged or training has diverged"
        return self._finish(slot, FinishReason.ERROR, error=error)

    def _finish(
        self, slot: int, reason: FinishReason, *, stop_match: str | None = None, error: str | None = None
    ) -> TokenChunk:
        chunk = self._chunk(slot, reason, stop_match, error)
        del self._requests[chunk.request_id]
        self.table.finish(slot)
        return chunk

    def _chunk(
        self,
        slot: int,
        reason: FinishReason | None = None,
        stop_match: str | None = None,
        error: str | None = None,
    ) -> TokenChunk:
        """What a slot has sampled since its last chunk."""
        table = self.table
        request = table.request[slot]
        assert request is not None
        new = slice(int(table.emitted[slot]), int(table.length[slot]))
        table.emitted[slot] = new.stop
        table.report_at[slot] = min(new.stop + self.config.stream_every, int(table.limit[slot]))
        cached = max(int(table.cached[slot]), 0)
        table.cached[slot] = -1
        return TokenChunk(
            request_id=request.request_id,
            tokens=table.tokens[slot, new].copy(),
            logprobs=table.logprobs[slot, new].copy(),
            versions=table.versions[slot, new].copy(),
            finish_reason=reason,
            stop_match=stop_match,
            cached_tokens=cached,
            error=error,
        )


def build_engine(
    config: EnginesConfig, path: Path, dtype: str | None = None, threads: int | None = None, version: int = 0
) -> TorchEngine:
    """Load a model directory into an engine; ``dtype`` and ``threads`` go before those of ``config``.

    The weights on disk count as ``version``. Raises ModelError, naming what is wrong with the directory or the model.
    """
    config.validate()
    threads = threads or config.threads
    if threads is not None:
        torch.set_num_threads(threads)
    model, tokenizer = loader.load_model(str(path), dtype or config.dtype, config.device)
    return TorchEngine(model, tokenizer, config, version)
