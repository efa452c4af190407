"""The Ray shell of an embedded engine: batched submission, long-polled results, staged weight updates.

The engine is stepped on the actor's own event loop, so that a step and a call never overlap and a weight swap lands
between two steps by construction. A torch engine steps as long as it has requests; a synthetic one sleeps until its
next event.

=============  =================================  =======================================  =========================
loop           consumes                           produces                                 waits for
=============  =================================  =======================================  =========================
``_run``       submitted requests                 chunks into the outbox of each client    ``_work`` (a submission),
                                                                                           the engine's next event
``collect``    the outbox of one client           one batch of chunks                      the outbox, or ``POLL_S``
``stage``      a transport's offer                the shadow weights                       the transport's time-out
=============  =================================  =======================================  =========================
"""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import msgspec

from experience.accounting import Account, Cause
from experience.books import clock, process_books
from experience.wire import decode, encode
from rollout_workers.engine_client import SubmitBatch
from rollout_workers.engines.clients import ClientBook
from rollout_workers.engines.config import EnginesConfig
from rollout_workers.engines.lane import engine_lane
from rollout_workers.engines.protocol import EngineHealth, EngineRole, KvPolicy, PauseMode, TokenChunk

logger = logging.getLogger(__name__)

POLL_S = 10.0

HEALTH_S = 0.1
"""For how long the engine's own figures are good enough to tell clients how busy it is."""


