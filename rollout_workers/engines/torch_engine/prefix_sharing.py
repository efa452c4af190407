"""Whose KV a new request can begin with: that of another session of its prefix group, as far as their tokens agree.

Only KV that the very weights have computed with which the request would compute it now is taken: after an update with
``kv=keep`` the old KV of a sibling is not, and a pinned request shares with requests of its version alone.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from rollout_workers.engines.protocol import GenerateRequest
from rollout_workers.engines.torch_engine.slot_table import SERVED, SlotTable

LEAST_WAIT = 16
"""A request waits for a prefix that is being computed only if that saves it at least as many tokens."""


class Prefix(NamedTuple):
    """What the siblings of a request have of its prompt."""

    source: str = ""
    """The session to copy from."""
    ready: int = 0
    """So many tokens of the prompt have their KV there."""
    coming: int = 0
    """So many will, when a sibling that runs now has computed its prompt."""

    @property
    def worth_waiting(self) -> bool:
        return self.coming - self.ready >= LEAST_WAIT


def sibling_prefix(table: SlotTable, request: GenerateRequest, version: int) -> Prefix:
    """The longest prefix of the request's prompt that a sibling has or is computing; ``version`` is the one served.

    At least one token of the prompt is left to compute. A request without siblings, or whose own session has kept at
    least half of its prompt, gets nothing.
    """
    siblings = table.members.get(request.prefix_group) if request.prefix_group else None
    if not siblings:
        return Prefix()
    pin = SERVED if request.pinned_version is None else request.pinned_version
    most = len(request.prompt) - 1
    own = table.slot_of.get(request.session_id)
    if own is not None and table.pin[own] == pin and 2 * table.shared_prefix(own, request.prompt, most) >= most:
        return Prefix()
    source, ready, coming = "", 0, 0
    for session in siblings:
        slot = table.slot_of[session]
        kv_length = int(table.kv_length[slot])
        sound = kv_length == 0 or pin != SERVED or table.kv_oldest[slot] == version
        if session == request.session_id or table.pin[slot] != pin or not sound:
            continue
        common = _common(table.tokens[slot], request.prompt, min(int(table.length[slot]), most))
        if min(common, kv_length) > ready:
            source, ready = session, min(common, kv_length)
        if table.running[slot]:
            coming = max(coming, common)
    return Prefix(source, ready, coming)


def _common(tokens: npt.NDArray[np.int32], prompt: npt.NDArray[np.int32], most: int) -> int:
    differs = np.flatnonzero(tokens[:most] != prompt[:most])
    return int(differs[0]) if len(differs) else most
