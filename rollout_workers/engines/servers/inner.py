"""The processes below a server without which it is of no use: the engine below vLLM's HTTP server, SGLang's scheduler.

Their end is an event, too. The server's own may come much later: it goes on waiting for calls that nobody will answer.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
from collections.abc import Sequence

import psutil

from rollout_workers.engines.servers.process import ServerProcess, telling_line

logger = logging.getLogger(__name__)

LOOK_S = 0.5
"""How often one looks where the kernel does not tell of the end of a process that is not one's own child."""
EXPLAIN_S = 0.2
"""How long the server may take to end with its inner process, which explains more."""
GUARDIAN_S = 5.0
"""How long the guardian may take to tell how a dead server ended."""


def inner_processes(server: int, titles: str) -> list[psutil.Process]:
    """Those below the process ``server`` in whose command line the regular expression ``titles`` is found."""
    try:
        below = psutil.Process(server).children(recursive=True)
    except psutil.Error:
        return []
    return [process for process in below if re.search(titles, _title(process))]


async def first_to_end(processes: Sequence[psutil.Process]) -> psutil.Process:
    """Wait for the end of one of them."""
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[psutil.Process] = loop.create_future()

    def note(process: psutil.Process) -> None:
        if not ended.done():
            ended.set_result(process)

    descriptors: list[int] = []
    try:
        for process in processes:
            descriptors.append(os.pidfd_open(process.pid))
            loop.add_reader(descriptors[-1], note, process)
            if not process.is_running():  # another process has its id
                note(process)
        return await ended
    except ProcessLookupError:
        return processes[len(descriptors)]
    except (OSError, AttributeError) as error:
        logger.info("no events of processes here (%s): looking every %g s", error, LOOK_S)
    finally:
        for descriptor in descriptors:
            loop.remove_reader(descriptor)
            os.close(descriptor)
    while True:
        for process in processes:
            if not _lives(process):
                return process
        await asyncio.sleep(LOOK_S)


async def end_of(server: ServerProcess, inner: Sequence[psutil.Process]) -> str:
    """Wait for the end of the server or of one of its inner processes; returns the cause in one line."""
    titles = {process.pid: _title(process) for process in inner}
    ended = asyncio.create_task(server.ended.wait())
    first = asyncio.create_task(first_to_end(inner)) if inner else None
    try:
        await asyncio.wait({ended, first} if first else {ended}, return_when=asyncio.FIRST_COMPLETED)
        if first is not None and not ended.done():
            await asyncio.wait({ended}, timeout=EXPLAIN_S if _pid_lives(server.pid) else GUARDIAN_S)
        if ended.done() or first is None:
            return server.cause()
        process = first.result()
        told = f"its process {titles[process.pid]} (pid {process.pid}) ended"
        return "; ".join(part for part in (told, telling_line(server.log, server.log_from)) if part)
    finally:
        ended.cancel()
        if first is not None:
            first.cancel()


def _title(process: psutil.Process) -> str:
    """The command line; empty when the process has just ended."""
    try:
        return " ".join(process.cmdline()).strip()
    except psutil.Error:
        return ""


def _pid_lives(pid: int) -> bool:
    try:
        return _lives(psutil.Process(pid))
    except psutil.Error:
        return False


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False
