"""An episode's way to the engines, which tells the worker's slots when it generates."""

from __future__ import annotations

from typing import TYPE_CHECKING

from experience.books import clock
from experience.slots import Doing, Slots
from rollout_workers.engines.protocol import GenerateRequest, TokenChunk

if TYPE_CHECKING:
    from rollout_workers.episode_context import Generator


class SlotGenerator:
    """Implements `rollout_workers.episode.Generator` for one episode."""

    def __init__(self, generator: Generator, slots: Slots, episode_id: str) -> None:
        self._generator = generator
        self._slots = slots
        self._episode_id = episode_id

    async def generate(self, request: GenerateRequest) -> TokenChunk:
        before = self._slots.move(self._episode_id, Doing.GENERATING, clock())
        try:
            return await self._generator.generate(request)
        finally:
            self._slots.move(self._episode_id, before, clock())

    def release(self, session_id: str) -> None:
        self._generator.release(session_id)
