from __future__ import annotations

import asyncio
import json
import socket
import stat
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner

from orchestrator.cli import main
from orchestrator.control import Command, ControlError, ControlServer, Say, give_command
from orchestrator.run_directory import RunDirectory
from orchestrator.scaling import ScaleError


class Controller:
    """A control server on an event loop of its own; the test decides what a command does."""

    def __init__(self, run: RunDirectory) -> None:
        self.run = run
        self.commands: list[tuple[str, str]] = []
        self.release = threading.Event()
        self.entered = threading.Event()
        self.error: Exception | None = None
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()))

    async def handle(self, name: str, text: str, say: Say) -> dict[str, Any]:
        self.commands.append((name, text))
        if self.error is not None:
            raise self.error
        say("engine-1.0 starting")
        if text == "wait":
            self.entered.set()
            await asyncio.Event().wait()
        return {"before": 1, "after": 2, "members": [{"engine": "engine-0.0", "state": "serving", "version": 3}]}

    async def _serve(self) -> None:
        async with ControlServer(self.run.control, self.handle):
            self._ready.set()
            await asyncio.to_thread(self.release.wait)

    def start(self) -> None:
        self._thread.start()
        assert self._ready.wait(10)

    def stop(self) -> None:
        self.release.set()
        self._thread.join(10)


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory.create(tmp_path / "run", "mode: async\n")


@pytest.fixture
def controller(run: RunDirectory) -> Iterator[Controller]:
    controller = Controller(run)
    controller.start()
    yield controller
    controller.stop()


def test_a_command_reaches_the_controller_and_its_news_come_back(run: RunDirectory, controller: Controller) -> None:
    said: list[str] = []
    result = give_command(run, "scale", "engines=+1", said.append)
    assert controller.commands == [("scale", "engines=+1")]
    assert said == ["engine-1.0 starting"]
    assert (result["before"], result["after"]) == (1, 2)


def test_the_control_file_is_for_its_owner_only_and_goes_with_the_controller(
    run: RunDirectory, controller: Controller
) -> None:
    assert stat.S_IMODE(run.control.stat().st_mode) == 0o600
    controller.stop()
    assert not run.control.exists()
    with pytest.raises(ControlError, match="is not running; `millrace resume"):
        give_command(run, "scale", "engines=+1", print)


def test_a_finished_run_says_so(run: RunDirectory) -> None:
    run.write_summary({"status": "finished"})
    with pytest.raises(ControlError, match=r"is not running: its summary says 'finished'$"):
        give_command(run, "scale", "engines=+1", print)


def test_a_controller_that_died_is_told_from_one_that_lives(run: RunDirectory, controller: Controller) -> None:
    where = json.loads(run.control.read_text())
    controller.stop()
    run.control.write_text(json.dumps(where))
    with pytest.raises(ControlError, match=rf"its controller \(process {where['pid']}\) is gone; `millrace resume"):
        give_command(run, "scale", "engines=+1", print)
    run.control.write_text(json.dumps(where | {"host": "elsewhere"}))
    with pytest.raises(ControlError, match="is on elsewhere: give the command there"):
        give_command(run, "scale", "engines=+1", print)
    run.control.write_text("{}")
    with pytest.raises(ControlError, match=r"control.json cannot be read: .*host"):
        give_command(run, "scale", "engines=+1", print)


def test_an_error_is_told_without_a_traceback(run: RunDirectory, controller: Controller) -> None:
    controller.error = ScaleError("engines=-1: a run needs at least 1 engine, and it has 1")
    with pytest.raises(ControlError, match=r"^engines=-1: a run needs at least 1 engine, and it has 1$"):
        give_command(run, "scale", "engines=-1", print)


def test_a_run_that_ends_during_a_command_says_so(run: RunDirectory, controller: Controller) -> None:
    def end() -> None:
        assert controller.entered.wait(10)
        controller.release.set()

    ending = threading.Thread(target=end)
    ending.start()
    with pytest.raises(ControlError, match=r"the run has ended|ended before it had answered"):
        give_command(run, "scale", "wait", print)
    ending.join(10)


@pytest.mark.parametrize("line", [b"not json\n", b'{"token": "x"}\n', b"\n"])
def test_garbage_and_strangers_get_no_answer_and_do_no_harm(
    run: RunDirectory, controller: Controller, line: bytes
) -> None:
    name = json.loads(run.control.read_text())["socket"]
    stranger = msgspec.json.encode(Command(token="guessed", name="scale", text="engines=-1")) + b"\n"
    for sent in (line, stranger):
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(10)
            connection.connect(f"\0{name}")
            connection.sendall(sent)
            assert connection.recv(100) == b""
    assert controller.commands == []
    assert give_command(run, "scale", "engines=+1", lambda text: None)["after"] == 2


def test_the_scale_command(run: RunDirectory, controller: Controller) -> None:
    done = CliRunner().invoke(main, ["scale", str(run.path), "engines=+1"])
    assert done.exit_code == 0, done.output
    assert done.output.splitlines() == [
        "engine-1.0 starting",
        "2 engines now (1 before):",
        "  engine-0.0 serving version 3",
    ]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["nowhere", "engines=+1"], "nowhere is not a directory"),
        (["RUN", "workers=+1"], "only engines can be scaled"),
        (["RUN", "engines=+1"], "is not running"),
    ],
)
def test_the_scale_command_refuses_what_cannot_be_done(run: RunDirectory, arguments: list[str], told: str) -> None:
    done = CliRunner().invoke(main, ["scale", *(str(run.path) if word == "RUN" else word for word in arguments)])
    assert done.exit_code == 1
    assert told in done.output
    assert "Traceback" not in done.output
