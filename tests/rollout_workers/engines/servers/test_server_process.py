"""Server processes: they start, end with all that they started, and never outlive their owner."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import psutil
import pytest
from server_helpers import all_gone, lines_of

from rollout_workers.engines.servers.errors import ServerNotStarted
from rollout_workers.engines.servers.process import (
    ServerProcess,
    describe_status,
    free_port,
    log_tail,
    port_is_free,
    telling_line,
)

FAMILY = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import os, signal, time; os.setsid(); "
    "signal.signal(signal.SIGTERM, signal.SIG_IGN); print('child', os.getpid(), flush=True); time.sleep(600)"])
print("parent", os.getpid(), flush=True)
time.sleep(600)
"""
"""A server with a child that has left its session; both ignore the terminating signal."""


def python(code: str) -> list[str]:
    return [sys.executable, "-c", textwrap.dedent(code)]


async def test_its_end_is_noticed_at_once_and_explained(tmp_path: Path) -> None:
    log = tmp_path / "logs" / "server.log"
    process = await ServerProcess.start(
        python("print('hello', flush=True); raise ValueError('no such model')"), {}, log
    )
    async with asyncio.timeout(10):
        await process.ended.wait()
    assert process.reason == "ended with exit status 1"
    assert process.cause() == "ended with exit status 1; ValueError: no such model"
    assert log_tail(log)[0] == "hello"
    await process.stop()


async def test_a_killed_server_is_told_apart(tmp_path: Path) -> None:
    process = await ServerProcess.start(python("import time; time.sleep(600)"), {}, tmp_path / "log")
    os.kill(process.pid, signal.SIGKILL)
    async with asyncio.timeout(10):
        await process.ended.wait()
    assert process.reason == "killed by signal SIGKILL"
    await process.stop()


async def test_the_environment_reaches_it_and_ours_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/nowhere/of/ours")
    monkeypatch.setenv("KEPT", "yes")
    code = "import os; print(os.environ.get('PYTHONPATH'), os.environ['KEPT'], os.environ['GIVEN'])"
    process = await ServerProcess.start(python(code), {"GIVEN": "too"}, tmp_path / "log")
    assert await asyncio.to_thread(lines_of, tmp_path / "log", 1) == ["None yes too"]
    await process.stop()


async def test_stopping_ends_what_the_server_started_also_in_other_sessions(tmp_path: Path) -> None:
    log = tmp_path / "log"
    process = await ServerProcess.start(python(FAMILY), {}, log)
    pids = [int(line.split()[1]) for line in await asyncio.to_thread(lines_of, log, 2)]
    assert all(psutil.pid_exists(pid) for pid in pids)
    await process.stop()
    assert all_gone(pids, 0.5)


async def test_a_dead_server_s_children_are_ended(tmp_path: Path) -> None:
    log = tmp_path / "log"
    process = await ServerProcess.start(python(FAMILY), {}, log)
    pids = [int(line.split()[1]) for line in await asyncio.to_thread(lines_of, log, 2)]
    os.kill(process.pid, signal.SIGKILL)
    assert all_gone(pids, 20)
    await process.stop()


def test_nothing_is_left_when_the_owner_is_killed(tmp_path: Path) -> None:
    log = tmp_path / "log"
    owner = subprocess.Popen(
        python(
            f"""
            import asyncio, sys
            from pathlib import Path
            from rollout_workers.engines.servers.process import ServerProcess

            async def own():
                await ServerProcess.start([sys.executable, "-c", {FAMILY!r}], {{}}, Path({str(log)!r}))
                await asyncio.sleep(600)

            asyncio.run(own())
            """
        )
    )
    try:
        pids = [int(line.split()[1]) for line in lines_of(log, 2)]
        guardians = [psutil.Process(pids[0]).ppid(), psutil.Process(pids[1]).ppid()]
    finally:
        owner.kill()
    assert owner.wait(10) == -signal.SIGKILL
    assert all_gone(pids + [guardian for guardian in guardians if guardian != 1], 30)


async def test_the_server_ends_with_its_guardian(tmp_path: Path) -> None:
    process = await ServerProcess.start(python("import time; time.sleep(600)"), {}, tmp_path / "log")
    server = process.pid
    os.kill(psutil.Process(server).ppid(), signal.SIGKILL)
    async with asyncio.timeout(10):
        await process.ended.wait()
    assert process.reason == "its guardian was killed"
    assert all_gone([server], 20)


async def test_a_program_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ServerNotStarted, match=r"/no/such/python -m server \.\.\. cannot be run: .*No such file"):
        await ServerProcess.start(["/no/such/python", "-m", "server"], {}, tmp_path / "log")


def test_the_cause_is_found_above_its_consequences(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text(
        "OldError: of the life before\n"
        + "starting\n(EngineCore pid=7) ValueError: head_dim 31 is not supported\nTraceback\n  File x\n"
        "RuntimeError: Engine core initialization failed. See root cause above.\n\n"
    )
    since = len("OldError: of the life before\n")
    assert telling_line(log, since) == "ValueError: head_dim 31 is not supported"
    assert log_tail(log, 1, since) == ["RuntimeError: Engine core initialization failed. See root cause above."]
    assert telling_line(tmp_path / "none") == ""


@pytest.mark.parametrize(
    ("lines", "cause"),
    [
        (
            "(APIServer pid=3) WARNING 11-21 12:37:11 [utils.py:255] may cause errors like `OSError: [Errno 24] files`\n"
            "[2026-11-21 12:37:12] WARNING server.py:9: OSError: no such hint\n"
            "(EngineCore pid=4) ERROR 11-21 12:37:25 [core.py:1510]     raise ValueError(\n"
            "(EngineCore pid=4) ERROR 11-21 12:37:25 [core.py:1510] ValueError: a sequence of 512 tokens needs more KV\n"
            "RuntimeError: Engine core initialization failed. Failed core proc(s): {}\n",
            "ValueError: a sequence of 512 tokens needs more KV",
        ),
        (
            "pydantic_core.ValidationError: 1 validation error for ModelConfig\n"
            "  Value error, the model type `new` is not known\n"
            "    For further information visit a page\n",
            "pydantic_core.ValidationError: 1 validation error for ModelConfig Value error, the model type `new` is not known",
        ),
        ("INFO: KeyError: 3\n", ""),
    ],
)
def test_the_cause_is_no_warning_and_is_told_without_what_stands_before_it(
    tmp_path: Path, lines: str, cause: str
) -> None:
    log = tmp_path / "log"
    log.write_text(lines)
    assert telling_line(log) == cause


def test_statuses_have_names() -> None:
    assert describe_status(3) == "ended with exit status 3"
    assert describe_status(-9) == "killed by signal SIGKILL"


def test_a_free_port_is_free() -> None:
    assert port_is_free("127.0.0.1", free_port("127.0.0.1"))
