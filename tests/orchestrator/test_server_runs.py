"""Whole runs of the real command over real servers: they train, survive a killed server, and leave nothing behind."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import numpy as np
import psutil
import pytest
from contract_engine import require_environment
from run_processes import MillraceProcess, assert_balanced, command_line, summary_of, training_lines
from server_helpers import all_gone

from rollout_workers.engines.config import EnginesConfig
from rollout_workers.engines.protocol import GenerateRequest
from rollout_workers.engines.servers.adapter import Launch, ServerAdapter
from rollout_workers.engines.servers.bring_up import Server, ServerTimes, start_server
from rollout_workers.engines.servers.environment import ROOT, interpreter_of
from rollout_workers.engines.servers.registry import make_adapter

KINDS = ["vllm", "sglang"]
SMALL = [
    "rollout.groups_per_update=4",
    "rollout.group_size=4",
    "rollout.concurrency=16",
    "tasks.held_out=8",
    "tasks.environment=coin_environment:CoinEnvironment",
    "engines.slots=16",
    "run.startup_timeout_s=600",
]
PATIENCE_S = 600.0
MISMATCH = 1e-5
"""Mean k3 estimate for tokens of the learner's own version: 4e-7 is measured, the engines' kernels are not the learner's."""


def settings(kind: str, model: Path, run: Path, *more: str) -> list[str]:
    return ["configs/smoke.yaml", f"engines.kind={kind}", f"model.path={model}", f"run.dir={run}", *SMALL, *more]


def servers(kind: str, model: Path) -> list[psutil.Process]:
    """The server processes that serve this model (not what they started)."""
    found = []
    for process in psutil.process_iter():
        try:
            mine = f".venv-{kind}" in command_line(process) and str(model) in command_line(process)
            if mine and "guardian.py" in command_line(process.parent() or process):
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return [process for process in found if "guardian.py" not in command_line(process)]


@pytest.mark.engines
@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_over_a_real_server_trains_and_leaves_nothing_behind(kind: str, tiny_model: Path, tmp_path: Path) -> None:
    require_environment(kind)
    run = tmp_path / "run"
    arguments = settings(kind, tiny_model, run, "run.steps=5", "weights.kv=recompute")
    process = MillraceProcess("train", *arguments, directory=run)
    process.wait_for_step(2, PATIENCE_S)
    (server,) = servers(kind, tiny_model)
    started = [server.pid, *(child.pid for child in server.children(recursive=True))]
    assert process.wait(PATIENCE_S) == 0, process.output[-3000:]
    summary = summary_of(run)
    assert summary["status"] == "finished"
    assert_balanced(summary)
    assert summary["ledger"]["trained"] == 5 * 4
    assert summary["lag_max"] <= summary["max_lag"]
    lines = training_lines(run)
    assert len(lines) == 5
    fresh = [line["kl/mismatch_lag0"] for line in lines if line["step"] > 1 and "kl/mismatch_lag0" in line]
    assert fresh, "no token was trained on at the version that sampled it"
    assert all(value < MISMATCH for value in fresh), fresh
    assert (run / "logs" / f"engine-0.0-{kind}.log").stat().st_size > 0
    assert all_gone(started, 30)


@pytest.mark.engines_slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kind", KINDS)
def test_kill_9_of_a_server_under_load_does_not_end_the_run(kind: str, tiny_model: Path, tmp_path: Path) -> None:
    require_environment(kind)
    run = tmp_path / "run"
    arguments = settings(kind, tiny_model, run, "run.steps=16", "engines.replicas=2", "cluster.num_cpus=8")
    process = MillraceProcess("train", *arguments, directory=run)
    process.wait_for_step(2, PATIENCE_S)
    killed = servers(kind, tiny_model)[0]
    os.kill(killed.pid, signal.SIGKILL)
    assert process.wait(2 * PATIENCE_S) == 0, process.output[-3000:]
    summary = summary_of(run)
    assert summary["status"] == "finished"
    assert_balanced(summary)
    assert summary["ledger"]["trained"] == 16 * 4
    assert summary["actors_replaced"] >= 1
    assert "killed by signal SIGKILL" in process.output
    assert servers(kind, tiny_model) == []


async def external_server(adapter: ServerAdapter, model: Path, log: Path) -> Server:
    """A server that no run owns, long enough for `settings`."""

    def launch_at(port: int) -> Launch:
        return Launch(
            model_path=str(model),
            host="127.0.0.1",
            port=port,
            member="engine-0.0",
            device="cpu",
            max_len=160,
            threads=1,
            python=str(interpreter_of(adapter.name, None)),
            plugin_path=str(ROOT),
        )

    return await start_server(
        adapter, launch_at, log, ServerTimes(startup_timeout_s=PATIENCE_S, request_timeout_s=60.0)
    )


async def sampled_by(adapter: ServerAdapter, server: Server, version: int) -> list[int]:
    """A few tokens from the server, asked as a run asks."""
    asked = GenerateRequest(request_id="a", session_id="a", prompt=np.arange(5, 15, dtype=np.int32), max_tokens=4)
    parser = adapter.parser(asked, version)
    chunks = []
    async with asyncio.timeout(60), server.connection.stream(adapter.generate(asked, version)) as (status, body):
        assert status == 200
        async for part in body:
            chunks += parser.feed(part)
    return [int(token) for chunk in [*chunks, *parser.finish()] for token in chunk.tokens]


@pytest.mark.engines_slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("kind", KINDS)
async def test_an_external_server_is_used_left_alone_and_not_used_twice(
    kind: str, tiny_model: Path, tmp_path: Path
) -> None:
    require_environment(kind)
    adapter = make_adapter(EnginesConfig(kind=kind, device="cpu"), tiny_model)
    server = await external_server(adapter, tiny_model, tmp_path / "server.log")
    try:
        assert server.process is not None
        run, again = tmp_path / "run", tmp_path / "again"
        more = ["run.steps=3", f"engines.{kind}.urls=[{server.connection.url}]"]
        process = MillraceProcess("train", *settings(kind, tiny_model, run, *more), directory=run)
        assert await asyncio.to_thread(process.wait, PATIENCE_S) == 0, process.output[-3000:]
        summary = summary_of(run)
        assert summary["status"] == "finished"
        assert summary["ledger"]["trained"] == 3 * 4
        assert not list((run / "logs").glob(f"engine-*-{kind}.log")), "the run started a server of its own"
        assert not server.process.ended.is_set()
        assert adapter.parse_served(await server.connection.ask(adapter.served())) == 3
        assert 1 <= len(await sampled_by(adapter, server, 3)) <= 4

        other = MillraceProcess("train", *settings(kind, tiny_model, again, *more), directory=again)
        assert await asyncio.to_thread(other.wait, PATIENCE_S) == 1
        assert "holds version 3 of another run" in other.output
        assert not server.process.ended.is_set()
    finally:
        await server.close()
