"""The environment actor: hosts any number of environments in one process.

A plain class; the orchestrator makes it a Ray actor. Synchronous environment code runs on the threads of a
:class:`~env_pool.runner.Runner`, asynchronous code on the actor's event loop, both under the call's time-out. Whatever
goes wrong in environment code comes back as data; no method raises because of it.
"""

from __future__ import annotations

import asyncio
import logging
import os
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from inspect import isawaitable, iscoroutinefunction
from time import monotonic
from typing import Any

from env_pool.batches import BatchServer, batch_lane
from env_pool.calls import Call, CallResult, FaultRecord, Method, Started
from env_pool.config import EnvironmentsConfig
from env_pool.environment import Environment, StepResult, ToolEnvironment, as_observation
from env_pool.errors import EnvironmentFault
from env_pool.noise import NOISE_TEXT, draw_noise, drop_field
from env_pool.registry import load_environment
from env_pool.runner import HungError, Runner, within
from experience.accounting import Cause
from experience.books import clock, process_books
from experience.wire import decode, encode

logger = logging.getLogger(__name__)

EXIT_EXHAUSTED = 70
TRACEBACK_CHARS = 2000
_REPLIES_LEAVE_S = 1.0


@dataclass(eq=False)
class _Hosted:
    """An environment in use."""

    environment: Environment
    client: str
    seed: int
    used_at: float


