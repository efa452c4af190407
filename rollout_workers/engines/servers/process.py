"""One server process: started, watched and ended together with everything that it started.

Its death is an event (`ServerProcess.ended`), noticed by a thread that reads the guardian's pipe. It works on any event
loop and in any thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

from rollout_workers.engines.servers import guardian
from rollout_workers.engines.servers.errors import ServerDied, ServerNotStarted

TAIL_BYTES = 64 << 10
TAIL_LINES = 15
START_S = 30.0
"""How long the guardian may take to start a process (not the server's own start-up)."""
END_S = guardian.GIVE_UP_S + 10.0

_ERROR_LINE = re.compile(r"(?:\b\w*(?:Error|Exception|Exit)\b\s*:\s*\S)|(?:\berror: \S)")
_UNTELLING = re.compile(r"See root cause above|initialization failed|Failed core proc", re.IGNORECASE)
_HARMLESS = re.compile(r"\b(?:DEBUG|INFO|WARNING)\b")
_HEADING = re.compile(r"^(?:\(\w+ pid=\d+\) )?(?:ERROR [\d: -]+ )?(?:\[[^\]]*\] )?\s*")
"""What stands before a line's message: the process, the level, the time, the place in the source."""
_CONTINUED = re.compile(r"validation errors? for \S+$")
"""A line whose cause stands in the next one."""
_IN_USE = re.compile(r"address already in use|EADDRINUSE|port \S+ .{0,30}in use", re.IGNORECASE)
_DROPPED = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "__PYVENV_LAUNCHER__")


class ServerProcess:
    """A running server. Made by `start`; `ended` is set when the process is gone, and `reason` then says how."""

    def __init__(self, popen: subprocess.Popen[bytes], command: Sequence[str], log: Path, log_from: int) -> None:
        self.command = list(command)
        self.log = log
        self.log_from = log_from
        """Where in the log (bytes) its output begins."""
        self.pid = 0
        self.reason = ""
        self.ended = asyncio.Event()
        """The server is dead."""
        self._gone = asyncio.Event()
        """And so is everything that it started."""
        self._started = asyncio.Event()
        self._popen = popen
        self._loop = asyncio.get_running_loop()
        self._reader = threading.Thread(target=self._read, name=f"guardian of {log.stem}", daemon=True)
        self._reader.start()

    @classmethod
    async def start(cls, command: Sequence[str], environment: Mapping[str, str], log: Path) -> ServerProcess:
        """Start ``command`` with ``environment`` on top of this process's; its output is appended to ``log``.

        Raises ServerNotStarted if there is no such program.
        """
        popen, log_from = await asyncio.to_thread(_spawn, command, environment, log)
        process = cls(popen, command, log, log_from)
        try:
            async with asyncio.timeout(START_S):
                await process._started.wait()
        except TimeoutError:
            process._let_go()
            raise ServerNotStarted(f"{command[0]} was not started within {START_S:.0f} s") from None
        except BaseException:
            process._let_go()
            raise
        if process.pid == 0:
            raise ServerNotStarted(f"{' '.join(command[:3])} ... cannot be run: {process.reason}")
        return process

    async def stop(self) -> None:
        """End the server and everything that it started. Returns when they are gone."""
        self._let_go()
        try:
            async with asyncio.timeout(END_S):
                await self._gone.wait()
        except TimeoutError:
            raise ServerDied(f"the processes of server {self.pid} did not end within {END_S:.0f} s") from None

    def cause(self) -> str:
        """Why it ended, in one line, with what its log says about it."""
        return "; ".join(part for part in (self.reason, telling_line(self.log, self.log_from)) if part)

    def _let_go(self) -> None:
        assert self._popen.stdin is not None
        with contextlib.suppress(OSError):
            self._popen.stdin.close()

    def _read(self) -> None:
        """In a thread of its own: what the guardian reports, until its end of the pipe closes."""
        assert self._popen.stdout is not None
        self._popen.wait()  # the process that the guardian forked from ends at once
        for raw in self._popen.stdout:
            word, _, rest = raw.decode(errors="replace").strip().partition(" ")
            if word == "started":
                self.pid = int(rest)
                self._tell(self._started)
            else:
                self.reason = describe_status(int(rest)) if word == "ended" else rest
                self._tell(self.ended)
        if self.pid and not self.reason:
            self.reason = "its guardian was killed"
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, signal.SIGKILL)
        for event in (self._started, self.ended, self._gone):
            self._tell(event)

    def _tell(self, event: asyncio.Event) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has closed: nobody is left to be told
            self._loop.call_soon_threadsafe(event.set)


def _spawn(command: Sequence[str], environment: Mapping[str, str], log: Path) -> tuple[subprocess.Popen[bytes], int]:
    """The guardian, and how long the log is already."""
    inherited = {key: value for key, value in os.environ.items() if key not in _DROPPED}
    log.parent.mkdir(parents=True, exist_ok=True)
    log_from = log.stat().st_size if log.exists() else 0
    popen = subprocess.Popen(
        [sys.executable, "-I", "-S", guardian.__file__, str(log), *command],
        env={**inherited, **environment},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    return popen, log_from


def describe_status(status: int) -> str:
    """An exit status in words; a negative one is a signal."""
    if status >= 0:
        return f"ended with exit status {status}"
    try:
        return f"killed by signal {signal.Signals(-status).name}"
    except ValueError:
        return f"killed by signal {-status}"


def log_tail(log: Path, lines: int = TAIL_LINES, since: int = 0) -> list[str]:
    """The last lines of a log, from byte ``since`` on, that are not empty; none if there is no such file."""
    try:
        with log.open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(since, file.tell() - TAIL_BYTES))
            text = file.read().decode(errors="replace")
    except OSError:
        return []
    return [line.rstrip() for line in text.splitlines() if line.strip()][-lines:]


def telling_line(log: Path, since: int = 0) -> str:
    """What the line near the log's end says that most likely names the cause: the first error that is not a mere consequence."""
    lines = log_tail(log, 200, since)
    errors = [index for index, line in enumerate(lines) if _is_error(line)]
    telling = [index for index in errors if not _UNTELLING.search(lines[index])] or errors
    if not telling:
        return ""
    first = telling[0]
    parts = lines[first : first + 2] if _CONTINUED.search(lines[first]) else lines[first : first + 1]
    return " ".join(_HEADING.sub("", part).strip() for part in parts)[:400]


def _is_error(line: str) -> bool:
    """A warning may mention an error, too."""
    found = _ERROR_LINE.search(line)
    return found is not None and not _HARMLESS.search(line[: found.start()])


def port_was_taken(process: ServerProcess, host: str, port: int) -> bool:
    """Whether a server that did not start found its port in use."""
    said = any(_IN_USE.search(line) for line in log_tail(process.log, 200, process.log_from))
    return said or not port_is_free(host, port)


def free_port(host: str) -> int:
    """A port that nobody listens on now; somebody else may take it before it is used."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind((host, 0))
        port: int = probe.getsockname()[1]
        return port


def port_is_free(host: str, port: int) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
        return True
