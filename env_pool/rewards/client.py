"""A worker's door to the reward actors: batched, cancellable, and indifferent to which actor answers."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from env_pool.batches import ActorLost
from env_pool.config import RewardConfig
from env_pool.errors import SystemFault
from env_pool.fleet import Fleet, OnLost
from env_pool.rewards.records import RewardCall, RewardResult, RewardSample
from experience.wire import decode, encode

ANSWER_GRACE_S = 60.0
"""How much longer than the branches' own time-outs the client waits before it calls the actor lost."""
MAX_LOSSES = 3
"""How many actors one sample may lose before it has no reward (it may be what kills them)."""


class RewardClient:
    """Scores samples on the given actors; one instance a worker, used on one event loop."""

    def __init__(
        self,
        handles: Sequence[Any],
        configs: Sequence[RewardConfig],
        client: str,
        on_lost: OnLost | None = None,
        wait_timeout_s: float = 120.0,
    ) -> None:
        """``handles`` are Ray handles of :class:`~env_pool.rewards.actor.RewardActor`; ``client`` is unique in the run.

        ``wait_timeout_s`` bounds the wait for an actor while none is alive. ``on_lost`` as for the environment pool.
        """
        self._client = client
        self._fleet = Fleet(handles, client, "reward actor", wait_timeout_s, on_lost)
        self._answer_s = max(c.timeout_s * (1 + c.retries) for c in configs) + ANSWER_GRACE_S
        self._labels = ", ".join(config.label for config in configs)
        self._counter = 0
        self._pending = 0
        self._cancelling: set[asyncio.Task[None]] = set()

    @property
    def pending(self) -> int:
        """Samples sent and not answered."""
        return self._pending

    @property
    def alive(self) -> list[int]:
        """Indices of the actors that answer."""
        return self._fleet.alive

    async def score(self, sample: RewardSample) -> RewardResult:
        """Reward of an episode, or the reason why there is none. Cancelling the caller cancels the branches."""
        self._counter += 1
        self._pending += 1
        try:
            return await self._score(f"{self._client}/{self._counter}", sample)
        finally:
            self._pending -= 1

    def replace(self, index: int, handle: Any) -> None:
        """A new actor takes place ``index``; what was sent to the old one is sent again."""
        self._fleet.replace(index, handle)

    async def aclose(self) -> None:
        """Close the channels."""
        if self._cancelling:
            await asyncio.wait(self._cancelling, timeout=1.0)
        self._fleet.close()

    async def _score(self, key: str, sample: RewardSample) -> RewardResult:
        body = encode(RewardCall(key=key, sample=sample))
        reason = ""
        for _ in range(MAX_LOSSES):
            try:
                await self._fleet.acquire(key)
                result = decode(await self._fleet.call(key, body, self._answer_s), RewardResult)
            except ActorLost as lost:
                reason = str(lost)
            except SystemFault as fault:
                return RewardResult(reward=None, error=f"branches {self._labels}: {fault}")
            except asyncio.CancelledError:
                self._cancel_later(key)
                raise
            else:
                self._fleet.release(key)
                return result
        return RewardResult(reward=None, error=f"branches {self._labels}: {MAX_LOSSES} actors lost, {reason}")

    def _cancel_later(self, key: str) -> None:
        cancelling = asyncio.ensure_future(self._cancel(key))
        self._cancelling.add(cancelling)
        cancelling.add_done_callback(self._cancelling.discard)

    async def _cancel(self, key: str) -> None:
        try:
            await self._fleet.call(key, encode(RewardCall(key=key)), ANSWER_GRACE_S)
        except ActorLost:
            return  # then nothing of it runs any more
        finally:
            self._fleet.release(key)
