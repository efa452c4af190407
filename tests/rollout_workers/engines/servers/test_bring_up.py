"""A server that does not start, not in time, not on this port, or is another than was thought."""

from __future__ import annotations

import asyncio
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from server_helpers import all_gone, lines_of
from tiny_adapter import PROGRAM, TinyAdapter

from rollout_workers.engines.servers.adapter import Call, Launch
from rollout_workers.engines.servers.bring_up import ServerTimes, join_server, start_server
from rollout_workers.engines.servers.errors import EnvironmentUnfit, ServerNotStarted
from rollout_workers.engines.servers.process import free_port

TIMES = ServerTimes(startup_timeout_s=60.0, request_timeout_s=20.0)
HOST = "127.0.0.1"


def launch_at(port: int) -> Launch:
    return Launch(model_path="m", host=HOST, port=port, member="engine-0.0", max_len=64)


@pytest.fixture
def taken() -> Iterator[int]:
    """A port that somebody listens on (and answers nothing)."""
    with socket.socket() as listener:
        listener.bind((HOST, 0))
        listener.listen()
        yield listener.getsockname()[1]


def ports(*numbers: int) -> Callable[[str], int]:
    left = list(numbers)
    return lambda host: left.pop(0)


async def test_a_server_is_started_and_ended(tmp_path: Path) -> None:
    server = await start_server(TinyAdapter(), launch_at, tmp_path / "log", TIMES)
    assert server.process is not None
    assert not server.process.ended.is_set()
    await server.close()
    assert server.process.ended.is_set()


async def test_one_that_does_not_start_is_explained_with_its_log(tmp_path: Path) -> None:
    program = [sys.executable, "-c", "print('loading', flush=True); raise MemoryError('KV cache does not fit')"]
    began_at = time.monotonic()
    with pytest.raises(ServerNotStarted) as caught:
        await start_server(TinyAdapter(program), launch_at, tmp_path / "log", TIMES)
    first, *rest = str(caught.value).splitlines()
    assert first == "tiny did not start with m: ended with exit status 1; MemoryError: KV cache does not fit"
    assert rest[0] == f"the last lines of {tmp_path / 'log'}:"
    assert rest[1] == "  loading"
    assert rest[-1] == "  MemoryError: KV cache does not fit"
    assert time.monotonic() - began_at < 30


async def test_one_that_is_not_ready_in_time_is_ended(tmp_path: Path) -> None:
    program = ["sh", "-c", "echo thinking; exec sleep 600"]
    times = ServerTimes(startup_timeout_s=2.0, request_timeout_s=5.0)
    with pytest.raises(ServerNotStarted, match=r"was not ready within 2 s \(.*Connect.*\)") as caught:
        await start_server(TinyAdapter(program), launch_at, tmp_path / "log", times)
    assert "  thinking" in str(caught.value)


async def test_a_port_in_use_makes_it_try_another(tmp_path: Path, taken: int) -> None:
    free = free_port(HOST)
    server = await start_server(TinyAdapter(), launch_at, tmp_path / "log", TIMES, ports(taken, free))
    assert server.connection.url == f"http://{HOST}:{free}"
    assert "address already in use" in (tmp_path / "log").read_text().lower()
    await server.close()


async def test_several_ports_in_use_are_an_error_that_names_them(tmp_path: Path, taken: int) -> None:
    with pytest.raises(ServerNotStarted, match=f"the ports {taken}, {taken}, {taken} of {HOST} were in use"):
        await start_server(TinyAdapter(), launch_at, tmp_path / "log", TIMES, ports(taken, taken, taken))


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--version", "1.1"], r"is tiny 1\.1, and Millrace drives tiny 1\.0"),
        (["--max-len", "32"], r"at most 32 tokens, and engines\.max_len=64"),
    ],
)
async def test_another_server_than_was_thought_is_refused(tmp_path: Path, words: list[str], says: str) -> None:
    adapter = TinyAdapter([sys.executable, str(PROGRAM), "{port}", *words])
    with pytest.raises(EnvironmentUnfit, match=says):
        await start_server(adapter, launch_at, tmp_path / "log", TIMES)


async def test_a_server_that_runs_already_is_joined_and_left_running(tmp_path: Path) -> None:
    owned = await start_server(TinyAdapter(), launch_at, tmp_path / "log", TIMES)
    assert owned.process is not None
    joined = await join_server(TinyAdapter(), owned.connection.url, 64, TIMES)
    await joined.close()
    assert not owned.process.ended.is_set()
    await owned.close()


async def test_a_server_that_is_not_there_is_named() -> None:
    times = ServerTimes(startup_timeout_s=0.5, request_timeout_s=5.0)
    url = f"http://{HOST}:{free_port(HOST)}"
    with pytest.raises(
        ServerNotStarted, match=rf"tiny at {url} was not ready within 0\.5 s .*; check engines\.tiny\.urls"
    ):
        await join_server(TinyAdapter(), url, 64, times)


class OddAdapter(TinyAdapter):
    """Of a server that has some of the tiny one's calls only."""

    def __init__(self, **paths: str) -> None:
        super().__init__()
        self._paths = paths

    def ready(self) -> Call:
        return Call("GET", self._paths.get("ready", "/ready"))

    def identity(self) -> Call:
        return Call("GET", self._paths.get("identity", "/identity"))


@pytest.mark.parametrize("missing", ["ready", "identity"])
async def test_a_url_of_something_else_is_refused_at_once(tmp_path: Path, missing: str) -> None:
    owned = await start_server(TinyAdapter(), launch_at, tmp_path / "log", TIMES)
    times = ServerTimes(startup_timeout_s=120.0, request_timeout_s=60.0)
    try:
        async with asyncio.timeout(60):
            with pytest.raises(
                ServerNotStarted, match=r"is no tiny server .*/nowhere answered 404.*engines\.tiny\.urls"
            ):
                await join_server(OddAdapter(**{missing: "/nowhere"}), owned.connection.url, 64, times)
    finally:
        await owned.close()


async def test_giving_up_the_start_ends_the_process(tmp_path: Path) -> None:
    program = [sys.executable, "-c", "import os, time; print(os.getpid(), flush=True); time.sleep(600)"]
    start = asyncio.create_task(start_server(TinyAdapter(program), launch_at, tmp_path / "log", TIMES))
    (line,) = await asyncio.to_thread(lines_of, tmp_path / "log", 1)
    start.cancel()
    with pytest.raises(asyncio.CancelledError):
        await start
    assert all_gone([int(line)], 0.5)
