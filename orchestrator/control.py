"""How a run takes commands while it is under way: a socket of the controller, and a file that says where it is.

``RUN/control.json`` (readable by its owner only) names a socket in the abstract namespace of the controller's machine
and a token that a command must show. The file is there as long as the controller is. A command is one JSON line; the
answer is a line for everything that happens meanwhile and a last one with the result or the error.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import os
import secrets
import socket
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec

from orchestrator.run_directory import RunDirectory, RunDirectoryError

logger = logging.getLogger(__name__)

Say = Callable[[str], None]
"""Passes a line on to the person who gave the command."""
Handler = Callable[[str, str, Say], Awaitable[dict[str, Any]]]
"""Carries out a command (its name and text). What it raises is told to the person, without a traceback."""

HELLO_S = 10.0
"""How long a connection may take to give its command."""
LIMIT = 1 << 20
"""Bytes of the longest line."""
BEAT_S = 5.0
"""While a command takes long, a line without content comes this often: the other side is alive."""


class Command(msgspec.Struct, frozen=True, kw_only=True):
    """What a person wants. ``token`` is the one in the run's control file."""

    token: str
    name: str
    text: str


class Answer(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One line of the answer: ``said``, or the last one with ``result`` or ``error``; none of them: just a sign of life."""

    said: str | None = None
    error: str | None = None
    result: dict[str, Any] | None = None


class ControlFile(msgspec.Struct, frozen=True, kw_only=True):
    """Where a run takes commands."""

    host: str
    pid: int
    socket: str
    token: str


class ControlError(RunDirectoryError):
    """A command that could not be given, or that the run refused. The message is complete."""


class ControlServer:
    """Listens while the ``async with`` block runs; ``path`` is the run's control file."""

    def __init__(self, path: Path, handler: Handler) -> None:
        self._path = path
        self._handler = handler
        self._token = secrets.token_hex(32)
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> ControlServer:
        name = f"millrace-control-{secrets.token_hex(12)}"
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(f"\0{name}")  # by hand: not every event loop takes an abstract name
        self._server = await asyncio.start_unix_server(self._serve, sock=listener, limit=LIMIT)
        where = ControlFile(host=socket.gethostname(), pid=os.getpid(), socket=name, token=self._token)
        _write_private(self._path, msgspec.json.encode(where) + b"\n")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._path.unlink(missing_ok=True)
        assert self._server is not None
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            await self._answer(reader, writer)
        except (ConnectionError, TimeoutError, ValueError, msgspec.MsgspecError) as error:
            logger.info("a command was not taken: %s", error)
        except asyncio.CancelledError:
            _send(writer, Answer(error="the run has ended"))
        finally:
            self._tasks.discard(task)
            writer.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async with asyncio.timeout(HELLO_S):
            line = await reader.readline()
        command = msgspec.json.decode(line, type=Command)
        if not hmac.compare_digest(command.token, self._token):
            logger.warning("a command with a wrong token was refused")
            return
        logger.warning("command: %s %s", command.name, command.text)
        beats = asyncio.create_task(_beat(writer))
        try:
            result = await self._handler(command.name, command.text, lambda text: _send(writer, Answer(said=text)))
        except Exception as error:  # noqa: BLE001 - the person who asked must hear of anything
            _send(writer, Answer(error=str(error) or type(error).__name__))
        else:
            _send(writer, Answer(result=result))
        finally:
            beats.cancel()
        await writer.drain()


async def _beat(writer: asyncio.StreamWriter) -> None:
    while True:
        await asyncio.sleep(BEAT_S)
        _send(writer, Answer())


def _send(writer: asyncio.StreamWriter, answer: Answer) -> None:
    """A person who has gone away misses the line; the command goes on."""
    if not writer.is_closing():
        writer.write(msgspec.json.encode(answer) + b"\n")


def _write_private(path: Path, content: bytes) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")  # made with mode 0600
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.replace(temporary, path)
    except OSError as error:
        Path(temporary).unlink(missing_ok=True)
        raise RunDirectoryError(f"{path} cannot be written: {error.strerror or error}") from error


# The other side


def give_command(run: RunDirectory, name: str, text: str, say: Say, silence_s: float = 60.0) -> dict[str, Any]:
    """Give a run a command and wait until it is done; returns its result.

    Raises:
        ControlError: The run is not under way or on another machine, it refused the command, or it said nothing for
            ``silence_s`` seconds (it gives a sign of life every few seconds).
    """
    where = _read_control(run)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(silence_s)
        try:
            connection.connect(f"\0{where.socket}")
        except OSError:
            raise ControlError(
                f"{run.path} is not running: its controller (process {where.pid}) is gone; `millrace resume {run.path}` "
                "continues it"
            ) from None
        try:
            command = Command(token=where.token, name=name, text=text)
            connection.sendall(msgspec.json.encode(command) + b"\n")
            return _listen(connection, say)
        except TimeoutError:
            raise ControlError(
                f"the controller of {run.path} (process {where.pid}) has said nothing for {silence_s:g} s; see "
                f"{run.logs}/controller-0-*.log"
            ) from None
        except (OSError, msgspec.MsgspecError) as error:
            raise ControlError(f"the run at {run.path} broke the connection: {error}") from None


def _listen(connection: socket.socket, say: Say) -> dict[str, Any]:
    with connection.makefile("rb") as lines:
        for line in lines:
            answer = msgspec.json.decode(line, type=Answer)
            if answer.said is not None:
                say(answer.said)
            if answer.error is not None:
                raise ControlError(answer.error)
            if answer.result is not None:
                return answer.result
    raise ControlError("the run ended before it had answered")


def _read_control(run: RunDirectory) -> ControlFile:
    try:
        where = msgspec.json.decode(run.control.read_bytes(), type=ControlFile)
    except FileNotFoundError:
        raise ControlError(f"{run.path} is not running{_how_it_ended(run)}") from None
    except PermissionError:
        raise ControlError(f"{run.control} can be read by the user only who started the run") from None
    except (OSError, msgspec.MsgspecError) as error:
        raise ControlError(f"{run.control} cannot be read: {error}") from error
    if where.host != socket.gethostname():
        raise ControlError(f"the controller of {run.path} is on {where.host}: give the command there")
    return where


def _how_it_ended(run: RunDirectory) -> str:
    try:
        status = json.loads(run.summary.read_text(encoding="utf-8")).get("status")
    except (OSError, ValueError, AttributeError):
        return f"; `millrace resume {run.path}` continues a run that was ended"
    return f": its summary says {status!r}" + (
        "" if status == "finished" else f"; `millrace resume {run.path}` continues it"
    )
