"""The requests of one server: streamed over HTTP, made again after failures, delivered to the clients' outboxes."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import defaultdict
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from experience.wire import encode
from rollout_workers.disaggregation.handoff import Reason
from rollout_workers.engines.clients import ClientBook
from rollout_workers.engines.protocol import FinishReason, GenerateRequest, TokenChunk
from rollout_workers.engines.requests import empty_chunk
from rollout_workers.engines.servers.adapter import Call, ServerAdapter
from rollout_workers.engines.servers.desk import HandoffDesk, SplitAdapter, leave_note
from rollout_workers.engines.servers.errors import (
    ServerAnswerError,
    ServerDied,
    ServerFailed,
    ServerRefused,
    ServerSilent,
    ServerUnreachable,
)
from rollout_workers.engines.servers.flights import Flight, Patience, Verdict, delay_before
from rollout_workers.engines.servers.http import ServerConnection, beginning
from rollout_workers.submission import SubmitBatch

logger = logging.getLogger(__name__)
T = TypeVar("T")

POLL_S = 10.0
NOTE_S = 5.0
"""How long a decode engine has to take the note of a hand-off."""
ABORT_S = 5.0
"""How long a server has to end an aborted request with the tokens that it has."""


TRY_AGAIN = (408, 429)
"""Statuses of the kind 4xx that say "later", not "never"."""


class Traffic:
    """``version`` is what the server serves; ``every``: tokens that a request reports at a time, at least.

    ``refuse`` says why a request cannot be served, whichever server it is. ``on_change`` is called when requests come or go. `failed` ends with what the server died of.
    """

    def __init__(
        self,
        adapter: ServerAdapter,
        connection: ServerConnection,
        version: int,
        every: int,
        request_timeout_s: float,
        refuse: Callable[[GenerateRequest], str | None],
        on_change: Callable[[], None],
        split: tuple[SplitAdapter, HandoffDesk] | None = None,
    ) -> None:
        """``split``: how to hand requests over, where prefill and decode are apart."""
        self._adapter = adapter
        self._split = split
        self._connection = connection
        self.version = version
        self._every = every
        self._timeout_s = request_timeout_s
        self._refuse = refuse
        self._on_change = on_change
        self.flights: dict[str, Flight] = {}
        self.clients = ClientBook()
        self.first_token_at: float | None = None
        """Wall-clock time of the first sampled token, if there was one."""
        self.failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.failed.add_done_callback(_looked_at)
        self._open = asyncio.Event()
        self._open.set()
        self._unpaused_at = 0.0
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._controls: set[asyncio.Task[None]] = set()
        self._outbox: dict[str, list[TokenChunk]] = defaultdict(list)
        self._ready: dict[str, asyncio.Event] = defaultdict(asyncio.Event)
        self._patience = Patience()

    @property
    def is_open(self) -> bool:
        return self._open.is_set()

    def hold(self) -> None:
        """New requests wait here: during a commit they would meet one version's name and another one's weights."""
        self._open.clear()

    def let_go(self) -> None:
        """New requests go out, and the server's silence counts from now on."""
        self._open.set()
        self._unpaused_at = time.monotonic()

    def switched(self, version: int, boundaries: dict[str, int]) -> None:
        """A commit went through; the streams that are open learn of it."""
        self.version = version
        for flight in list(self.flights.values()):
            if flight.parser is not None:
                self._take(flight, flight.parser.switched(version, boundaries.get(flight.server_id)))

    def submit(self, batch: SubmitBatch) -> None:
        """Take a batch of requests and aborts from one client. Raises what the server died of."""
        self.raise_if_failed()
        self.clients.took(batch)
        for request_id in batch.aborts:
            self._abort(request_id)
        for request in batch.requests:
            self._submit(batch.client, request)

    def forget(self, client: str) -> None:
        """A client is gone: its requests end, and nothing is kept for it."""
        requests, _ = self.clients.forget(client)
        for request_id in requests:
            if (flight := self.flights.get(request_id)) is not None:
                flight.client = None
            self._abort(request_id)
        self._outbox.pop(client, None)
        self._ready.pop(client, None)

    def _submit(self, client: str, request: GenerateRequest) -> None:
        if request.request_id in self.flights:
            raise ValueError(f"request {request.request_id} is already in flight")
        reason = self._refuse(request)
        if reason is not None:
            self.clients.ended(request.request_id)
            self._deliver(client, [empty_chunk(request.request_id, FinishReason.ERROR, reason)])
            return
        flight = Flight(request, client, self._every, time.monotonic())
        self.flights[request.request_id] = flight
        task = asyncio.create_task(self._fly(flight))
        self._tasks[request.request_id] = task
        task.add_done_callback(lambda done: self._landed(flight, done))
        self._on_change()

    async def collect(self, client: str) -> bytes:
        """The chunks made for ``client`` since the last call; waits up to ``POLL_S`` seconds for the first.

        Raises what the server died of, once everything that it had made is collected.
        """
        ready = self._ready[client]
        if not self._outbox[client]:
            self.raise_if_failed()
            ready.clear()
            try:
                await asyncio.wait_for(ready.wait(), POLL_S)
            except TimeoutError:
                return encode([])
        chunks, self._outbox[client] = self._outbox[client], []
        if not chunks:
            self.raise_if_failed()
        return encode(chunks)

    # One request

    async def _fly(self, flight: Flight) -> None:
        """Until the request has its last chunk, or the server is given up."""
        while (failure := await self._attempt(flight)) is not None:
            logger.warning("request %s, attempt %d: %s", flight.request_id, flight.attempt, failure)
            verdict = self._patience.judge(failure, flight.attempt)
            if verdict is Verdict.FAIL:
                self._deliver(flight.client, [flight.end(FinishReason.ERROR, str(failure))])
                return
            if verdict is Verdict.DEAD:
                self.fail(ServerDied(f"{self._adapter.name} fails again and again: {failure}"))
                return
            await asyncio.sleep(delay_before(flight.attempt + 1))

    def _landed(self, flight: Flight, task: asyncio.Task[None]) -> None:
        """The request's task is over, in whichever way (it may have been cancelled before it began)."""
        self.flights.pop(flight.request_id, None)
        self._tasks.pop(flight.request_id, None)
        self.clients.ended(flight.request_id)
        if task.cancelled():
            if flight.aborted:
                self._deliver(flight.client, [flight.end(FinishReason.ABORT)])
        elif (error := task.exception()) is not None:
            logger.error("request %s failed in its adapter", flight.request_id, exc_info=error)
            self._deliver(flight.client, [flight.end(FinishReason.ERROR, f"{type(error).__name__}: {error}")])
        self._on_change()

    async def _attempt(self, flight: Flight) -> Exception | None:
        """One call for what is left of a request. Returns why it failed; None when the request is over."""
        await self._open.wait()
        request = flight.begin(time.monotonic())
        if request is None:
            self._deliver(flight.client, [flight.end(FinishReason.LENGTH)])
            return None
        try:
            await self._stream(flight, request)
        except ServerRefused as error:
            return error
        except (ServerFailed, ServerUnreachable, ServerAnswerError) as error:
            await self._abandon(request)
            return error
        except asyncio.CancelledError:
            if not flight.silent or flight.aborted:
                raise
            task = asyncio.current_task()
            assert task is not None
            task.uncancel()
            flight.silent = False
            await self._abandon(request)
            return ServerSilent(f"not a byte for {flight.request_id} in {self._timeout_s:g} s")
        self._patience.served()
        return None

    async def _stream(self, flight: Flight, request: GenerateRequest) -> None:
        """Raises an error that says what is to be done, unless the request got its last chunk."""
        if request.kv_target is not None and self._split is not None:
            await self._hand_over(flight, request, self._split[0])
            return
        parser = flight.parser = self._adapter.parser(request, self.version)
        finished = False
        try:
            async with self._connection.stream(self._generate(request)) as (status, body):
                if status != 200:
                    raise self._refusal(status, await beginning(body))
                if flight.aborted:
                    self._control(self._ask_abort(request.request_id))
                async for data in body:
                    flight.heard_at = time.monotonic()
                    finished |= self._take(flight, parser.feed(data))
            finished |= self._take(flight, parser.finish())
        finally:
            flight.parser = None
        if not finished:
            raise ServerAnswerError("the answer ended without a finish reason")

    async def _hand_over(self, flight: Flight, request: GenerateRequest, adapter: SplitAdapter) -> None:
        """Have the server prefill, and tell the decode engine where the KV is; the client goes on there."""
        target = request.kv_target
        assert target is not None
        body = await self._connection.ask(adapter.prefill(request, self.version))
        error = None
        try:
            await leave_note(target.address, target.handoff_id, adapter.parse_prefill(body), NOTE_S)
        except ServerUnreachable as unreachable:
            logger.warning("request %s: %s", flight.request_id, unreachable)
            error = Reason.LOST.value
        self._deliver(flight.client, [flight.end(FinishReason.HANDED_OVER, error)])

    def _generate(self, request: GenerateRequest) -> Call:
        if request.kv_source and self._split is not None:
            adapter, desk = self._split
            handoff = desk.take(request.kv_source)
            if handoff is not None:
                return adapter.decode(request, self.version, handoff)
        return self._adapter.generate(request, self.version)

    def _refusal(self, status: int, text: bytes) -> ServerRefused | ServerFailed:
        final = 400 <= status < 500 and status not in TRY_AGAIN
        return (ServerRefused if final else ServerFailed)(self._adapter.refusal(status, text))

    def _take(self, flight: Flight, chunks: list[TokenChunk]) -> bool:
        """Whether the last chunk was among them."""
        self._deliver(flight.client, flight.take(chunks))
        return any(chunk.finish_reason is not None for chunk in chunks)

    def _deliver(self, client: str | None, chunks: list[TokenChunk]) -> None:
        if client is None or not chunks:
            return
        if self.first_token_at is None and any(len(chunk.tokens) for chunk in chunks):
            self.first_token_at = time.time()
        self._outbox[client].extend(chunks)
        self._ready[client].set()

    def _abort(self, request_id: str) -> None:
        """Ask the server to end a request; one that does not within ``ABORT_S`` is ended here."""
        flight = self.flights.get(request_id)
        if flight is None or flight.aborted:
            return
        flight.aborted = True
        task = self._tasks[request_id]
        if flight.parser is None:
            task.cancel()  # it is not at the server
            return
        self._control(self._ask_abort(flight.server_id))
        asyncio.get_running_loop().call_later(ABORT_S, task.cancel)

    async def _ask_abort(self, server_id: str) -> None:
        await self._connection.control(self._adapter, [self._adapter.abort(server_id)])

    async def _abandon(self, request: GenerateRequest) -> None:
        """The server may still work on a request that failed here; what it answers is of no interest."""
        try:
            async with asyncio.timeout(ABORT_S):
                await self._ask_abort(request.request_id)
        except (TimeoutError, ServerAnswerError, ServerRefused, ServerFailed, ServerUnreachable, ServerSilent) as error:
            logger.info("request %s was not aborted: %s", request.request_id, error)

    def _control(self, call: Coroutine[Any, Any, None]) -> None:
        """Make a call beside the rest; its failure is logged."""
        task: asyncio.Task[None] = asyncio.create_task(call)
        self._controls.add(task)

        def ended(done: asyncio.Task[None]) -> None:
            self._controls.discard(done)
            if not done.cancelled() and (error := done.exception()) is not None:
                logger.warning("%s", error)

        task.add_done_callback(ended)

    def end_silent(self, now: float, queueing: bool) -> None:
        """Give up calls of which nothing was heard; with ``queueing`` those without a token wait in the server's queue."""
        for request_id, flight in list(self.flights.items()):
            heard_at = max(flight.heard_at, self._unpaused_at)
            queued = queueing and flight.tokens == 0
            if flight.parser is not None and not queued and now - heard_at > self._timeout_s:
                flight.silent = True
                self._tasks[request_id].cancel()

    def fail(self, error: ServerDied) -> None:
        """The server is of no use any more: everybody who asks is told."""
        if self.failed.done():
            return
        logger.error("%s", error)
        self.failed.set_exception(error)
        for flight in list(self.flights.values()):
            self._deliver(flight.client, flight.flush())
        for task in list(self._tasks.values()):
            if task is not asyncio.current_task():
                task.cancel()
        for ready in self._ready.values():
            ready.set()

    def raise_if_failed(self) -> None:
        """Raise what the server died of, if it did."""
        if self.failed.done():
            self.failed.result()

    async def unless_failed(self, call: Coroutine[Any, Any, T]) -> T:
        """What ``call`` returns. Raises what the server died of at once, whatever the call waits for: a server may leave
        calls open that it will never answer."""
        task = asyncio.ensure_future(call)
        either: set[asyncio.Future[Any]] = {task, self.failed}
        try:
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                self.raise_if_failed()
            return task.result()
        finally:
            if not task.done():
                task.cancel()
                await asyncio.wait({task})

    def close(self) -> None:
        """End all calls."""
        for task in [*self._tasks.values(), *self._controls]:
            task.cancel()


def _looked_at(failed: asyncio.Future[None]) -> None:
    """The failure is told to those who ask; it is no error that nobody did."""
    if not failed.cancelled():
        failed.exception()
