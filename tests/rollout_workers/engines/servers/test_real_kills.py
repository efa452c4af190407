"""Real servers whose engine process is killed below them while they wait for it."""

from __future__ import annotations

import asyncio
import signal
import time
from pathlib import Path

import psutil
import pytest
from contract_engine import Engine
from contract_model import write_model
from server_helpers import all_gone

from rollout_workers.engines.servers.actor import ServerEngineActor
from rollout_workers.engines.servers.errors import ServerDied
from rollout_workers.engines.servers.inner import inner_processes
from rollout_workers.engines.servers.registry import make_adapter

pytestmark = [pytest.mark.engines_slow, pytest.mark.timeout(900)]
AT_ONCE_S = 5.0


@pytest.mark.parametrize("kind", ["vllm", "sglang"])
async def test_a_server_that_waits_for_a_killed_process_is_dead_at_once(kind: str, tmp_path: Path) -> None:
    """vLLM answers no call that was under way, and does not end as long as one is open."""
    engine = await Engine.start(kind, write_model(tmp_path / "model"), tmp_path / "logs")
    actor = engine.actor
    assert isinstance(actor, ServerEngineActor)
    pid = await actor.server_pid()
    assert pid is not None
    adapter = make_adapter(actor._config, tmp_path / "model")
    inner = max(inner_processes(pid, adapter.inner), key=lambda process: process.memory_info().rss)
    started = [pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))]
    inner.send_signal(signal.SIGSTOP)  # the commit is under way, for certain
    commit = asyncio.create_task(actor.commit(1, "keep"))
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(asyncio.shield(commit), 2)
    killed_at = time.monotonic()
    inner.kill()
    for call in (actor.alive(), commit):
        with pytest.raises(ServerDied, match=rf"{kind} died: its process \w+::\w+ \(pid {inner.pid}\) ended"):
            await asyncio.wait_for(call, AT_ONCE_S)
    assert time.monotonic() - killed_at < AT_ONCE_S
    await actor.stop()
    assert all_gone(started, 30)
