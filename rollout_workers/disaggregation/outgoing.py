"""What a prefill engine knows of a connection and of a request whose KV goes out over it."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

import msgspec
import numpy as np
import numpy.typing as npt
from torch import Tensor

from rollout_workers.disaggregation.handoff import Handoff, Reason
from rollout_workers.disaggregation.link import KvLink
from rollout_workers.disaggregation.ring_space import RingSpace
from rollout_workers.engines.protocol import FinishReason, GenerateRequest, KvTarget, TokenChunk


@dataclass
class Line:
    """The connection to one decode engine."""

    link: KvLink
    space: RingSpace
    memory: Tensor | None = None
    """uint8, the ring; known when the other side has answered."""


@dataclass
class Outgoing:
    """One request whose KV goes out."""

    request: GenerateRequest
    target: KvTarget
    handoff: Handoff
    line: Line
    before: int
    """Tokens that its session had here when it came."""
    slot: int | None = None
    """Where it goes in the other engine's cache; None: through the ring."""
    announced: bool = False
    ending: TokenChunk | None = None
    """Its one token, reported when all KV is across."""
    over: bool = False
    """The request has ended here; the KV is for the session's next turn."""
    blocked_since: float | None = None
    """Since when the decode side is waited for."""
    timer: asyncio.TimerHandle | None = field(default=None, repr=False)
    goes_on: bool = False
    """More of it will be sent without anything having happened."""


def common_prefix(one: npt.NDArray[np.int32], other: npt.NDArray[np.int32]) -> int:
    """Length of the longest common beginning."""
    most = min(len(one), len(other))
    differs = np.flatnonzero(one[:most] != other[:most])
    return int(differs[0]) if len(differs) else most


def handed_over(chunk: TokenChunk, reason: Reason | None) -> TokenChunk:
    """``chunk`` as the last that this engine reports; ``reason``: why its KV did not get across."""
    return msgspec.structs.replace(
        chunk,
        finish_reason=FinishReason.HANDED_OVER,
        error=None if reason is None else reason.value,
    )
