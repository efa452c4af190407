"""The Ray shell of an engine that is a server: one server process, driven over HTTP, behind the calls of `EngineActor`.

=============  ===============================  ======================================  ==================================
task           consumes                         produces                                waits for
=============  ===============================  ======================================  ==================================
``_fly``       one request (a stream each)      chunks into the outbox of its client    the server; bounded by ``_watch``
``_watch``     the process's end, the probes    the failure that `alive` ends with      the process, ``PROBE_EVERY_S``
``collect``    the outbox of one client         one batch of chunks                     the outbox, or ``POLL_S``
``stage``      a transport's offer              the server's shadow weights             the server, ``STAGE_S``
``commit``     a staged version                 the served version                      the server, ``request_timeout_s``
=============  ===============================  ======================================  ==================================

Servers hold one version of the weights: `pin` is accepted and changes nothing. An evaluation is answered with what is
served, and its tokens say so.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from experience.accounting import Account, Cause
from experience.books import clock, process_books
from experience.wire import decode, encode
from rollout_workers.engine_client import SubmitBatch
from rollout_workers.engines.config import EnginesConfig
from rollout_workers.engines.protocol import (
    EngineHealth,
    FinishReason,
    GenerateRequest,
    KvPolicy,
    PauseMode,
    TokenChunk,
)
from rollout_workers.engines.servers.adapter import Launch, ServerAdapter, ServerCounters, StreamParser
from rollout_workers.engines.servers.bring_up import Server, ServerTimes, join_server, start_server
from rollout_workers.engines.servers.environment import ROOT, check_environment, interpreter_of
from rollout_workers.engines.servers.errors import (
    ServerAnswerError,
    ServerDied,
    ServerFailed,
    ServerNotStarted,
    ServerRefused,
    ServerSilent,
    ServerUnreachable,
)
from rollout_workers.engines.servers.flights import Flight, Patience, Verdict, choose_kv, delay_before
from rollout_workers.engines.servers.registry import make_adapter, server_settings

logger = logging.getLogger(__name__)

POLL_S = 10.0
PROBE_EVERY_S = 2.0
HEALTH_S = 0.7
"""How long `health` waits for the server's own figures before it tells the last ones."""
ABORT_S = 5.0
"""How long a server has to end an aborted request with the tokens that it has."""
STAGE_S = 600.0
HOST = "127.0.0.1"


