"""A worker's view of the engines: batched submission, streamed chunks, and continuation when an engine is lost.

Requests submitted while an earlier submission is on its way travel together in the next one; results come back through
one pending `collect` call per engine. A request whose engine died is sent to another one with the tokens it already has
as context and its remaining budget: no token is sampled twice.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence

import msgspec

from env_pool.pacing import in_slices
from experience.vitals import SUBMIT, process_vitals
from experience.wire import decode, encode
from rollout_workers.continuation import Relocation, joined, remaining
from rollout_workers.engines.protocol import EngineLoad, FinishReason, GenerateRequest, TokenChunk
from rollout_workers.errors import EngineFault
from rollout_workers.router import Router
from rollout_workers.submission import EngineHandle, EngineLine, Pending, RayEngineHandle, SubmitBatch, holders

__all__ = ["EngineClient", "EngineHandle", "RayEngineHandle", "SubmitBatch", "joined", "remaining"]

logger = logging.getLogger(__name__)

MAX_BATCH = 128
"""Requests that travel together, unless the run is in lock-step: the engine takes them in one turn of its event loop."""

MAX_RELEASES = 16
"""Releases that may wait for the next request to travel with, while requests are in flight."""

MAX_ABORTS = 8
"""Times in a row that engines may abort a request of their own accord before it got another token."""


class EngineClient:
    """Implements `rollout_workers.episode_context.Generator` over any number of engine actors.

    With ``barrier`` (lock-step, deterministic runs) a submission waits until ``barrier()`` says that every live episode
    is waiting for a generation, and is sorted by session: the batches that the engine sees do not depend on timing.
    """

    def __init__(
        self,
        client: str,
        engine_timeout_s: float = 120.0,
        barrier: Callable[[int], bool] | None = None,
        on_engine_lost: Callable[[str, BaseException], None] | None = None,
        on_load: Callable[[str, EngineLoad], None] | None = None,
    ) -> None:
        """``on_load`` hears of how busy an engine says it is, after each submission to it."""
        self.client = client
        self._timeout_s = engine_timeout_s
        self._barrier = barrier
        self._on_engine_lost = on_engine_lost
        self._on_load = on_load
        self._router = Router()
        self._engines: dict[str, EngineLine] = {}
        self._pending: dict[str, Pending] = {}
        self._of_session: dict[str, Pending] = {}
        self._held: list[Pending] = []
        self._held_releases: list[str] = []
        self._joined = asyncio.Event()
        self.continued = 0
        """Requests that went on elsewhere after their engine was lost, was drained or had aborted them."""
        self.losses: dict[str, Relocation] = {}
        """What became of the requests of each engine that was lost."""

    @property
    def in_flight(self) -> int:
        return len(self._pending)

    @property
    def sessions(self) -> int:
        """Sessions that have an engine."""
        return self._router.sessions

    @property
    def serving(self) -> Sequence[str]:
        """Engines that get new requests."""
        return self._router.members

    def engine_of(self, episode_id: str) -> str:
        """The engine that a request of this episode waits for; empty when there is none."""
        waiting = (p.engine for p in self._pending.values() if p.request.session_id.startswith(f"{episode_id}/"))
        return next(waiting, "")

    def add_engine(self, name: str, handle: EngineHandle, since: int = 0) -> None:
        """An engine that serves the current weights joins; ``since``: the version that it joined with."""
        if name in self._engines:
            return
        engine = EngineLine(handle, since=since)
        self._engines[name] = engine
        self._router.add(name)
        engine.tasks = [asyncio.create_task(self._send(name, engine)), asyncio.create_task(self._receive(name, engine))]
        self._joined.set()

    def remove_engine(self, name: str, cause: BaseException | None = None) -> None:
        """An engine left or died; its requests continue on the others, or wait for one to join."""
        engine = self._engines.get(name)
        if engine is None:
            return
        self._forget(name, engine)
        orphans = [pending for pending in self._pending.values() if pending.engine == name]
        self.losses[name] = Relocation(time.time(), (pending.request.request_id for pending in orphans))
        if cause is not None:
            logger.warning("engine %s lost (%s); %d requests continue elsewhere", name, cause, len(orphans))
            if self._on_engine_lost is not None:
                self._on_engine_lost(name, cause)
        for pending in orphans:
            self._go_on(pending)

    async def relocated(self, name: str, timeout_s: float) -> Relocation | None:
        """What became of the requests of an engine that was lost, once all of them have a place; None if there is nothing
        to tell. Raises TimeoutError when they have none within ``timeout_s``."""
        loss = self.losses.get(name)
        if loss is not None:
            async with asyncio.timeout(timeout_s):
                await loss.placed.wait()
        return loss

    async def drain_engine(self, name: str, grace_s: float) -> tuple[int, int]:
        """Take everything off an engine that is about to leave. Returns how many requests ended there, how many moved.

        It gets no new requests. Those in flight may end within ``grace_s`` seconds; the engine then aborts what is left,
        with the tokens it has, and that goes on elsewhere. The engine is forgotten when nothing of ours is there.
        """
        engine = self._engines.get(name)
        if engine is None:
            return 0, 0
        engine.draining = True
        self._router.remove(name)
        self._note_members()
        unsent, engine.requests = {request.request_id for request in engine.requests}, []
        here = [pending for pending in self._pending.values() if pending.engine == name]
        for pending in here:
            if pending.request.request_id in unsent:
                self._go_on(pending)
        self._check_empty(name)
        left: list[Pending] = []
        try:
            async with asyncio.timeout(grace_s):
                await engine.empty.wait()
        except TimeoutError:
            left = [pending for pending in here if pending.engine == name and not pending.future.done()]
            await self._take_off(name, engine, left)
        self._forget(name, engine)
        return len(here) - len(left) - len(unsent), len(left) + len(unsent)

    async def _take_off(self, name: str, engine: EngineLine, left: list[Pending]) -> None:
        """Have the engine abort what it still has; one that does not answer is treated as lost."""
        for pending in left:
            pending.leaving = True
            engine.aborts.append(pending.request.request_id)
        engine.wake.set()
        try:
            async with asyncio.timeout(self._timeout_s):
                await engine.empty.wait()
        except TimeoutError:
            self.remove_engine(name, TimeoutError(f"it did not let go of its requests within {self._timeout_s:.0f} s"))

    def _forget(self, name: str, engine: EngineLine) -> None:
        """The engine gets nothing more and is not listened to."""
        if self._engines.pop(name, None) is None:
            return
        self._router.remove(name)
        self._note_members()
        current = asyncio.current_task()
        for task in engine.tasks:
            if task is not current:
                task.cancel()
        engine.empty.set()

    def _note_members(self) -> None:
        """Those who wait for an engine wait for one that takes requests."""
        if not self._router.members:
            self._joined.clear()

    def _check_empty(self, name: str) -> None:
        engine = self._engines.get(name)
        if engine is not None and engine.draining and all(p.engine != name for p in self._pending.values()):
            engine.empty.set()

    def _go_on(self, pending: Pending) -> None:
        """Continue elsewhere, from the last token."""
        self.continued += 1
        left, pending.engine, pending.leaving = pending.engine, "", False
        self._router.finished(left)
        self._route(pending)
        self._check_empty(left)

    async def generate(self, request: GenerateRequest) -> TokenChunk:
        """All tokens of a request, in one chunk. Raises EngineFault when no engine served it in time."""
        future: asyncio.Future[TokenChunk] = asyncio.get_running_loop().create_future()
        pending = Pending(request, future)
        self._pending[request.request_id] = self._of_session[request.session_id] = pending
        try:
            if not self._router.members:
                await self._wait_for_engine()
            if self._barrier is None:
                self._route(pending)
            else:
                self._held.append(pending)
                self.check_barrier()
            return await future
        except asyncio.CancelledError:
            self._abort(pending)
            raise
        finally:
            del self._pending[request.request_id]
            if self._of_session.get(request.session_id) is pending:
                del self._of_session[request.session_id]
            self._router.finished(pending.engine)
            self._send_releases(pending.engine)
            self._check_empty(pending.engine)
            for loss in self.losses.values():
                loss.ended(request.request_id)

    def release(self, session_id: str) -> None:
        """The session is over: its engine may drop the KV. A request of it that is in flight is cancelled."""
        pending = self._of_session.get(session_id)
        if pending is not None and not pending.future.done():
            pending.future.cancel()
            self._abort(pending)  # now: sent along with the release, the request would open the session again
        if self._barrier is not None:
            self._held_releases.append(session_id)
            return
        self._release_now(session_id)

    def check_barrier(self) -> None:
        """Lock-step only: send what is held if every live episode waits for a generation (or none is alive)."""
        if self._barrier is None or not self._barrier(len(self._held)):
            return
        for session in sorted(self._held_releases):
            self._release_now(session)
        held = sorted(self._held, key=lambda pending: pending.request.session_id)
        self._held, self._held_releases = [], []
        for pending in held:
            self._route(pending)
        if not held:
            for name in self._engines:
                self._send_releases(name)

    async def close(self) -> None:
        for engine in self._engines.values():
            for task in engine.tasks:
                task.cancel()
        self._engines.clear()

    def _release_now(self, session_id: str) -> None:
        home = self._router.release(session_id)
        if home is not None and home in self._engines:
            self._engines[home].releases.append(session_id)
            if self._barrier is None:
                self._send_releases(home)

    def _send_releases(self, name: str) -> None:
        """Releases travel with requests; without any on their way they need not wait."""
        engine = self._engines.get(name)
        if engine is None or not engine.releases:
            return
        if len(engine.releases) >= MAX_RELEASES or not self._router.requests(name):
            engine.wake.set()

    async def _wait_for_engine(self) -> None:
        try:
            await asyncio.wait_for(self._joined.wait(), self._timeout_s)
        except TimeoutError:
            raise EngineFault(f"no inference engine was serving within {self._timeout_s:.0f} s") from None

    def _route(self, pending: Pending) -> None:
        """Send a request, or what is left of it, to the engine of its session."""
        if pending.future.done():  # cancelled, and its session released: it must not open it again
            return
        left = remaining(pending.request, pending.chunks)
        if left.max_tokens <= 0:
            whole = joined(pending.chunks)
            pending.future.set_result(msgspec.structs.replace(whole, finish_reason=FinishReason.LENGTH))
            return
        name, left = self._place(left)
        if name is None:
            pending.engine = ""
            waiter = asyncio.create_task(self._route_later(pending))
            pending.future.add_done_callback(lambda _: waiter.cancel())
            return
        pending.engine = name
        engine = self._engines[name]
        engine.requests.append(left)
        engine.wake.set()

    def _place(self, request: GenerateRequest) -> tuple[str | None, GenerateRequest]:
        """The engine that takes a request (None: there is none), and the request as it is sent there."""
        home = self._router.home(session := request.session_id)
        among = holders(self._engines, self._router.members, request)
        if among == []:  # all that held the version are gone: those that came after them answer, and the tokens say so
            among, request = None, msgspec.structs.replace(request, pinned_version=None)
        name = self._router.choose(session, len(request.prompt), request.prefix_group, among)
        if home is not None and home != name and home in self._engines:
            self._engines[home].releases.append(session)
            self._send_releases(home)
        return name, request

    async def _route_later(self, pending: Pending) -> None:
        try:
            await self._wait_for_engine()
        except EngineFault as fault:
            if not pending.future.done():
                pending.future.set_exception(fault)
            return
        self._route(pending)

    def _abort(self, pending: Pending) -> None:
        """Nobody waits for this request any more. It is aborted once, however often that is said."""
        if pending.given_up:
            return
        pending.given_up = True
        if pending in self._held:
            self._held.remove(pending)
        if (engine := self._engines.get(pending.engine)) is None:
            return
        unsent = [request for request in engine.requests if request.request_id != pending.request.request_id]
        if len(unsent) < len(engine.requests):
            engine.requests = unsent
            return
        engine.aborts.append(pending.request.request_id)
        engine.wake.set()

    async def _send(self, name: str, engine: EngineLine) -> None:
        """Submit whatever has gathered, one call at a time."""
        while True:
            await engine.wake.wait()
            engine.wake.clear()
            limit = MAX_BATCH if self._barrier is None else len(engine.requests)
            now, later = engine.requests[:limit], engine.requests[limit:]
            batch = SubmitBatch(client=self.client, requests=now, releases=engine.releases, aborts=engine.aborts)
            engine.requests, engine.releases, engine.aborts = later, [], []
            if later:
                engine.wake.set()
            self._observe(batch.requests)
            try:
                load = await engine.handle.submit(encode(batch))
            except asyncio.CancelledError:
                raise
            except Exception as error:  # noqa: BLE001 - whatever the transport raises, the engine is unusable
                self.remove_engine(name, error)
                return
            for loss in self.losses.values():
                loss.took(request.request_id for request in batch.requests)
            if load is not None and self._barrier is None:
                self._heard(name, decode(load, EngineLoad))

    def _heard(self, name: str, load: EngineLoad) -> None:
        """An engine has told how busy it is."""
        self._router.report(name, load.sessions - load.own_sessions, load.requests - load.own_requests)
        if self._on_load is not None:
            self._on_load(name, load)

    def _observe(self, requests: list[GenerateRequest]) -> None:
        """Note how long new requests waited for the submission before theirs (continued ones are not new)."""
        vitals, now = process_vitals(), time.monotonic()
        for request in requests:
            pending = self._pending.get(request.request_id)
            if pending is not None and pending.request is request:
                vitals.observe(SUBMIT, now - pending.asked_at)

    async def _receive(self, name: str, engine: EngineLine) -> None:
        while True:
            try:
                chunks = decode(await engine.handle.collect(self.client), list[TokenChunk])
            except asyncio.CancelledError:
                raise
            except Exception as error:  # noqa: BLE001 - whatever the transport raises, the engine is unusable
                self.remove_engine(name, error)
                return
            async for chunk in in_slices(chunks):
                self._accept(name, chunk)

    def _accept(self, name: str, chunk: TokenChunk) -> None:
        pending = self._pending.get(chunk.request_id)
        if pending is None or pending.engine != name or pending.future.done():
            return
        pending.chunks.append(chunk)
        if chunk.finish_reason is FinishReason.ABORT:
            self._was_aborted(pending, chunk)
        elif chunk.finish_reason is not None:
            pending.future.set_result(joined(pending.chunks))

    def _was_aborted(self, pending: Pending, chunk: TokenChunk) -> None:
        """By the engine: whoever waits for this request has not given it up, so it goes on."""
        pending.fruitless = 0 if len(chunk.tokens) or pending.leaving else pending.fruitless + 1
        if pending.fruitless > MAX_ABORTS:
            fault = EngineFault(f"engines aborted a request {pending.fruitless} times, {pending.engine} was the last")
            pending.future.set_exception(fault)
        else:
            self._go_on(pending)
