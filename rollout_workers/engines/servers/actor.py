"""The Ray shell of an engine that is a server: one server process, driven over HTTP, behind the calls of `EngineActor`.

===========  ================================  =====================================  ==============================
task         consumes                          produces                               waits for
===========  ================================  =====================================  ==============================
requests     see `traffic.Traffic`             chunks for the clients                 the server, bounded by ``_probes``
``_watch``   the end of a process of it        the failure that `alive` ends with     the processes
``_probes``  answers to probes                 the same                               the server, ``PROBE_EVERY_S``
``stage``    a transport's offer               the server's shadow weights            the server, ``STAGE_S``
``commit``   a staged version                  the served version                     the server, its time-out
===========  ================================  =====================================  ==============================

Servers hold one version of the weights: `pin` is accepted and changes nothing. An evaluation is answered with what is
served, and its tokens say so.
"""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import cast

from experience.accounting import Account, Cause
from experience.books import clock, process_books
from experience.wire import decode, encode
from rollout_workers.engines.config import EnginesConfig
from rollout_workers.engines.lane import engine_lane
from rollout_workers.engines.protocol import EngineHealth, EngineRole, GenerateRequest, KvPolicy, PauseMode
from rollout_workers.engines.requests import refusal
from rollout_workers.engines.servers.adapter import Call, Launch, ServerAdapter, ServerCounters
from rollout_workers.engines.servers.bring_up import Server, ServerTimes, join_server, start_server
from rollout_workers.engines.servers.desk import HandoffDesk, SplitAdapter
from rollout_workers.engines.servers.environment import ROOT, check_environment, interpreter_of
from rollout_workers.engines.servers.errors import (
    ServerAnswerError,
    ServerDied,
    ServerFailed,
    ServerNotStarted,
    ServerNotThere,
    ServerRefused,
    ServerSilent,
    ServerUnreachable,
)
from rollout_workers.engines.servers.flights import ATTEMPTS, choose_kv, delay_before
from rollout_workers.engines.servers.http import ServerConnection
from rollout_workers.engines.servers.inner import end_of, inner_processes
from rollout_workers.engines.servers.process import ServerProcess, free_port
from rollout_workers.engines.servers.registry import make_adapter, server_settings
from rollout_workers.engines.servers.traffic import Traffic
from rollout_workers.submission import SubmitBatch

logger = logging.getLogger(__name__)

PROBE_EVERY_S = 2.0
PROBE_S = 5.0
"""How long a probe may take to be answered."""
HEALTH_S = 0.7
"""How long `health` waits for the server's own figures before it tells the last ones."""
STAGE_S = 600.0
HOST = "127.0.0.1"
ALL_IDS = 2**31