class EnvironmentActor:
    """Serves :class:`~env_pool.calls.Call` batches of any number of clients."""

    def __init__(
        self, config: EnvironmentsConfig, index: int = 0, exit_process: Callable[[int], Any] = os._exit
    ) -> None:
        self._config = config
        self._index = index
        self._exit_process = exit_process
        self._runner = Runner(f"environments-{index}")
        self._server = BatchServer(self._handle)
        self._lane = batch_lane(self, f"environment actor {index}")
        self._hosted: dict[str, _Hosted] = {}
        self._classes: dict[str, asyncio.Future[type[Environment]]] = {}
        self._closing: set[asyncio.Future[bytes]] = set()
        self._swept_at = monotonic()
        self._calls = 0
        self._faults = 0
        self._hung = 0
        self._retiring = False
        self._account = process_books().account()
        self._account.switch(Cause.IDLE, clock())
        self._in_progress = 0

    async def endpoint(self) -> bytes:
        """Where calls can be made over a socket (see :mod:`experience.transport.lane`)."""
        return await self._lane.endpoint()

    async def call_many(self, payload: bytes) -> bytes:
        """A batch of calls; see :mod:`env_pool.batches`."""
        self._sweep(monotonic())
        return await self._server.call_many(payload)

    async def collect(self, client: str) -> bytes:
        """Late results of a client; see :mod:`env_pool.batches`."""
        return await self._server.collect(client)

    async def forget_client(self, client: str) -> int:
        """Close what a dead worker left behind; returns how many environments that were."""
        self._server.forget(client)
        closing = self._drop([lease for lease, hosted in self._hosted.items() if hosted.client == client])
        await asyncio.gather(*closing)
        return len(closing)

    async def health(self) -> dict[str, Any]:
        """``leases`` now open, and ``calls``, ``faults`` and ``hung`` environments so far; ``healthy``; ``pid``."""
        return {
            "index": self._index,
            "leases": len(self._hosted),
            "calls": self._calls,
            "faults": self._faults,
            "hung": self._hung,
            "healthy": not self._retiring,
            "pid": os.getpid(),
        }

    async def _handle(self, client: str, body: bytes) -> bytes:
        call = decode(body, Call)
        self._calls += 1
        if call.method not in (Method.RESET, Method.RESTORE) and call.lease not in self._hosted:
            return encode(CallResult(missing=True))
        self._in_progress += 1
        self._account.switch(Cause.ENVIRONMENT, clock())
        try:
            return encode(CallResult(value=encode(await self._perform(client, call))))
        except EnvironmentFault as fault:
            self._faults += 1
            return encode(
                CallResult(
                    fault=FaultRecord(
                        environment=fault.environment, method=fault.method, reason=fault.reason, detail=fault.detail
                    )
                )
            )
        finally:
            self._in_progress -= 1
            if not self._in_progress:
                self._account.switch(Cause.IDLE, clock())

    async def _perform(self, client: str, call: Call) -> Any:
        if call.method in (Method.RESET, Method.RESTORE):
            return await self._begin(client, call)
        hosted = self._hosted[call.lease]
        hosted.used_at = monotonic()
        match call.method:
            case Method.STEP:
                return await self._step(hosted, call)
            case Method.OUTCOME:
                return _expect(
                    dict, await self._run(hosted.environment, call, hosted.environment.outcome), hosted, call
                )
            case Method.SNAPSHOT:
                return await self._run(hosted.environment, call, hosted.environment.snapshot)
            case _:
                del self._hosted[call.lease]
                return await self._run(hosted.environment, call, hosted.environment.close)

    async def _begin(self, client: str, call: Call) -> Started | None:
        if call.task is None:
            raise EnvironmentFault("", call.method, "the call carries no task")
        kind = await self._load(call.task.environment, call)
        environment = await self._run(kind, call, kind)
        hosted = _Hosted(environment, client, call.seed, monotonic())
        self._hosted[call.lease] = hosted
        if call.method is Method.RESTORE:
            await self._run(environment, call, partial(environment.restore, call.task, call.state))
            return None
        first = await self._run(environment, call, partial(environment.reset, call.task))
        try:
            return Started(observation=as_observation(environment, first), deterministic=kind.deterministic)
        except TypeError as error:
            raise EnvironmentFault(kind.name or kind.__name__, call.method, str(error)) from error

    async def _load(self, name: str, call: Call) -> type[Environment]:
        """The class; imported once, off the loop, however many ask for it meanwhile."""
        if name not in self._classes:
            self._classes[name] = self._runner.submit(partial(load_environment, name), call.timeout_s)
        try:
            return await asyncio.shield(self._classes[name])
        except Exception as error:  # the import ran the user's module: anything may come out of it
            self._classes.pop(name, None)
            raise EnvironmentFault(name, "import", f"{type(error).__name__}: {error}", _tail(error)) from error

    async def _step(self, hosted: _Hosted, call: Call) -> StepResult:
        environment = hosted.environment
        noise = draw_noise(self._config.noise, hosted.seed, call.step)
        if noise in NOISE_TEXT:
            text = NOISE_TEXT[noise]
            shown = environment.render_error(text) if isinstance(environment, ToolEnvironment) else f"error: {text}"
            return StepResult(observation=shown)
        found = await self._run(environment, call, partial(environment.step, call.action))
        result: StepResult = _expect(StepResult, found, hosted, call)
        if noise == "missing_field" and result.observation:
            result.observation = drop_field(result.observation, hosted.seed, call.step)
        return result

    async def _run(self, owner: Environment | type[Environment], call: Call, function: Callable[[], Any]) -> Any:
        """Call environment code, on a thread or on the loop as it is written, within the call's time-out."""
        code = function.func if isinstance(function, partial) else function
        try:
            if iscoroutinefunction(code):
                return await within(function(), call.timeout_s)
            value = await self._runner.submit(function, call.timeout_s)
            return await within(value, call.timeout_s) if isawaitable(value) else value
        except Exception as error:  # user code: anything may come out of it
            reason = f"{type(error).__name__}: {error}"
            if isinstance(error, HungError):
                reason = f"hung: {error}"
                self._give_up(call)
            name = owner.name or (owner if isinstance(owner, type) else type(owner)).__name__
            detail = "" if isinstance(error, HungError) else _tail(error)
            raise EnvironmentFault(name, call.method, reason, detail) from error

    def _give_up(self, call: Call) -> None:
        """The environment hung: it is never called again, and enough threads lost that way end the process."""
        self._hosted.pop(call.lease, None)
        self._hung += 1
        if self._runner.hung >= self._config.max_hung and not self._retiring:
            self._retiring = True
            logger.error("environment actor %d: %d threads hang, it ends itself", self._index, self._runner.hung)
            asyncio.get_running_loop().call_later(_REPLIES_LEAVE_S, self._exit_process, EXIT_EXHAUSTED)

    def _sweep(self, now: float) -> None:
        if now - self._swept_at > self._config.idle_lease_s / 10:
            self._swept_at = now
            limit = now - self._config.idle_lease_s
            if closing := self._drop([lease for lease, hosted in self._hosted.items() if hosted.used_at < limit]):
                logger.warning("environment actor %d: closes %d environments nobody used", self._index, len(closing))

    def _drop(self, leases: list[str]) -> list[asyncio.Future[bytes]]:
        started: list[asyncio.Future[bytes]] = []
        for lease in leases:
            call = Call(lease=lease, method=Method.CLOSE, timeout_s=self._config.step_timeout_s)
            closing = asyncio.ensure_future(self._handle("", encode(call)))
            self._closing.add(closing)
            closing.add_done_callback(self._closing.discard)
            started.append(closing)
        return started


def _expect(kind: type[Any], value: Any, hosted: _Hosted, call: Call) -> Any:
    if isinstance(value, kind):
        return value
    name = hosted.environment.name or type(hosted.environment).__name__
    raise EnvironmentFault(name, call.method, f"must return a {kind.__name__}, got {type(value).__name__}")


def _tail(error: BaseException) -> str:
    return "".join(traceback.format_exception(error))[-TRACEBACK_CHARS:].strip()
