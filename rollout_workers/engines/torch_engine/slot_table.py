"""The state of all sequences of an engine, one row (slot) each, as arrays.

A slot holds the tokens of one session and says how many of them have their keys and values in the cache. It is free,
idle (its session waits between turns) or running (a request of the session is generating). Two lengths describe it:

    0 <= kv_length <= length       tokens[kv_length:length] must still be computed

A running slot with one token to compute decodes; with more it prefills. A request that goes on, a new turn of a
session, a prompt longer than one step's budget and a KV recomputed after a weight update are all this one case.
"""

from __future__ import annotations

import heapq
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from rollout_workers.engines.protocol import GenerateRequest
from rollout_workers.engines.torch_engine.uniforms import uniforms

if TYPE_CHECKING:
    from rollout_workers.engines.torch_engine.stop_strings import StopMatcher

SERVED = -1
"""The ``pin`` of a slot that is generated with whatever weights are served."""

IntArray = npt.NDArray[np.int64]


class SlotTable:
    """Arrays over ``slots`` rows; row indices are slots. Pure bookkeeping, no policy."""

    def __init__(self, slots: int, max_len: int) -> None:
        self.slots = slots
        self.max_len = max_len
        self.tokens = np.zeros((slots, max_len), np.int32)
        self.logprobs = np.zeros((slots, max_len), np.float32)
        self.versions = np.full((slots, max_len), -1, np.int32)
        self.length = np.zeros(slots, np.int64)
        self.kv_length = np.zeros(slots, np.int64)
        self.kv_oldest = np.zeros(slots, np.int64)
        """Oldest weight version that computed any of the slot's keys and values."""
        self.pin = np.full(slots, SERVED, np.int64)
        self.running = np.zeros(slots, np.bool_)
        self.order = np.zeros(slots, np.int64)
        """Position of the request in order of admission."""
        self.limit = np.zeros(slots, np.int64)
        """``length`` at which the request has used up its ``max_tokens``."""
        self.report_at = np.zeros(slots, np.int64)
        """``length`` at which the request's next chunk is due."""
        self.emitted = np.zeros(slots, np.int64)
        """Tokens up to here have been reported."""
        self.temperature = np.ones(slots, np.float32)
        self.top_p = np.ones(slots, np.float32)
        self.top_k = np.zeros(slots, np.int64)
        self.plain = np.ones(slots, np.bool_)
        """Sampled from the softmax of the logits: temperature 1, no top-k, no top-p."""
        self.stops = np.zeros(slots, np.bool_)
        """Whether the request has stop token ids or stop strings."""
        self.uniforms = np.zeros((slots, max_len))
        """The random numbers that the tokens of the running request are drawn with."""
        self.lent = np.zeros(slots, np.bool_)
        """Another process may be writing into the slot's keys and values: it must neither move nor be used otherwise."""
        self.stop_ids = np.full((slots, 1), -1, np.int64)
        self.cached = np.zeros(slots, np.int64)
        """Prompt tokens that the request found in the cache; -1 once reported."""
        self.received = np.zeros(slots, np.int64)
        """Tokens whose KV another engine has computed for the next request: not found in the cache, but handed over."""
        self.request: list[GenerateRequest | None] = [None] * slots
        self.matcher: list[StopMatcher | None] = [None] * slots
        """Finds the stop strings of the running request, if it has any."""
        self.session: list[str | None] = [None] * slots
        self.group: list[str] = [""] * slots
        """The prefix group of the slot's session, if it has one."""
        self.members: dict[str, dict[str, None]] = {}
        """The sessions of each prefix group that have a slot."""
        self.slot_of: dict[str, int] = {}
        self.idle: dict[int, None] = {}
        """Idle slots, longest unused first."""
        self._free = list(range(slots))

    @property
    def free(self) -> int:
        return len(self._free)

    def take(self, session_id: str) -> int:
        """Give the lowest free slot to a session; low slots first keeps the running ones close together."""
        slot = heapq.heappop(self._free)
        self.session[slot] = session_id
        self.slot_of[session_id] = slot
        return slot

    def drop(self, slot: int) -> None:
        """Free a slot that is not running; one that is lent is free when it comes back."""
        session_id = self.session[slot]
        if session_id is None or self.running[slot]:
            raise ValueError(f"slot {slot} cannot be freed: it is {'running' if self.running[slot] else 'free'}")
        self.idle.pop(slot, None)
        del self.slot_of[session_id]
        self._join(slot, "")
        self.session[slot] = None
        self.length[slot] = self.kv_length[slot] = self.received[slot] = 0
        if not self.lent[slot]:
            heapq.heappush(self._free, slot)

    def lend(self, slot: int) -> None:
        """From now on another process may write into the slot. Raises ValueError for a running or a free one."""
        if self.running[slot] or self.session[slot] is None:
            raise ValueError(f"slot {slot} cannot be lent: it is {'running' if self.running[slot] else 'free'}")
        self.lent[slot] = True

    def give_back(self, slot: int) -> None:
        """Nobody else writes into the slot any more."""
        self.lent[slot] = False
        if self.session[slot] is None:
            heapq.heappush(self._free, slot)

    def start(self, slot: int, request: GenerateRequest, order: int) -> int:
        """Begin a request in its session's slot; returns how many prompt tokens have their KV already."""
        prompt = request.prompt
        pin = SERVED if request.pinned_version is None else request.pinned_version
        cached = self.shared_prefix(slot, prompt, len(prompt) - 1) if self.pin[slot] == pin else 0
        size = len(prompt)
        self.tokens[slot, :size] = prompt
        self.length[slot] = self.emitted[slot] = size
        self.kv_length[slot] = cached
        self.cached[slot] = max(0, cached - int(self.received[slot]))
        self.received[slot] = 0
        self.limit[slot] = size + request.max_tokens
        self.pin[slot] = pin
        greedy = request.temperature == 0
        self.temperature[slot] = request.temperature
        self.top_p[slot] = 1.0 if greedy else request.top_p
        self.top_k[slot] = 0 if greedy else request.top_k
        self.uniforms[slot, size : size + request.max_tokens] = uniforms(
            np.uint64(request.seed % 2**64), np.arange(size, size + request.max_tokens)
        )
        self.plain[slot] = (request.temperature, request.top_p, request.top_k) == (1, 1, 0)
        self.stops[slot] = bool(request.stop or request.stop_token_ids)
        self._set_stop_ids(slot, request.stop_token_ids)
        self.idle.pop(slot, None)
        self.running[slot] = True
        self._join(slot, request.prefix_group)
        self.order[slot] = order
        self.request[slot] = request
        return cached

    def adopt(self, slot: int, source: int, length: int) -> None:
        """The slot's first ``length`` tokens get the KV of the same tokens in ``source``, of which all is of one version."""
        self.kv_length[slot] = self.cached[slot] = length
        self.kv_oldest[slot] = self.kv_oldest[source]

    def _join(self, slot: int, group: str) -> None:
        """The slot's session becomes one of the group, and of no other."""
        session, before = self.session[slot], self.group[slot]
        assert session is not None, "a free slot is of no group"
        if before == group:
            return
        if before:
            del self.members[before][session]
            if not self.members[before]:
                del self.members[before]
        if group:
            self.members.setdefault(group, {})[session] = None
        self.group[slot] = group

    def finish(self, slot: int) -> None:
        """End the request of a slot; the session keeps the slot and its KV, and becomes the last to be evicted."""
        self.running[slot] = False
        self.request[slot] = self.matcher[slot] = None
        self.idle[slot] = None

    def expect(self, slot: int, request: GenerateRequest) -> int:
        """Prepare an idle slot for KV of the request's prompt from elsewhere; returns how many of its tokens have theirs.

        The slot is neither idle nor running until `rest` or a request of its session.
        """
        prompt, size = request.prompt, len(request.prompt)
        pin = SERVED if request.pinned_version is None else request.pinned_version
        have = self.shared_prefix(slot, prompt, size) if self.pin[slot] == pin else 0
        self.tokens[slot, :size] = prompt
        self.length[slot] = self.emitted[slot] = size
        self.kv_length[slot] = have
        self.limit[slot] = size + request.max_tokens
        self.pin[slot] = pin
        self.received[slot] = 0
        self._join(slot, request.prefix_group)
        self.idle.pop(slot, None)
        return have

    def rest(self, slot: int) -> None:
        """A slot that does not run becomes the last to be evicted; one that is lent is given up by its session."""
        if self.lent[slot]:
            self.drop(slot)
        elif not self.running[slot]:
            self.idle.pop(slot, None)
            self.idle[slot] = None

    def swap(self, low: IntArray, high: IntArray) -> int:
        """Exchange the contents of slots ``low[i]`` and ``high[i]``; returns the length of the longest of them."""
        to, source = np.concatenate([low, high]), np.concatenate([high, low])
        used = int(max(self.limit[to].max(), self.length[to].max()))
        for array in vars(self).values():
            if isinstance(array, np.ndarray):
                part = array[:, :used] if array.shape[1:] == (self.max_len,) else array
                part[to] = part[source]
        renamed = dict(zip(to.tolist(), source.tolist(), strict=True))
        columns: tuple[list[Any], ...] = (self.request, self.matcher, self.session, self.group)
        for column in columns:
            moved = [column[slot] for slot in renamed.values()]
            for slot, value in zip(renamed, moved, strict=True):
                column[slot] = value
        self.slot_of = {name: renamed.get(slot, slot) for name, slot in self.slot_of.items()}
        self.idle = {renamed.get(slot, slot): None for slot in self.idle}
        self._free = sorted(renamed.get(slot, slot) for slot in self._free)
        return int(self.length[to].max())

    def shared_prefix(self, slot: int, prompt: npt.NDArray[np.int32], most: int) -> int:
        """Length of the longest prefix of ``prompt`` in the cache, at most ``most``."""
        most = min(int(self.kv_length[slot]), most)
        differs = np.flatnonzero(self.tokens[slot, :most] != prompt[:most])
        return int(differs[0]) if len(differs) else most

    def _set_stop_ids(self, slot: int, ids: tuple[int, ...]) -> None:
        missing = len(ids) - self.stop_ids.shape[1]
        if missing > 0:
            self.stop_ids = np.pad(self.stop_ids, ((0, 0), (0, missing)), constant_values=-1)
        self.stop_ids[slot] = -1
        self.stop_ids[slot, : len(ids)] = ids