class EngineActor:
    """One embedded engine. Heavy libraries are imported in `load`, not when the process starts."""

    def __init__(self, name: str, config: EnginesConfig, role: EngineRole = EngineRole.MIXED) -> None:
        self.name = name
        self._config = config
        self._role = role
        self._station: Any = None
        """The hand-offs of KV, where prefill and decode are split."""
        self._engine: Any = None
        self._model_path = Path()
        self._receiver: Any = None
        self._outbox: dict[str, list[TokenChunk]] = defaultdict(list)
        self._ready: dict[str, asyncio.Event] = defaultdict(asyncio.Event)
        self._clients = ClientBook()
        self._health: tuple[float, EngineHealth] | None = None
        self._work = asyncio.Event()
        self._failed: asyncio.Future[None] | None = None
        self._runner: asyncio.Task[None] | None = None
        self._first_token_at: float | None = None
        self._account: Account | None = None
        self._lane = engine_lane(self, name)

    async def endpoint(self) -> bytes:
        """Where `submit` and `collect` can be called over a socket (see `experience.transport.lane`)."""
        return await self._lane.endpoint()

    async def load(self, model_path: str, dtype: str, threads: int, version: int) -> int:
        """Load model and tokenizer; the weights on disk count as ``version``. Returns the bytes of the weights."""
        self._model_path = Path(model_path)
        self._engine = await asyncio.to_thread(self._build, self._model_path, dtype, threads, version)
        self._failed = asyncio.get_running_loop().create_future()
        self._open_account()
        if self._config.split and self._config.kind == "torch":
            self._station = self._open_station()
        self._runner = asyncio.create_task(self._run())
        return int(self._engine.weight_bytes)

    def _open_account(self) -> None:
        """A lane of the timeline for the engine, or for each accelerator that a synthetic one models."""
        if self._config.kind == "synthetic":
            for accelerator in self._engine.accelerators:
                process_books().adopt(accelerator, accelerator.began_at)
        else:
            self._account = process_books().account(self._timeline_lane())

    def _timeline_lane(self) -> str:
        """Its name in the timeline; a role that may change is no part of it."""
        actor = process_books().actor
        fixed = self._role is not EngineRole.MIXED and self._config.roles == "fixed"
        return f"{actor}.{self._role.value}" if fixed else actor

    def _open_station(self) -> Any:
        from rollout_workers.disaggregation.station import KvStation

        station = KvStation(self._engine, self._config.handoff, own_address(), self._deliver, self._work.set)
        station.role = self._role
        return station

    async def set_role(self, role: str) -> None:
        """What clients send here from now on: prompts to compute for other engines, or requests to decode."""
        self._role = EngineRole(role)
        if self._station is not None:
            self._station.role = self._role

    async def kv_place(self) -> tuple[str, str]:
        """This engine's role, and where other engines send KV to (empty when it takes none)."""
        return self._role.value, self._station.address if self._station is not None else ""

    def _build(self, path: Path, dtype: str, threads: int, version: int) -> Any:
        if self._config.kind == "synthetic":
            from rollout_workers.engines.synthetic.driver import build_driver

            return build_driver(self._config, path, version, lane=self._timeline_lane())
        from rollout_workers.engines.torch_engine import build_engine

        return build_engine(self._config, path, dtype, threads, version)

    @property
    def _front(self) -> Any:
        """Who takes requests, aborts and releases."""
        return self._engine if self._station is None else self._station

    async def submit(self, batch_bytes: bytes) -> bytes:
        """Take a batch of requests, releases and aborts from one client. Returns an encoded `EngineLoad`."""
        batch = decode(batch_bytes, SubmitBatch)
        self._clients.took(batch)
        front = self._front
        for request_id in batch.aborts:
            front.abort(request_id)
        for session in batch.releases:
            front.release(session)
        for request in batch.requests:
            front.submit(request)
        self._work.set()
        return encode(self._clients.load(batch.client, self._recent_health()))

    async def forget_client(self, client: str) -> None:
        """A client is gone: its requests end, its sessions' KV is free."""
        requests, sessions = self._clients.forget(client)
        for request_id in requests:
            self._front.abort(request_id)
        for session in sessions:
            self._front.release(session)
        self._outbox.pop(client, None)
        self._ready.pop(client, None)
        self._work.set()

    def _recent_health(self) -> EngineHealth:
        now = clock()
        if self._health is None or now - self._health[0] > HEALTH_S:
            self._health = (now, self._engine.health())
        return self._health[1]

    async def collect(self, client: str) -> bytes:
        """The chunks made for ``client`` since the last call; waits up to ``POLL_S`` seconds for the first."""
        ready = self._ready[client]
        if not self._outbox[client]:
            ready.clear()
            try:
                await asyncio.wait_for(ready.wait(), POLL_S)
            except TimeoutError:
                return encode([])
        chunks, self._outbox[client] = self._outbox[client], []
        return encode(chunks)

    async def stage(self, offer: bytes) -> int:
        """Fetch a published version into the shadow weights while decoding goes on. Returns the version."""
        if self._receiver is None:
            self._receiver = self._make_receiver()
        began_at = time.monotonic()
        version: int = await asyncio.to_thread(self._fetch, offer)
        if self._config.kind == "synthetic":  # the modelled bytes take longer than the real ones
            await asyncio.sleep(self._engine.stage_s - (time.monotonic() - began_at))
        return version

    def _make_receiver(self) -> Any:
        if self._config.kind == "synthetic":
            return self._engine.make_receiver(self.name)
        from weight_sync.base_weights import BaseWeights
        from weight_sync.transports.select import AnyReceiver

        return AnyReceiver(self.name, device=self._engine.model.device, base=BaseWeights(self._model_path))

    def _fetch(self, offer: bytes) -> int:
        from weight_sync.transports.protocol import decode_offer

        version = decode_offer(offer).manifest.version
        self._engine.stage_begin(version)
        self._receiver.fetch(offer, self._engine.stage_tensor)
        self._engine.stage_end()
        return version

    async def commit(self, version: int, kv: str) -> int:
        """Swap to a staged version between two steps. Returns the version now served."""
        account = self._account
        if account is None:
            served: int = self._engine.commit(version, KvPolicy(kv))
        else:
            before = account.cause
            if self._engine.has_work:
                account.switch(Cause.WEIGHT_STALL, clock())
            served = self._engine.commit(version, KvPolicy(kv))
            account.switch(before, clock())
        if KvPolicy(kv) is KvPolicy.RECOMPUTE:
            self._clients.kv_drops += 1
        if self._station is not None:
            self._station.committed()
        self._work.set()
        return served

    async def pin(self, version: int) -> None:
        """Keep the weights of the served ``version`` for requests that ask for exactly it."""
        self._engine.pin(version)

    async def unpin(self, version: int) -> None:
        self._engine.unpin(version)

    async def pause(self, keep: str) -> None:
        self._engine.pause(PauseMode(keep))
        self._work.set()

    async def resume(self) -> None:
        self._engine.resume()
        self._work.set()

    async def health(self) -> bytes:
        """An encoded `EngineHealth`."""
        health: EngineHealth = self._engine.health()
        if self._station is not None:
            health = self._station.health(health)
        return encode(msgspec.structs.replace(health, role=self._role, finished=self._clients.finished))

    async def first_token_at(self) -> float | None:
        """Wall-clock time of the first sampled token of this process, if there was one."""
        return self._first_token_at

    async def node(self) -> str:
        """Host name of the machine that this engine runs on."""
        return socket.gethostname()

    async def node_id(self) -> str:
        """Ray's id of the node that this engine runs on."""
        import ray

        return str(ray.get_runtime_context().get_node_id())

    async def alive(self) -> None:
        """Never returns while the engine is well; ends with the engine's error, or with the process."""
        assert self._failed is not None, "load() comes first"
        await self._failed

    async def stop(self) -> None:
        """Let go of the transports' shared resources."""
        if self._runner is not None:
            self._runner.cancel()
        self._lane.close()
        if self._receiver is not None:
            self._receiver.close()
        if self._station is not None:
            self._station.close()

    async def _run(self) -> None:
        try:
            while True:
                await self._wait(self._delay())
                chunks = self._step()
                self._deliver(chunks if self._station is None else self._station.stepped(chunks))
                await asyncio.sleep(0)
        except asyncio.CancelledError:
            raise
        except Exception as error:
            logger.exception("engine %s failed", self.name)
            assert self._failed is not None
            self._failed.set_exception(error)

    def _step(self) -> list[TokenChunk]:
        """One step of the engine; a torch engine's is charged as its own counters split it."""
        account = self._account
        if account is None:
            made: list[TokenChunk] = self._engine.step()
            return made
        began_at, prefill_s = clock(), self._engine.counters.prefill_s
        chunks: list[TokenChunk] = self._engine.step()
        prefill_s = self._engine.counters.prefill_s - prefill_s
        if prefill_s > 0:
            account.switch(Cause.PREFILL, began_at)
        account.switch(Cause.DECODE, began_at + prefill_s)
        return chunks

    def _delay(self) -> float | None:
        """Seconds until the engine has something to do; None: not before the next call."""
        if self._config.kind == "synthetic":
            delay: float | None = self._engine.delay()
            return delay
        if not self._engine.has_work and self._account is not None:
            self._account.switch(Cause.IDLE, clock())
        return 0.0 if self._engine.has_work else None

    async def _wait(self, delay: float | None) -> None:
        """Until a call has changed something, at most ``delay`` seconds (None: however long that takes)."""
        if delay is None:
            self._work.clear()
            await self._work.wait()
        elif delay > 0:
            self._work.clear()
            try:
                async with asyncio.timeout(delay):
                    await self._work.wait()
            except TimeoutError:
                return

    def _deliver(self, chunks: list[TokenChunk]) -> None:
        for chunk in chunks:
            if self._first_token_at is None and len(chunk.tokens):
                self._first_token_at = time.time()
            ends = chunk.finish_reason is not None
            client = self._clients.ended(chunk.request_id) if ends else self._clients.client_of(chunk.request_id)
            if client is None:
                continue
            self._outbox[client].append(chunk)
            self._ready[client].set()


def own_address() -> str:
    """Where the processes of this run's other nodes reach this one."""
    import ray

    return str(ray.util.get_node_ip_address()) if ray.is_initialized() else "127.0.0.1"
