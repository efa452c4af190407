"""Records what a real SGLang server answers, for ``golden/sglang``.

Run it against a server that `SglangAdapter.command` started with the model and the settings of the contract suite::

    PYTHONPATH=tests/rollout_workers python tests/rollout_workers/engines/sglang/record_golden.py \\
        http://127.0.0.1:PORT MODEL_DIRECTORY [DIRECTORY]
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

from golden_answers import DIRECTORY, SERVED, Golden, counted, request

from rollout_workers.engines.protocol import KvPolicy
from rollout_workers.engines.servers.http import ServerConnection
from rollout_workers.engines.sglang.adapter import SglangAdapter
from rollout_workers.engines.sglang.config import SglangConfig

ADAPTER = SglangAdapter(SglangConfig())
SLOTS = 16
"""Of the server."""
COUNTED = (
    "sglang:num_",
    "sglang:token_usage",
    "sglang:generation_tokens",
    "sglang:prompt_tokens",
    "sglang:cached_tokens",
)
IDENTITY = ("version", "context_length", "max_total_num_tokens", "sampling_backend")
"""Of hundreds of settings those that are read."""
STATE = ("weight_version", "model_type", "is_generation")


async def record_aborts(golden: Golden, server: ServerConnection) -> None:
    await golden.aborted(server, "aborted")
    # What is sent during a pause does not reach the scheduler; a request without tokens is one that waits for a slot.
    started = [asyncio.Event() for _ in range(SLOTS)]
    full = [
        asyncio.create_task(golden.stream(server, request(f"busy-{index}", max_tokens=400), begun))
        for index, begun in enumerate(started)
    ]
    await asyncio.gather(*(begun.wait() for begun in started))
    await golden.aborted(server, "aborted-before-the-first-token", without_tokens=True)
    await asyncio.gather(*full)


async def record_control(golden: Golden, server: ServerConnection) -> None:
    refused, state = ADAPTER.stage(b"no offer", "engine-0.0")
    pause, begin, update, end, resume = ADAPTER.adopt(SERVED)
    calls = {
        "ready": ADAPTER.ready(),
        "pause": pause,
        "ready-while-paused": ADAPTER.ready(),
        "begin": begin,
        "update": update,
        "end": end,
        "resume": resume,
        "served": ADAPTER.served(),
        "metrics": ADAPTER.metrics(),
        "identity": ADAPTER.identity(),
        "state": state,
        "stage-refused": refused,
        "commit-refused": ADAPTER.commit(99, KvPolicy.KEEP)[0],
        "update-outside": update,
    }
    await golden.control(server, calls, shortened)


def shortened(name: str, body: bytes) -> bytes:
    if name == "metrics":
        return counted(body, COUNTED)
    if name == "identity":
        info = json.loads(body)
        return json.dumps({**{key: info[key] for key in IDENTITY}, "model_path": "/model"}).encode()
    if name in ("ready", "ready-while-paused", "served"):
        info = json.loads(body)
        return json.dumps({key: info[key] for key in STATE}).encode()
    return body


async def main(url: str, model: str, directory: str = str(DIRECTORY)) -> None:
    golden = Golden(ADAPTER, Path(directory))

    async def recording(server: ServerConnection) -> None:
        # A token id outside the vocabulary ends the server; Millrace refuses it before a server is asked.
        await golden.generate_all(server, request("top-p", temperature=1.0, top_p=0.8, seed=11))
        await golden.stop_string(server, Path(model))
        await record_aborts(golden, server)
        await golden.two_versions(server, ADAPTER.adopt(SERVED + 1))
        await record_control(golden, server)

    await golden.connected(url, recording)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
