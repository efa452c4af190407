"""Records what a real vLLM server answers, for ``golden/vllm``.

Run it against a server that `VllmAdapter.command` started with the model of the contract suite::

    PYTHONPATH=tests/rollout_workers python tests/rollout_workers/engines/vllm/record_golden.py \\
        http://127.0.0.1:PORT MODEL_DIRECTORY [DIRECTORY]
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

import numpy as np
from golden_answers import DIRECTORY, SERVED, Golden, counted, request

from rollout_workers.engines.protocol import PauseMode
from rollout_workers.engines.servers.http import ServerConnection
from rollout_workers.engines.vllm.adapter import VllmAdapter
from rollout_workers.engines.vllm.config import VllmConfig

ADAPTER = VllmAdapter(VllmConfig())
COUNTED = ("vllm:num_requests", "vllm:kv_cache_usage", "vllm:generation_tokens", "vllm:prompt_tokens", "vllm:prefix_")


async def record_aborts(golden: Golden, server: ServerConnection) -> None:
    await golden.aborted(server, "aborted")
    await server.control(ADAPTER, ADAPTER.pause(PauseMode.KEEP_KV))
    await golden.aborted(server, "aborted-before-the-first-token", without_tokens=True)
    await server.control(ADAPTER, ADAPTER.resume())


async def record_control(golden: Golden, server: ServerConnection) -> None:
    pause, forget = ADAPTER.pause(PauseMode.KEEP_REQUESTS)
    begin, staged = ADAPTER.stage(b"no offer", "engine-0.0")
    prepare, adopt = ADAPTER.adopt(SERVED)
    calls = {
        "ready": ADAPTER.ready(),
        "pause": pause,
        "forget": forget,
        "ready-while-paused": ADAPTER.ready(),
        "resume": ADAPTER.resume()[0],
        "prepare": prepare,
        "adopt": adopt,
        "served": ADAPTER.served(),
        "metrics": ADAPTER.metrics(),
        "identity": ADAPTER.identity(),
        "staged": staged,
        "begin-refused": begin,
    }
    await golden.control(server, calls, shortened)


def shortened(name: str, body: bytes) -> bytes:
    if name == "metrics":
        return counted(body, COUNTED)
    if name == "identity":
        return json.dumps({"results": [{**json.loads(body)["results"][0], "model": "/model"}]}).encode()
    return body


async def main(url: str, model: str, directory: str = str(DIRECTORY)) -> None:
    golden = Golden(ADAPTER, Path(directory))

    async def recording(server: ServerConnection) -> None:
        await golden.generate_all(server, request("no-token", prompt=np.array([10_000], np.int32)))
        await golden.stop_string(server, Path(model))
        await record_aborts(golden, server)
        paused, resumed = ADAPTER.pause(PauseMode.KEEP_KV), ADAPTER.resume()
        await golden.two_versions(server, [*paused, *ADAPTER.adopt(SERVED + 1), *resumed])
        await record_control(golden, server)

    await golden.connected(url, recording)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