class ServerEngineActor:
    """One replica. ``index`` chooses among external servers; ``log_directory`` is where the server's output goes."""

    def __init__(
        self, name: str, config: EnginesConfig, log_directory: str | Path, index: int = 0, role: str = "mixed"
    ) -> None:
        self.name = name
        self._config = config
        self._settings = server_settings(config)
        self._adapter: ServerAdapter
        self._log = Path(log_directory) / f"{name}-{config.kind}.log"
        self._index = index
        self._role = role
        self._desk = HandoffDesk()
        self._loaded: tuple[Server, Traffic] | None = None
        self._paused = False
        self._moving = asyncio.Lock()
        self._counters = ServerCounters()
        self._answered_at = 0.0
        self._stall_s = 0.0
        self._watchers: list[asyncio.Task[None]] = []
        self._account: Account | None = None
        self._lane = engine_lane(self, name)

    async def endpoint(self) -> bytes:
        """Where `submit` and `collect` can be called over a socket (see `experience.transport.lane`)."""
        return await self._lane.endpoint()

    async def load(self, model_path: str | Path, dtype: str, threads: int, version: int) -> int:
        """Start (or find) the server; the weights on disk count as ``version``. Returns the bytes of the weights.

        Raises EnvironmentUnfit or ServerNotStarted; both name the cause in their first line.
        """
        settings = self._settings
        self._adapter = make_adapter(self._config, model_path)
        times = ServerTimes(settings.startup_timeout_s, settings.request_timeout_s)
        if settings.urls:
            url = settings.urls[self._index % len(settings.urls)]
            server = await join_server(self._adapter, url, self._config.max_len, times)
        else:
            server = await self._start(str(model_path), dtype, threads, version, times)
        try:
            await self._adopt(server, version)
        except BaseException:
            await server.close()
            raise
        traffic = Traffic(
            self._adapter,
            server.connection,
            version,
            self._config.stream_every,
            settings.request_timeout_s,
            self._refusing(Path(model_path)),
            self._charge,
            await self._open_desk(),
        )
        self._loaded = server, traffic
        self._answered_at = time.monotonic()
        self._account = process_books().account()
        self._charge()
        self._watchers = [asyncio.create_task(self._probes(traffic))]
        if server.process is not None:
            self._watchers.append(asyncio.create_task(self._watch(server.process, traffic)))
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
                kv_port=0 if self._role == "mixed" else free_port(HOST),
                python=str(python),
                plugin_path=str(ROOT),
            )

        return await start_server(self._adapter, launch_at, self._log, times)

    async def _open_desk(self) -> tuple[SplitAdapter, HandoffDesk] | None:
        if self._role == "mixed":
            return None
        await self._desk.open(HOST)
        return cast(SplitAdapter, self._adapter), self._desk

    async def kv_place(self) -> tuple[str, str]:
        """This engine's role, and where prefill engines leave word of KV for it (empty when it takes none)."""
        return self._role, self._desk.address

    def _refusing(self, model: Path) -> Callable[[GenerateRequest], str | None]:
        """What no server is asked for. Servers pin no version: a pinned one is answered with what is served."""
        vocabulary, max_len = vocabulary_of(model), self._config.max_len

        def refuse(request: GenerateRequest) -> str | None:
            pinned = set() if request.pinned_version is None else {request.pinned_version}
            return refusal(request, vocabulary, max_len, pinned)

        return refuse

    async def _adopt(self, server: Server, version: int) -> None:
        """Have the server name its weights ``version``; one that holds what another run gave it is refused."""
        adapter, connection = self._adapter, server.connection
        if server.process is None:
            try:
                served = adapter.parse_served(await connection.ask(adapter.served()))
            except (ServerAnswerError, ServerRefused):
                served = version  # nobody has named its weights yet: they are the ones it was started with
            if served != version and not rejoins(self.name):
                raise ServerNotStarted(
                    f"the server at {connection.url} holds version {served} of another run, and this one begins with "
                    f"version {version}: start the server again"
                )
        await connection.control(adapter, adapter.adopt(version))

    @property
    def _traffic(self) -> Traffic:
        assert self._loaded is not None, "load() comes first"
        return self._loaded[1]

    @property
    def _connection(self) -> ServerConnection:
        assert self._loaded is not None, "load() comes first"
        return self._loaded[0].connection

    async def submit(self, batch: bytes) -> bytes:
        """Take a batch of requests and aborts from one client (servers free by themselves what nobody uses).

        Returns an encoded `EngineLoad`. Raises what the server died of.
        """
        submitted = decode(batch, SubmitBatch)
        self._traffic.submit(submitted)
        return encode(self._traffic.clients.load(submitted.client, self._health()))

    async def forget_client(self, client: str) -> None:
        """A client is gone: its requests end."""
        self._traffic.forget(client)

    async def collect(self, client: str) -> bytes:
        """The chunks made for ``client`` since the last call; see `Traffic.collect`."""
        return await self._traffic.collect(client)

    # Weights

    async def stage(self, offer: bytes) -> int:
        """Have the server fetch a published version while requests go on. Returns the version."""
        from weight_sync.transports.protocol import decode_offer

        version = decode_offer(offer).manifest.version
        try:
            async with asyncio.timeout(STAGE_S):
                await self._control(self._adapter.stage(offer, self.name))
        except TimeoutError:
            raise ServerSilent(f"version {version} was not staged within {STAGE_S:.0f} s") from None
        return version

    async def commit(self, version: int, kv: str) -> int:
        """Switch to a staged version, requests kept. Returns the version that the server says it serves now."""
        traffic = self._traffic
        async with self._moving:
            policy = choose_kv(KvPolicy(kv), traffic.flights.values())
            began_at, waiting = time.monotonic(), bool(traffic.flights)
            if waiting and self._account is not None:
                self._account.switch(Cause.WEIGHT_STALL, clock())
            traffic.hold()
            try:
                await traffic.unless_failed(self._swap(version, policy))
            finally:
                traffic.let_go()
                self._charge()
                if waiting:
                    self._stall_s += time.monotonic() - began_at
        return traffic.version

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
            served = adapter.parse_served(await connection.ask(adapter.served()))
            self._traffic.switched(served, boundaries)
        finally:
            if not self._paused and not self._traffic.failed.done():
                await connection.control(adapter, adapter.resume())

    async def pin(self, version: int) -> None:
        """Accepted; the server answers with what it serves."""

    async def unpin(self, version: int) -> None:
        """See `pin`."""

    async def pause(self, keep: str) -> None:
        async with self._moving:
            self._paused = True
            await self._control(self._adapter.pause(PauseMode(keep)))

    async def resume(self) -> None:
        async with self._moving:
            await self._control(self._adapter.resume())
            self._paused = False
            self._traffic.let_go()

    async def _control(self, calls: list[Call]) -> None:
        """See `ServerConnection.control`. Raises also what the server dies of meanwhile."""
        await self._traffic.unless_failed(self._connection.control(self._adapter, calls))

    # How it is

    async def health(self) -> bytes:
        """An encoded `EngineHealth`. Raises ServerSilent if the server has answered nothing for too long."""
        traffic = self._traffic
        traffic.raise_if_failed()
        try:
            async with asyncio.timeout(HEALTH_S):
                self._counters = self._adapter.parse_metrics(await self._connection.ask(self._adapter.metrics()))
            self._answered_at = time.monotonic()
        except (TimeoutError, ServerFailed, ServerRefused, ServerUnreachable, ServerSilent, ServerAnswerError) as error:
            if self._silent_s > self._settings.request_timeout_s:
                raise ServerSilent(f"{self._adapter.name} has answered nothing for {self._silent_s:.0f} s") from error
            logger.debug("the server did not give its figures: %s", error)
        return encode(self._health())

    def _health(self) -> EngineHealth:
        """With the server's figures as last read."""
        counters, traffic = self._counters, self._traffic
        return EngineHealth(
            version=traffic.version,
            role=EngineRole(self._role),
            running=counters.running,
            waiting=counters.waiting,
            sessions=len({flight.request.session_id for flight in traffic.flights.values()}),
            kv_used=counters.kv_used,
            paused=self._paused,
            generated_tokens=counters.generated_tokens,
            prefill_tokens=counters.prefill_tokens,
            cached_tokens=counters.cached_tokens,
            evicted_sessions=counters.preemptions,
            stall_s=self._stall_s,
        )

    async def first_token_at(self) -> float | None:
        """Wall-clock time of the first sampled token of this process, if there was one."""
        return self._traffic.first_token_at

    async def node(self) -> str:
        """Host name of the machine that this engine runs on."""
        return socket.gethostname()

    async def server_pid(self) -> int | None:
        """Process id of the server; None for an external one."""
        process = self._loaded[0].process if self._loaded is not None else None
        return process.pid if process is not None else None

    async def alive(self) -> None:
        """Never returns while the server is well; ends with what it died of."""
        await asyncio.shield(self._traffic.failed)

    async def stop(self) -> None:
        """End the server if it is ours, and let go of it if it is not."""
        self._lane.close()
        self._desk.close()
        for watcher in self._watchers:
            watcher.cancel()
        if self._loaded is not None:
            server, traffic = self._loaded
            traffic.close()
            await server.close()

    async def _watch(self, process: ServerProcess, traffic: Traffic) -> None:
        """Notice the end of the server's process, or of one without which it is of no use, at once."""
        inner = await asyncio.to_thread(inner_processes, process.pid, self._adapter.inner)
        if not inner:
            logger.warning("no process %r below %s %d", self._adapter.inner, self._adapter.name, process.pid)
        traffic.fail(ServerDied(f"{self._adapter.name} died: {await end_of(process, inner)}"))

    async def _probes(self, traffic: Traffic) -> None:
        """Notice a server at whose address nothing listens any more, and one that answers nothing within
        `request_timeout_s`."""
        refused = 0
        while not traffic.failed.done():
            await asyncio.sleep(delay_before(refused + 1) if refused else PROBE_EVERY_S)
            refused = 0 if await self._probe(traffic) else refused + 1
            if refused == ATTEMPTS:
                traffic.fail(
                    ServerDied(f"{self._adapter.name} died: nothing listens at {self._connection.url} any more")
                )
            if traffic.is_open and not self._paused:
                traffic.end_silent(time.monotonic(), queueing=self._counters.waiting > 0)

    async def _probe(self, traffic: Traffic) -> bool:
        """Whether something listens."""
        listens = True
        try:
            async with asyncio.timeout(PROBE_S):
                reply = await self._connection.send(self._adapter.ready())
            if reply.status == 200:
                self._answered_at = time.monotonic()
        except (TimeoutError, ServerUnreachable, ServerSilent) as error:
            listens = not isinstance(error, ServerNotThere)
            logger.debug("the server did not answer a probe: %s", error)
        if self._silent_s > self._settings.request_timeout_s:
            traffic.fail(ServerDied(f"{self._adapter.name} has answered nothing for {self._silent_s:.0f} s"))
        return listens

    @property
    def _silent_s(self) -> float:
        return time.monotonic() - self._answered_at

    def _charge(self) -> None:
        """From now on the seconds belong to what the requests in flight are at."""
        if self._account is not None and self._traffic.is_open:
            self._account.switch(Cause.DECODE if self._traffic.flights else Cause.IDLE, clock())


def weight_bytes(model: Path) -> int:
    """Bytes of the weights in a model directory."""
    return sum(file.stat().st_size for file in model.glob("*.safetensors"))


def vocabulary_of(model: Path) -> int:
    """How many token ids the model in a directory knows; without a word about it in its ``config.json``, all there are."""
    try:
        config = json.loads((model / "config.json").read_text())
    except (OSError, ValueError):
        return ALL_IDS
    size = (config.get("text_config") or config).get("vocab_size")
    return size if isinstance(size, int) else ALL_IDS


def rejoins(name: str) -> bool:
    """Whether an engine (``engine-INDEX.ATTEMPT``) stands in for one that was lost."""
    return name.rpartition(".")[2] not in ("", "0")
