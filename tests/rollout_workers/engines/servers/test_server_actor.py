"""The engine actor over a server of its own: the same calls as the embedded engine's, and a server that can die."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import numpy as np
import psutil
import pytest
import torch
from server_helpers import all_gone, until
from tiny_adapter import TinyAdapter

from experience.wire import decode, encode
from rollout_workers.continuation import joined
from rollout_workers.engine_client import EngineClient
from rollout_workers.engines.config import EnginesConfig
from rollout_workers.engines.protocol import EngineHealth, EngineLoad, FinishReason, GenerateRequest, TokenChunk
from rollout_workers.engines.servers import actor as actor_module
from rollout_workers.engines.servers.actor import ServerEngineActor
from rollout_workers.engines.servers.adapter import Call
from rollout_workers.engines.servers.errors import EnvironmentUnfit, ServerDied, ServerNotStarted
from rollout_workers.engines.vllm.config import VllmConfig
from rollout_workers.submission import SubmitBatch
from weight_sync.transports.shared_memory import SharedMemorySender

AT_ONCE_S = 5.0
"""Within this a death is told; calls that are never answered would end after `PATIENT_S`."""
PATIENT_S = 60.0


@pytest.fixture(autouse=True)
def _tiny_servers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(actor_module, "make_adapter", lambda config, model_path: TinyAdapter())
    monkeypatch.setattr(TinyAdapter, "expected_version", msgspec.__version__)
    monkeypatch.setattr(actor_module, "PROBE_EVERY_S", 0.1)
    program = TinyAdapter().program
    monkeypatch.setattr(
        TinyAdapter,
        "command",
        lambda self, launch: [*program[:2], str(launch.port), "--version", msgspec.__version__, "--core"],
    )


def settings(**vllm: object) -> EnginesConfig:
    import sys

    own = VllmConfig(**({"python": sys.executable, "request_timeout_s": 2.0} | vllm))  # type: ignore[arg-type]
    return EnginesConfig(kind="vllm", vllm=own, max_len=4096, stream_every=4)


@pytest.fixture
async def engine(tmp_path: Path) -> AsyncIterator[ServerEngineActor]:
    made = ServerEngineActor("engine-0.0", settings(), tmp_path / "logs")
    (tmp_path / "model.safetensors").write_bytes(b"12345")
    assert await made.load(tmp_path, "float32", 1, 3) == 5
    yield made
    await made.stop()


def request(name: str = "r", max_tokens: int = 10) -> GenerateRequest:
    prompt = np.array([100, 0, 0], np.int32)
    return GenerateRequest(request_id=name, session_id=f"session of {name}", prompt=prompt, max_tokens=max_tokens)


async def submit(engine: ServerEngineActor, *asked: GenerateRequest) -> EngineLoad:
    batch = SubmitBatch(client="c", requests=list(asked), releases=[], aborts=[])
    return decode(await engine.submit(encode(batch)), EngineLoad)


async def result(engine: ServerEngineActor) -> TokenChunk:
    parts: list[TokenChunk] = []
    async with asyncio.timeout(20):
        while not parts or parts[-1].finish_reason is None:
            parts += decode(await engine.collect("c"), list[TokenChunk])
    return joined(parts)


async def test_it_serves_what_it_was_started_with(engine: ServerEngineActor, tmp_path: Path) -> None:
    load = await submit(engine, request())
    assert (load.requests, load.own_sessions) == (1, 1)
    got = await result(engine)
    assert got.tokens.tolist() == list(range(103, 113))
    assert set(got.versions.tolist()) == {3}
    health = decode(await engine.health(), EngineHealth)
    assert (health.version, health.running, health.paused) == (3, 0, False)
    assert await engine.first_token_at() is not None
    assert "tiny server" in (tmp_path / "logs" / "engine-0.0-vllm.log").read_text()


async def test_a_new_version_reaches_requests_in_flight(engine: ServerEngineActor) -> None:
    sender = SharedMemorySender()
    offer = sender.prepare(4, [("w", torch.zeros(3))], ["engine-0.0"])
    await submit(engine, request(max_tokens=1000))
    await until(lambda: engine._traffic.first_token_at is not None, "the first token")
    assert await engine.stage(offer) == 4
    sender.send()
    assert await engine.commit(4, "keep") == 4
    got = await result(engine)
    sender.close()
    assert got.tokens.tolist() == list(range(103, 1103))
    assert got.versions.tolist() == sorted(got.versions.tolist())
    assert set(got.versions.tolist()) == {3, 4}
    health = decode(await engine.health(), EngineHealth)
    assert health.version == 4
    assert health.stall_s > 0


async def test_a_commit_that_fails_lets_requests_go_on(engine: ServerEngineActor) -> None:
    await submit(engine, request(max_tokens=100))
    with pytest.raises(Exception, match="not staged"):
        await engine.commit(9, "keep")
    got = await result(engine)
    assert (got.finish_reason, set(got.versions.tolist())) == (FinishReason.LENGTH, {3})


async def test_a_pause_holds_requests_and_outlasts_a_commit(engine: ServerEngineActor) -> None:
    sender = SharedMemorySender()
    offer = sender.prepare(4, [("w", torch.zeros(3))], ["engine-0.0"])
    await engine.pause("keep_kv")
    await submit(engine, request())
    await engine.stage(offer)
    await engine.commit(4, "auto")
    sender.close()
    await asyncio.sleep(2.5)  # longer than the server may be silent
    assert decode(await engine.health(), EngineHealth).paused
    await engine.resume()
    got = await result(engine)
    assert got.tokens.tolist() == list(range(103, 113))
    assert set(got.versions.tolist()) == {4}


async def test_a_killed_server_is_noticed_and_its_requests_continue_elsewhere(
    engine: ServerEngineActor, tmp_path: Path
) -> None:
    other = ServerEngineActor("engine-1.0", settings(), tmp_path / "logs", 1)
    await other.load(tmp_path, "float32", 1, 3)
    client = EngineClient("c")
    client.add_engine("engine-0.0", engine)
    asked = [asyncio.create_task(client.generate(request(f"r{number}", 400))) for number in range(3)]
    await until(lambda: engine._traffic.first_token_at is not None, "the first token")
    client.add_engine("engine-1.0", other)
    pid = await engine.server_pid()
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    killed_at = time.monotonic()
    with pytest.raises(ServerDied, match="tiny died: killed by signal SIGKILL"):
        await engine.alive()
    assert time.monotonic() - killed_at < 10
    for done in await asyncio.gather(*asked):
        assert done.tokens.tolist() == list(range(103, 503))
    assert client.continued == 3
    with pytest.raises(ServerDied):
        await engine.health()
    await client.close()
    await other.stop()


@pytest.fixture
async def patient(tmp_path: Path) -> AsyncIterator[ServerEngineActor]:
    """An engine that waits long for answers."""
    made = ServerEngineActor("engine-0.0", settings(request_timeout_s=PATIENT_S), tmp_path / "logs")
    await made.load(tmp_path, "float32", 1, 3)
    yield made
    await made.stop()


async def kill_core(engine: ServerEngineActor) -> float:
    """SIGKILL for the process below the server, which goes on without it; returns when (Unix seconds)."""
    pid = await engine.server_pid()
    assert pid is not None
    (core,) = psutil.Process(pid).children()
    killed_at = time.time()
    core.kill()
    return killed_at


async def never_answered(engine: ServerEngineActor, path: str) -> None:
    await engine._connection.ask(Call("POST", "/misbehave", {"path": path, "how": "silence", "times": 1}))


async def asked_for(engine: ServerEngineActor, path: str) -> None:
    """Until the server has been asked for ``path``."""
    async with asyncio.timeout(20):
        while True:
            seen = json.loads(await engine._connection.ask(Call("POST", "/seen", {})))
            if any(each["path"] == path for each in seen):
                return
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("moving", ["stage", "pause", "commit", None])
async def test_a_killed_process_below_a_server_is_noticed_whatever_the_server_still_waits_for(
    patient: ServerEngineActor, tmp_path: Path, moving: str | None
) -> None:
    """The server's own process lives on, and the call of the weights that it was asked for is never answered."""
    other = ServerEngineActor("engine-1.0", settings(), tmp_path / "logs", 1)
    await other.load(tmp_path, "float32", 1, 3)
    client = EngineClient("c")
    client.add_engine("engine-0.0", patient)
    asked = [asyncio.create_task(client.generate(request(f"r{number}", 2000))) for number in range(3)]
    await until(lambda: patient._traffic.first_token_at is not None, "the first token")
    client.add_engine("engine-1.0", other)
    sender = SharedMemorySender()
    offer = sender.prepare(4, [("w", torch.zeros(3))], ["engine-0.0"])
    call: asyncio.Task[int] | None = None
    if moving is not None:
        await never_answered(patient, f"/{moving}")
        if moving != "stage":
            await patient.stage(offer)
        call = asyncio.create_task(patient.stage(offer) if moving == "stage" else patient.commit(4, "keep"))
        await asked_for(patient, f"/{moving}")
    killed_at = await kill_core(patient)
    with pytest.raises(ServerDied, match=r"tiny died: its process .*tiny::core \(pid \d+\) ended"):
        async with asyncio.timeout(AT_ONCE_S):
            await patient.alive()
    if call is not None:
        with pytest.raises(ServerDied, match="tiny::core"):
            async with asyncio.timeout(AT_ONCE_S):
                await call
    with pytest.raises(ServerDied):
        await patient.stage(offer)
    for done in await asyncio.gather(*asked):
        assert done.tokens.tolist() == list(range(103, 2103))
    assert client.continued == 3
    assert client.losses["engine-0.0"].requests == 3
    assert client.losses["engine-0.0"].placed.is_set()
    assert client.losses["engine-0.0"].placed_at - killed_at < AT_ONCE_S
    await client.close()
    await other.stop()
    sender.close()