class ServerEngineActor:
    """One replica. ``index`` chooses among external servers; ``log_directory`` is where the server's output goes."""

    def __init__(
        self, name: str, config: EnginesConfig, log_directory: str | Path, index: int = 0, role: str = "mixed"
    ) -> None:
        self.name = name
        self._config = config
        self._settings = server_settings(config)
        self._adapter: ServerAdapter = make_adapter(config)
        self._log = Path(log_directory) / f"{name}-{config.kind}.log"
        self._index = index
        self._role = role
        self._server: Server | None = None
        self._version = -1
        self._paused = False
        self._open = asyncio.Event()
        """Cleared during a commit: a new request must not meet one version's name and another one's weights."""
        self._open.set()
        self._moving = asyncio.Lock()
        self._flights: dict[str, Flight] = {}
        self._parsers: dict[str, StreamParser] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._controls: set[asyncio.Task[None]] = set()
        self._outbox: dict[str, list[TokenChunk]] = defaultdict(list)
        self._ready: dict[str, asyncio.Event] = defaultdict(asyncio.Event)
        self._patience = Patience()
        self._counters = ServerCounters()
        self._answered_at = 0.0
        self._unpaused_at = 0.0
        self._stall_s = 0.0
        self._failed: asyncio.Future[None] | None = None
        self._watcher: asyncio.Task[None] | None = None
        self._first_token_at: float | None = None
        self._account: Account | None = None

    async def load(self, model_path: str, dtype: str, threads: int, version: int) -> int:
        """Start (or find) the server; the weights on disk count as ``version``. Returns the bytes of the weights.

        Raises EnvironmentUnfit or ServerNotStarted; both name the cause in their first line.
        """
        times = ServerTimes(self._settings.startup_timeout_s, self._settings.request_timeout_s)
        if self._settings.urls:
            url = self._settings.urls[self._index % len(self._settings.urls)]
            self._server = await join_server(self._adapter, url, self._config.max_len, times)
        else:
            self._server = await self._start(str(model_path), dtype, threads, version, times)
        await self._adopt(version)
        self._failed = asyncio.get_running_loop().create_future()
        self._failed.add_done_callback(lambda failed: failed.exception())  # told by `alive`, if anybody asks
        self._answered_at = time.monotonic()
        self._account = process_books().account()
        self._account.switch(Cause.IDLE, clock())
        self._watcher = asyncio.create_task(self._watch())
        return weight_bytes(Path(model_path))

    async def _start(self, model_path: str, dtype: str, threads: int, version: int, times: ServerTimes) -> Server:
        python = interpreter_of(self._config.kind, self._settings.python)
        await check_environment(python, self._adapter)
        config = self._config

        def launch_at(port: int) -> Launch:
            return Launch(
                model_path=model_path,
                host=HOST,
                port=port,
                member=self.name,
                version=version,
                dtype=dtype or config.dtype,
                device=config.device,
                max_len=config.max_len,
                slots=config.slots,
                prefill_tokens=config.prefill_tokens,
                stream_every=config.stream_every,
                threads=threads or config.threads,
                role=self._role,
                python=str(python),
                plugin_path=str(ROOT),
            )

        return await start_server(self._adapter, launch_at, self._settings.env, self._log, times)

    async def _adopt(self, version: int) -> None:
        """Have the server name its weights ``version``; one that holds other weights of Millrace is refused."""
        connection = self._connection
        if self._server is not None and self._server.process is None:
            try:
                served = self._adapter.parse_served(await connection.ask(self._adapter.served()))
            except (ServerAnswerError, ServerRefused):
                served = version  # it has never been given weights
            if served != version and not _rejoins(self.name):
                raise ServerNotStarted(
                    f"the server at {connection.url} holds version {served} of another run, and this one begins with "
                    f"version {version}: start the server again"
                )
        await connection.control(self._adapter, self._adapter.adopt(version))
        self._version = version

    async def submit(self, batch_bytes: bytes) -> None:
        """Take a batch of requests, releases and aborts from one client. Raises what the server died of."""
        self._raise_if_failed()
        batch = decode(batch_bytes, SubmitBatch)
        for request_id in batch.aborts:
            self._abort(request_id)
        for request in batch.requests:
            self._submit(batch.client, request)

    def _submit(self, client: str, request: GenerateRequest) -> None:
        if request.request_id in self._flights:
            raise ValueError(f"request {request.request_id} is already in flight")
        flight = Flight(request, client, self._config.stream_every, time.monotonic())
        self._flights[request.request_id] = flight
        task = asyncio.create_task(self._fly(flight))
        self._tasks[request.request_id] = task
        self._charge()

    async def collect(self, client: str) -> bytes:
        """The chunks made for ``client`` since the last call; waits up to ``POLL_S`` seconds for the first.

        Raises what the server died of, once everything that it had made is collected.
        """
        ready = self._ready[client]
        if not self._outbox[client]:
            self._raise_if_failed()
            ready.clear()
            try:
                await asyncio.wait_for(ready.wait(), POLL_S)
            except TimeoutError:
                return encode([])
        chunks, self._outbox[client] = self._outbox[client], []
        if not chunks:
            self._raise_if_failed()
        return encode(chunks)

    # One request

    async def _fly(self, flight: Flight) -> None:
        """Until the request has its last chunk, or the server is given up."""
        try:
            while True:
                failure = await self._attempt(flight)
                if failure is None:
                    return
                verdict = self._patience.judge(failure, flight.attempt)
                logger.warning("request %s, attempt %d: %s", flight.request_id, flight.attempt, failure)
                if verdict is Verdict.FAIL:
                    self._deliver(flight.client, [flight.end(FinishReason.ERROR, str(failure))])
                    return
                if verdict is Verdict.DEAD:
                    self._fail(ServerDied(f"{self._adapter.name} fails again and again: {failure}"))
                    return
                await asyncio.sleep(delay_before(flight.attempt + 1))
        except asyncio.CancelledError:
            if flight.aborted:
                self._deliver(flight.client, [flight.end(FinishReason.ABORT)])
                return
            raise
        except Exception as error:
            logger.exception("request %s", flight.request_id)
            self._deliver(flight.client, [flight.end(FinishReason.ERROR, f"{type(error).__name__}: {error}")])
        finally:
            self._flights.pop(flight.request_id, None)
            self._tasks.pop(flight.request_id, None)
            self._charge()

    async def _attempt(self, flight: Flight) -> Exception | None:
        """One call for what is left of a request. Returns why it failed; None when the request is over."""
        await self._open.wait()
        request = flight.begin(time.monotonic())
        if request is None:
            self._deliver(flight.client, [flight.end(FinishReason.LENGTH)])
            return None
        try:
            await self._stream(flight, request)
        except (ServerRefused, ServerFailed, ServerUnreachable, ServerAnswerError) as error:
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
            return ServerSilent(f"not a byte for {flight.request_id} in {self._settings.request_timeout_s:g} s")
        finally:
            self._parsers.pop(flight.request_id, None)
        self._patience.served()
        return None

    async def _stream(self, flight: Flight, request: GenerateRequest) -> None:
        adapter = self._adapter
        parser = adapter.parser(request, self._version)
        self._parsers[flight.request_id] = parser
        finished = False
        async with self._connection.stream(adapter.generate(request, self._version)) as (status, body):
            if status != 200:
                text = b"".join([part async for part in body][:64])
                kind = ServerRefused if 400 <= status < 500 else ServerFailed
                raise kind(adapter.refusal(status, text))
            if flight.aborted:
                self._control(self._ask_abort(request.request_id))
            async for data in body:
                flight.heard_at = time.monotonic()
                finished |= self._take(flight, parser.feed(data))
        finished |= self._take(flight, parser.finish())
        if not finished:
            raise ServerAnswerError("the answer ended without a finish reason")

    def _take(self, flight: Flight, chunks: list[TokenChunk]) -> bool:
        """Whether the last chunk was among them."""
        self._deliver(flight.client, flight.take(chunks))
        return any(chunk.finish_reason is not None for chunk in chunks)

    def _deliver(self, client: str, chunks: list[TokenChunk]) -> None:
        if not chunks:
            return
        if self._first_token_at is None and any(len(chunk.tokens) for chunk in chunks):
            self._first_token_at = time.time()
        self._outbox[client].extend(chunks)
        self._ready[client].set()

    def _abort(self, request_id: str) -> None:
        """Ask the server to end a request; one that does not within ``ABORT_S`` is ended here."""
        flight = self._flights.get(request_id)
        if flight is None or flight.aborted:
            return
        flight.aborted = True
        task = self._tasks[request_id]
        if request_id not in self._parsers:
            task.cancel()  # not sent yet
            return
        server_id = request_id if flight.attempt == 1 else f"{request_id}~{flight.attempt}"
        self._control(self._ask_abort(server_id))
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

    def _control(self, call: Any) -> None:
        """Make a call beside the rest; its failure is logged."""
        task: asyncio.Task[None] = asyncio.create_task(call)
        self._controls.add(task)

        def ended(done: asyncio.Task[None]) -> None:
            self._controls.discard(done)
            if not done.cancelled() and (error := done.exception()) is not None:
                logger.warning("%s", error)

        task.add_done_callback(ended)

    # Weights

    async def stage(self, offer: bytes) -> int:
        """Have the server fetch a published version while requests go on. Returns the version."""
        from weight_sync.transports.protocol import decode_offer

        version = decode_offer(offer).manifest.version
        try:
            async with asyncio.timeout(STAGE_S):
                await self._connection.control(self._adapter, self._adapter.stage(offer, self.name))
        except TimeoutError:
            raise ServerSilent(f"version {version} was not staged within {STAGE_S:.0f} s") from None
        return version

    async def commit(self, version: int, kv: str) -> int:
        """Switch to a staged version, requests kept. Returns the version that the server says it serves now."""
        policy = choose_kv(KvPolicy(kv), self._flights.values())
        async with self._moving:
            began_at, waiting = time.monotonic(), bool(self._flights)
            self._open.clear()
            self._stalled(waiting)
            try:
                await self._swap(version, policy)
            finally:
                self._open.set()
                self._unpaused_at = time.monotonic()
                self._charge()
                if waiting:
                    self._stall_s += time.monotonic() - began_at
        return self._version

    async def _swap(self, version: int, kv: KvPolicy) -> None:
        adapter, connection = self._adapter, self._connection
        keep = PauseMode.KEEP_KV if kv is KvPolicy.KEEP else PauseMode.KEEP_REQUESTS
        try:
            await connection.control(adapter, adapter.pause(keep))
            boundaries: dict[str, int] = {}
            for call in adapter.commit(version, kv):
                body = await connection.ask(call)
                adapter.check(call, body)
                boundaries |= adapter.boundaries(call, body)
            self._version = adapter.parse_served(await connection.ask(adapter.served()))
            for request_id, parser in list(self._parsers.items()):
                flight = self._flights[request_id]
                server_id = request_id if flight.attempt == 1 else f"{request_id}~{flight.attempt}"
                self._take(flight, parser.switched(self._version, boundaries.get(server_id)))
        finally:
            if not self._paused:
                await connection.control(adapter, adapter.resume())

    async def pin(self, version: int) -> None:
        """Accepted; the server answers with what it serves."""

    async def unpin(self, version: int) -> None:
        """See `pin`."""

    async def pause(self, keep: str) -> None:
        async with self._moving:
            self._paused = True
            await self._connection.control(self._adapter, self._adapter.pause(PauseMode(keep)))

    async def resume(self) -> None:
        async with self._moving:
            await self._connection.control(self._adapter, self._adapter.resume())
            self._paused = False
            self._unpaused_at = time.monotonic()

    # How it is

    async def health(self) -> bytes:
        """An encoded `EngineHealth`. Raises ServerSilent if the server has answered nothing for too long."""
        self._raise_if_failed()
        try:
            async with asyncio.timeout(HEALTH_S):
                await self._read_counters()
        except (TimeoutError, ServerFailed, ServerRefused, ServerUnreachable, ServerSilent, ServerAnswerError) as error:
            silent_s = time.monotonic() - self._answered_at
            if silent_s > self._settings.request_timeout_s:
                raise ServerSilent(f"{self._adapter.name} has answered nothing for {silent_s:.0f} s") from error
            logger.debug("the server did not give its figures: %s", error)
        counters = self._counters
        return encode(
            EngineHealth(
                version=self._version,
                running=counters.running,
                waiting=max(counters.waiting, len(self._flights) - counters.running),
                sessions=len({flight.request.session_id for flight in self._flights.values()}),
                kv_used=counters.kv_used,
                paused=self._paused,
                generated_tokens=counters.generated_tokens,
                prefill_tokens=counters.prefill_tokens,
                cached_tokens=counters.cached_tokens,
                evicted_sessions=counters.preemptions,
                stall_s=self._stall_s,
            )
        )

    async def _read_counters(self) -> None:
        adapter = self._adapter
        self._counters = adapter.parse_metrics(await self._connection.ask(adapter.metrics()))
        self._answered_at = time.monotonic()

    async def first_token_at(self) -> float | None:
        """Wall-clock time of the first sampled token of this process, if there was one."""
        return self._first_token_at

    async def node(self) -> str:
        """Host name of the machine that this engine runs on."""
        return socket.gethostname()

    async def server_pid(self) -> int | None:
        """Process id of the server; None for an external one."""
        process = self._server.process if self._server is not None else None
        return process.pid if process is not None else None

    async def alive(self) -> None:
        """Never returns while the server is well; ends with what it died of."""
        assert self._failed is not None, "load() comes first"
        await asyncio.shield(self._failed)

    async def stop(self) -> None:
        """End the server if it is ours, and let go of it if it is not."""
        for task in [self._watcher, *self._tasks.values(), *self._controls]:
            if task is not None:
                task.cancel()
        if self._server is not None:
            await self._server.close()

    async def _watch(self) -> None:
        """Notice the end of the process at once, and a server that answers nothing within `request_timeout_s`."""
        server = self._server
        assert server is not None
        ended = asyncio.create_task(server.process.ended.wait() if server.process is not None else _never())
        try:
            while not self._has_failed:
                done, _ = await asyncio.wait({ended}, timeout=PROBE_EVERY_S)
                if done and server.process is not None:
                    self._fail(ServerDied(f"{self._adapter.name} died: {server.process.cause()}"))
                    return
                await self._probe()
                self._end_silent(time.monotonic())
        finally:
            ended.cancel()

    async def _probe(self) -> None:
        try:
            async with asyncio.timeout(PROBE_EVERY_S):
                reply = await self._connection.send(self._adapter.ready())
            if reply.status == 200:
                self._answered_at = time.monotonic()
        except (TimeoutError, ServerUnreachable, ServerSilent) as error:
            logger.debug("the server did not answer a probe: %s", error)
        silent_s = time.monotonic() - self._answered_at
        if silent_s > self._settings.request_timeout_s:
            self._fail(ServerDied(f"{self._adapter.name} has not answered for {silent_s:.0f} s"))

    def _end_silent(self, now: float) -> None:
        """Give up calls of which nothing was heard; those that wait in the server's own queue may."""
        if self._paused or not self._open.is_set():
            return
        for request_id, flight in list(self._flights.items()):
            queued = flight.tokens == 0 and self._counters.waiting > 0
            heard_at = max(flight.heard_at, self._unpaused_at)
            if request_id in self._parsers and not queued and now - heard_at > self._settings.request_timeout_s:
                flight.silent = True
                self._tasks[request_id].cancel()

    def _fail(self, error: ServerDied) -> None:
        """The server is of no use any more: everybody who asks is told."""
        if self._failed is None or self._failed.done():
            return
        logger.error("%s", error)
        self._failed.set_exception(error)
        for flight in list(self._flights.values()):
            self._deliver(flight.client, flight.flush())
        for task in list(self._tasks.values()):
            if task is not asyncio.current_task():
                task.cancel()
        for ready in self._ready.values():
            ready.set()

    @property
    def _has_failed(self) -> bool:
        return self._failed is not None and self._failed.done()

    def _raise_if_failed(self) -> None:
        if self._failed is not None and self._failed.done():
            self._failed.result()

    @property
    def _connection(self) -> Any:
        assert self._server is not None, "load() comes first"
        return self._server.connection

    def _stalled(self, waiting: bool) -> None:
        if self._account is not None and waiting:
            self._account.switch(Cause.WEIGHT_STALL, clock())

    def _charge(self) -> None:
        """From now on the seconds belong to what the requests in flight are at."""
        if self._account is None or not self._open.is_set():
            return
        cause = Cause.DECODE if self._flights else Cause.IDLE
        self._account.switch(cause, clock())


def weight_bytes(model: Path) -> int:
    """Bytes of the weights in a model directory."""
    return sum(file.stat().st_size for file in model.glob("*.safetensors"))


def _rejoins(name: str) -> bool:
    """Whether an engine (``engine-INDEX.ATTEMPT``) stands in for one that was lost."""
    return name.rpartition(".")[2] not in ("", "0")


async def _never() -> bool:
    await asyncio.Event().wait()
    return True
