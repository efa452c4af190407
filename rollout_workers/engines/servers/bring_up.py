"""From a launch to a server that answers: port, process, readiness, identity."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rollout_workers.engines.servers.adapter import Launch, ServerAdapter, ServerAnswerError
from rollout_workers.engines.servers.environment import judge_identity
from rollout_workers.engines.servers.errors import (
    ServerNotStarted,
    ServerRefused,
    ServerSilent,
    ServerUnreachable,
)
from rollout_workers.engines.servers.http import ServerConnection
from rollout_workers.engines.servers.process import ServerProcess, free_port, log_tail, port_was_taken, telling_line

logger = logging.getLogger(__name__)

PORTS = 3
"""How many ports are tried when others take them first."""
PROBE_EVERY_S = 0.25
PROBE_S = 5.0
NOT_FOUND = 404


@dataclass(frozen=True)
class ServerTimes:
    """Seconds: until a started server must answer, and the longest silence during a call."""

    startup_timeout_s: float
    request_timeout_s: float


@dataclass(frozen=True)
class Server:
    """A server that answers. ``process`` is None for one that somebody else started."""

    connection: ServerConnection
    process: ServerProcess | None

    async def close(self) -> None:
        """Let go of the connection, and end the process if it is ours."""
        await self.connection.close()
        if self.process is not None:
            await self.process.stop()


async def start_server(
    adapter: ServerAdapter,
    launch_at: Callable[[int], Launch],
    log: Path,
    times: ServerTimes,
    choose_port: Callable[[str], int] = free_port,
) -> Server:
    """Start a server and wait until it answers. ``launch_at`` makes the launch for a port.

    Raises ServerNotStarted, with the last lines of the log, if it ends or is not ready in time. A port that somebody
    else took first is not an error until several were.
    """
    host = launch_at(0).host
    taken: list[int] = []
    while True:
        port = choose_port(host)
        launch = launch_at(port)
        server = await _start_at(adapter, launch, log, times)
        try:
            await _until_ready(adapter, server, times.startup_timeout_s, launch.model_path)
            await _identify(adapter, server.connection, launch.max_len)
        except ServerNotStarted:
            await server.close()
            process = server.process
            if process is None or not port_was_taken(process, host, port):
                raise
            taken.append(port)
            if len(taken) == PORTS:
                raise ServerNotStarted(
                    f"{adapter.name} did not start: the ports {', '.join(map(str, taken))} of {host} were in use"
                ) from None
            logger.warning("port %d was taken by somebody else; trying another", port)
        except BaseException:
            await server.close()
            raise
        else:
            return server


async def join_server(adapter: ServerAdapter, url: str, max_len: int, times: ServerTimes) -> Server:
    """A server that runs already.

    Raises EnvironmentUnfit if it is another version, ServerNotStarted if it is not there, or is something else.
    """
    server = Server(ServerConnection(url, times.request_timeout_s), None)
    try:
        await _until_ready(adapter, server, times.startup_timeout_s)
        try:
            await _identify(adapter, server.connection, max_len)
        except (ServerRefused, ServerAnswerError) as error:
            raise ServerNotStarted(_something_else(adapter, url, str(error))) from None
    except BaseException:
        await server.close()
        raise
    return server


async def _start_at(adapter: ServerAdapter, launch: Launch, log: Path, times: ServerTimes) -> Server:
    command = adapter.command(launch)
    logger.info("starting %s on port %d: %s (its output: %s)", adapter.name, launch.port, " ".join(command), log)
    process = await ServerProcess.start(command, adapter.environment(launch), log)
    connection = ServerConnection(f"http://{launch.host}:{launch.port}", times.request_timeout_s)
    return Server(connection, process)


async def _until_ready(adapter: ServerAdapter, server: Server, timeout_s: float, model: str = "") -> None:
    """Probe until it answers 200; ends at once when the process does. ``model``: what it was started with."""
    process = server.process
    ended = asyncio.create_task(process.ended.wait() if process is not None else asyncio.Event().wait())
    last = ["no answer yet"]
    probing = asyncio.create_task(_probe_until_ready(adapter, server, last))
    try:
        async with asyncio.timeout(timeout_s):
            await asyncio.wait({ended, probing}, return_when=asyncio.FIRST_COMPLETED)
        if process is not None and ended.done():
            raise ServerNotStarted(_explained(f"{adapter.name} did not start with {model}", process))
        probing.result()
    except TimeoutError:
        what = f"{adapter.name} at {server.connection.url} was not ready within {timeout_s:g} s ({last[0]})"
        if process is None:
            raise ServerNotStarted(f"{what}; check engines.{adapter.name}.urls, and that it is started") from None
        raise ServerNotStarted(_explained(what, process)) from None
    finally:
        ended.cancel()
        probing.cancel()


async def _probe_until_ready(adapter: ServerAdapter, server: Server, last: list[str]) -> None:
    """Ask until it answers 200; ``last[0]`` says how the last probe went. An external server that is another is an error."""
    while True:
        try:
            async with asyncio.timeout(PROBE_S):
                reply = await server.connection.send(adapter.ready())
            if reply.status == 200:
                return
            if reply.status == NOT_FOUND and server.process is None:
                told = f"GET {server.connection.url}{adapter.ready().path} answered {NOT_FOUND}"
                raise ServerNotStarted(_something_else(adapter, server.connection.url, told))
            last[0] = f"it answered {reply.status}"
        except TimeoutError:
            last[0] = f"no answer within {PROBE_S:g} s"
        except (ServerUnreachable, ServerSilent) as error:
            last[0] = str(error)
        await asyncio.sleep(PROBE_EVERY_S)  # a server does not say when it begins to answer


def _something_else(adapter: ServerAdapter, url: str, told: str) -> str:
    return (
        f"what answers at {url} is no {adapter.name} server that Millrace can drive ({told}): check "
        f"engines.{adapter.name}.urls, and that the server runs with Millrace's extension"
    )


async def _identify(adapter: ServerAdapter, connection: ServerConnection, max_len: int) -> None:
    identity = adapter.parse_identity(await connection.ask(adapter.identity()))
    judge_identity(adapter, identity, connection.url, max_len)


def _explained(what: str, process: ServerProcess) -> str:
    """The cause in the first line, the end of the log below it."""
    reasons = [part for part in (process.reason, telling_line(process.log, process.log_from)) if part]
    head = f"{what}: {'; '.join(reasons)}" if reasons else what
    tail = log_tail(process.log, since=process.log_from)
    return "\n".join([head, f"the last lines of {process.log}:", *(f"  {line}" for line in tail or ["(it is empty)"])])