async def test_a_server_that_listens_no_more_is_dead(patient: ServerEngineActor, tmp_path: Path) -> None:
    """Of an external server one sees no process."""
    pid = await patient.server_pid()
    assert pid is not None
    external = ServerEngineActor(
        "engine-0.1", settings(urls=[patient._connection.url], request_timeout_s=PATIENT_S), tmp_path
    )
    await external.load(tmp_path, "float32", 1, 3)
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(ServerDied, match=r"nothing listens at http://127\.0\.0\.1:\d+ any more"):
        async with asyncio.timeout(AT_ONCE_S):
            await external.alive()
    await external.stop()


async def test_a_server_that_hangs_is_noticed(engine: ServerEngineActor) -> None:
    pid = await engine.server_pid()
    assert pid is not None
    await submit(engine, request(max_tokens=4000))
    os.kill(pid, signal.SIGSTOP)
    async with asyncio.timeout(15):
        with pytest.raises(ServerDied, match=r"has answered nothing for|fails again and again"):
            await engine.alive()
    with pytest.raises(ServerDied):
        await result(engine)
    await engine.stop()
    assert all_gone([pid], 1)


async def test_an_external_server_is_used_and_left_alone(engine: ServerEngineActor, tmp_path: Path) -> None:
    pid = await engine.server_pid()
    assert pid is not None
    port = next(c.laddr.port for c in psutil.Process(pid).net_connections() if c.status == psutil.CONN_LISTEN)
    config = settings(urls=[f"http://127.0.0.1:{port}"])
    fresh = ServerEngineActor("engine-0.0", config, tmp_path)
    with pytest.raises(ServerNotStarted, match="holds version 3 of another run, and this one begins with version 0"):
        await fresh.load(tmp_path, "float32", 1, 0)
    external = ServerEngineActor("engine-0.1", config, tmp_path)
    await external.load(tmp_path, "float32", 1, 0)
    await submit(external, request())
    assert (await result(external)).tokens.tolist() == list(range(103, 113))
    await external.stop()
    assert psutil.pid_exists(pid)


async def test_a_wrong_version_in_the_environment_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TinyAdapter, "expected_version", "99.0")
    engine = ServerEngineActor("engine-0.0", settings(), tmp_path)
    with pytest.raises(EnvironmentUnfit, match=r"and Millrace drives tiny 99\.0; run `make engines`"):
        await engine.load(tmp_path, "float32", 1, 0)
