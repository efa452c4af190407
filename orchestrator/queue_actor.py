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

Episodes and groups (``add``, ``lease``) come over the sockets of `experience.transport` where they can be reached, and as
Ray calls elsewhere; both end in the same methods. What arrives together is written to the journal together, on a thread
when it is much, and answered then.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from experience.accounting import Cause
from experience.books import clock, process_books
from experience.config import QueueConfig, QueueTransport, StalenessConfig
from experience.entries import Added, EpisodeEntry, EventKind, InFlight, LeasedGroup, QueueEvent
from experience.journal import Journal, JournalError
from experience.queue import ExperienceQueue
from experience.records import GroupHeader
from experience.staleness import make_policy
from experience.transport.frames import Endpoint, LeaseRequest
from experience.transport.lane import LaneServer
from experience.transport.listening import own_address
from experience.transport.server import QueueServer
from experience.wire import decode, encode

INLINE_BYTES = 128 << 10
"""What is written without a thread: handing it over would take longer."""

BUFFER_BYTES = 8 << 20
"""What the journal holds back at most while the thread writes."""

logger = logging.getLogger(__name__)

SPACE_S = 3600.0
"""How long a producer waits for space; the run's stall watchdog speaks long before."""


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
        self._ready = Bell()
        self._space = Bell()
        self._happened = asyncio.Event()
        self._outbox: list[QueueEvent] = []
        self._deadline: asyncio.TimerHandle | None = None
        self._server = QueueServer(self)
        self._endpoint: Endpoint | None = None
        self._lane = LaneServer("queue (events)", {"next_events": lambda body: self.next_events(body.decode())})
        self._unanswered: list[Callable[[Exception | None], None]] = []
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="journal")
        self._writing: asyncio.Task[None] | None = None
        self._delivered: dict[str, tuple[int, list[LeasedGroup]]] = {}
        self._ended = asyncio.Event()
        self._account = process_books().account()

    @property
    def queue(self) -> ExperienceQueue:
        assert self._queue is not None, "begin() comes first"
        return self._queue

    async def begin(self, committed_step: int | None) -> bytes:
        """Start empty (None), or as the journal tells for a run that continues after ``committed_step``.

        Returns what is still in flight (encoded list of `InFlight`); counters are in `ledger`.
        """
        journal = (
            Journal(self._journal_directory, buffer_bytes=BUFFER_BYTES) if self._journal_directory is not None else None
        )
        if committed_step is None or journal is None:
            self._queue = ExperienceQueue(self._config, self._policy, journal=journal)
        else:
            self._queue = ExperienceQueue.recover(self._config, self._policy, journal, committed_step, time.time())
        await self._changed()
        if self._config.transport is QueueTransport.socket:
            self._endpoint = await self._server.start(own_address())
        self._account.switch(Cause.IDLE, clock())
        in_flight: list[InFlight] = self.queue.in_flight()
        return encode(in_flight)

    async def endpoint(self) -> bytes:
        """Where the queue listens (encoded list of one `Endpoint`, or of none)."""
        return encode([] if self._endpoint is None else [self._endpoint])

    async def lane(self) -> bytes:
        """Where `next_events` can be called over a socket (see `experience.transport.lane`)."""
        return await self._lane.endpoint()

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
                if not await self._space.wait(SPACE_S):
                    raise TimeoutError(
                        f"episode {entry.episode_id} waited {SPACE_S:g} s for space in the queue "
                        f"(queue.budget_mb={self._config.budget_mb:g}): the learner takes nothing"
                    )
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

    def add_encoded(self, payload: bytes) -> Added:
        """Take one encoded `EpisodeEntry` as far as the journal's buffer; `when_durable` tells the rest."""
        return self.queue.add(decode(payload, EpisodeEntry), time.time(), encoded=payload)

    def when_durable(self, answer: Callable[[Exception | None], None]) -> None:
        """Call ``answer`` when the journal holds all that was taken so far, or with why it cannot."""
        self._unanswered.append(answer)
        if self._writing is None:
            self._writing = asyncio.get_running_loop().create_task(self._write())

    async def lease(self, consumer: str, limit: int, version: int, timeout_s: float, number: int = 0) -> list[bytes]:
        """Up to ``limit`` groups for step ``version``, at least one unless ``timeout_s`` passes first.

        A call with the ``number`` (from 1 on) of the consumer's last one is that call again, after a lost answer.
        """
        request = LeaseRequest(consumer=consumer, limit=limit, version=version, timeout_s=timeout_s, number=number)
        return [group.encode() for group in await self.lease_groups(request)]

    async def lease_groups(self, request: LeaseRequest) -> list[LeasedGroup]:
        """`lease`, before encoding."""
        consumer, number = request.consumer, request.number
        last_number, last_groups = self._delivered.pop(consumer, (0, []))
        if number and number == last_number:
            self._delivered[consumer] = (number, last_groups)
            return last_groups
        deadline = time.monotonic() + request.timeout_s
        while True:
            leased = self.queue.lease(consumer, request.limit, request.version, time.time())
            if leased and number:
                self._delivered[consumer] = (number, leased)
            left = deadline - time.monotonic()
            if leased or left <= 0:
                break
            # Asking may have dropped groups, and a consumer that lacks groups makes room for refused producers.
            self._tell()
            self._account.switch(Cause.QUEUE_EMPTY, clock())
            if not await self._ready.wait(left):
                break
        self._account.switch(Cause.IDLE, clock())
        self._tell()
        return leased

    async def release(self, consumer: str) -> None:
        """A consumer is lost; its groups are delivered again."""
        self._delivered.pop(consumer, None)
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

    async def next_events(self, timeout_s: str) -> bytes:
        """`events`, with the seconds as text: what the socket that `lane` tells offers."""
        return await self.events(float(timeout_s))

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
        self._server.close()
        self._lane.close()
        if self._queue is not None:
            self._queue.flush()
        self._ended.set()

    async def _changed(self) -> None:
        """After every transition: journal, events, waiting callers, the next deadline."""
        self.queue.flush()
        self._tell()

    async def _write(self) -> None:
        """Write the journal and answer producers, until there is nothing more to answer."""
        loop = asyncio.get_running_loop()
        while self._unanswered:
            self._tell()
            answers, self._unanswered = self._unanswered, []
            error: Exception | None = None
            try:
                if self.queue.unwritten_bytes > INLINE_BYTES:
                    await loop.run_in_executor(self._writer, self.queue.flush)
                else:
                    self.queue.flush()
            except JournalError as failure:
                logger.error("%s", failure)
                error = failure
            for answer in answers:
                answer(error)
        self._writing = None

    def _tell(self) -> None:
        """Hand out the events of what happened."""
        events = self.queue.events()
        if events:
            self._outbox.extend(event for event in events if event.kind is not EventKind.SPACE)
            self._happened.set()
            kinds = {event.kind for event in events}
            if EventKind.SPACE in kinds:
                self._space.ring()
                asyncio.get_running_loop().call_soon(self._server.space)
            if kinds - {EventKind.SPACE}:
                self._ready.ring()
        self._arm_deadline()

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


class Bell:
    """Wakes everybody who waits; remembers nothing."""

    def __init__(self) -> None:
        self._waiting: set[asyncio.Future[None]] = set()

    async def wait(self, timeout_s: float | None) -> bool:
        """Whether it rang within ``timeout_s`` (None: for as long as it takes)."""
        rang: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.add(rang)
        try:
            await asyncio.wait_for(rang, timeout_s)
        except TimeoutError:
            return False
        finally:
            self._waiting.discard(rang)
        return True

    def ring(self) -> None:
        for rang in self._waiting:
            if not rang.done():
                rang.set_result(None)
