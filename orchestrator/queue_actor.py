"""The Ray shell of the experience queue. Event-driven: every waiting call sleeps on an event, none polls.

===========  ====================================  =======================  =======================================
call         consumes                              produces                 waits for
===========  ====================================  =======================  =======================================
``open``     group headers (dispatcher)            live groups              nothing
``add``      finished episodes (workers)           ready groups             space in the byte budget
``lease``    ready groups                          encoded groups           a ready group, or its time-out
``events``   what happened                         one batch for the        an event, or its time-out
                                                   controller
===========  ====================================  =======================  =======================================
"""

from __future__ import annotations

import asyncio
import logging
import time
from pathlib import Path
from typing import Any

from experience.config import QueueConfig, StalenessConfig
from experience.entries import Added, EpisodeEntry, EventKind, InFlight, QueueEvent
from experience.journal import Journal
from experience.queue import ExperienceQueue
from experience.records import GroupHeader
from experience.staleness import make_policy
from experience.wire import decode, encode

logger = logging.getLogger(__name__)


class QueueActor:
    """One experience queue. Time is wall-clock seconds; calls carry msgpack."""

    def __init__(
        self,
        config: QueueConfig,
        staleness: StalenessConfig,
        groups_per_update: int,
        journal_directory: Path | None,
    ) -> None:
        self._config = config
        self._policy = make_policy(staleness, groups_per_update)
        self._journal_directory = journal_directory
        self._queue: ExperienceQueue | None = None
        self._ready = asyncio.Condition()
        self._space = asyncio.Condition()
        self._happened = asyncio.Event()
        self._outbox: list[QueueEvent] = []
        self._deadline: asyncio.TimerHandle | None = None
        self._ended = asyncio.Event()

    @property
    def queue(self) -> ExperienceQueue:
        assert self._queue is not None, "begin() comes first"
        return self._queue

    async def begin(self, committed_step: int | None) -> bytes:
        """Start empty (None), or as the journal tells for a run that continues after ``committed_step``.

        Returns what is still in flight (encoded list of `InFlight`); counters are in `ledger`.
        """
        journal = Journal(self._journal_directory) if self._journal_directory is not None else None
        if committed_step is None or journal is None:
            self._queue = ExperienceQueue(self._config, self._policy, journal=journal)
        else:
            self._queue = ExperienceQueue.recover(self._config, self._policy, journal, committed_step, time.time())
        await self._changed()
        in_flight: list[InFlight] = self.queue.in_flight()
        return encode(in_flight)

    async def in_flight(self) -> bytes:
        """Groups still being generated and their missing episodes (encoded list of `InFlight`)."""
        return encode(self.queue.in_flight())

    async def open(self, headers: bytes) -> None:
        """Groups are about to be dispatched."""
        now = time.time()
        for header in decode(headers, list[GroupHeader]):
            self.queue.open(header, now)
        await self._changed()

    async def add(self, entries: bytes) -> bytes:
        """Take finished episodes; waits while the byte budget is spent. Returns an encoded list of `Added`."""
        results: list[Added] = []
        for entry in decode(entries, list[EpisodeEntry]):
            result = self.queue.add(entry, time.time())
            while result is Added.FULL:
                await self._changed()
                async with self._space:
                    await self._space.wait()
                result = self.queue.add(entry, time.time())
            results.append(result)
        await self._changed()
        return encode(results)

    async def fail(self, failures: list[tuple[str, str, str]]) -> None:
        """Episodes were given up: (group id, episode id, reason)."""
        for group_id, episode_id, reason in failures:
            self.queue.fail(group_id, episode_id, reason, time.time())
        await self._changed()

    async def drop(self, group_ids: list[str], reason: str) -> None:
        for group_id in group_ids:
            self.queue.drop(group_id, reason)
        await self._changed()

    async def lease(self, consumer: str, limit: int, version: int, timeout_s: float) -> list[bytes]:
        """Up to ``limit`` groups for step ``version``, at least one unless ``timeout_s`` passes first."""
        deadline = time.monotonic() + timeout_s
        async with self._ready:
            while True:
                leased = self.queue.lease(consumer, limit, version, time.time())
                left = deadline - time.monotonic()
                if leased or left <= 0:
                    break
                # Asking may have dropped groups, and a consumer that lacks groups makes room for refused producers.
                await self._changed()
                try:
                    await asyncio.wait_for(self._ready.wait(), left)
                except TimeoutError:
                    break
        await self._changed()
        return [group.encode() for group in leased]

    async def release(self, consumer: str) -> None:
        """A consumer is lost; its groups are delivered again."""
        self.queue.release(consumer)
        await self._changed()

    async def ack(self, group_ids: list[str], step: int, trained_tokens: int, masked_tokens: int) -> None:
        """Groups were trained at ``step``."""
        self.queue.ack(group_ids, step=step, trained_tokens=trained_tokens, masked_tokens=masked_tokens)
        await self._changed()

    async def commit(self, step: int) -> None:
        """A checkpoint holds every step up to ``step``."""
        self.queue.commit(step)

    async def expire(self, version: int) -> None:
        """Drop what is useless from ``version`` on; the controller hears of it as events."""
        self.queue.expire(version)
        await self._changed()

    async def events(self, timeout_s: float) -> bytes:
        """What happened since the last call (encoded list of `QueueEvent`); waits for the first."""
        if not self._outbox:
            self._happened.clear()
            try:
                await asyncio.wait_for(self._happened.wait(), timeout_s)
            except TimeoutError:
                return encode([])
        events, self._outbox = self._outbox, []
        return encode(events)

    async def ledger(self) -> dict[str, Any]:
        """Groups, tokens, length distance; raises LedgerError if they do not balance."""
        self.queue.ledger.check()
        return {
            "groups": self.queue.ledger.snapshot(),
            "tokens": self.queue.ledger.token_snapshot(),
            "ks": self.queue.ledger.length_distance(),
            "next_index": self.queue.next_index,
        }

    async def stats(self) -> dict[str, Any]:
        """For the terminal view."""
        ledger = self.queue.ledger
        return {
            "in_flight": ledger.live - self.queue.ready_groups - self.queue.leased_groups,
            "ready": self.queue.ready_groups,
            "leased": self.queue.leased_groups,
            "bytes": self.queue.bytes_used,
            "budget_bytes": int(self._config.budget_mb * (1 << 20)),
            "trained": ledger.trained,
            "dropped": ledger.dropped.total(),
        }

    async def alive(self) -> None:
        """Ends with the process only."""
        await self._ended.wait()

    async def stop(self) -> None:
        if self._queue is not None:
            self._queue.flush()
        self._ended.set()

    async def _changed(self) -> None:
        """After every transition: journal, events, waiting callers, the next deadline."""
        self.queue.flush()
        events = self.queue.events()
        if events:
            self._outbox.extend(event for event in events if event.kind is not EventKind.SPACE)
            self._happened.set()
            kinds = {event.kind for event in events}
            if EventKind.SPACE in kinds:
                async with self._space:
                    self._space.notify_all()
            if kinds - {EventKind.SPACE}:
                asyncio.get_running_loop().create_task(self._wake_consumers())
        self._arm_deadline()

    async def _wake_consumers(self) -> None:
        async with self._ready:
            self._ready.notify_all()

    def _arm_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
        deadline = self.queue.next_deadline()
        if deadline is not None:
            loop = asyncio.get_running_loop()
            self._deadline = loop.call_later(
                max(0.0, deadline - time.time()), lambda: loop.create_task(self._close_due())
            )

    async def _close_due(self) -> None:
        self.queue.close_due(time.time())
        await self._changed()
