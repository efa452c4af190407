"""TransferQueue's key-value interface under the load of `millrace bench queue`; runs in an environment of its own.

Reads one JSON request a line and answers each with one line ``RESULT {...}``. An item is one row of four tensors, of the
dtypes of a Millrace trajectory.
"""

from __future__ import annotations

import asyncio
import json
import sys
import threading
import time
from importlib.metadata import version
from typing import Any

import numpy as np
import ray
import torch
import transfer_queue
from omegaconf import OmegaConf
from tensordict import TensorDict

BYTES_A_TOKEN = 13
STORAGE_UNITS = 2
CAPACITY = 100_000
PARTITION = "bench"
WAIT_S = 20.0


def answer(content: dict[str, Any]) -> None:
    sys.stdout.write("RESULT " + json.dumps(content) + "\n")
    sys.stdout.flush()


def row(item_bytes: int, seed: int) -> dict[str, torch.Tensor]:
    """One item: every tensor has one row."""
    rng = np.random.default_rng(seed)
    tokens = max(item_bytes // BYTES_A_TOKEN, 2)
    sampled = np.arange(tokens) >= max(tokens // 10, 1)
    arrays = {
        "tokens": rng.integers(0, 150_000, tokens).astype(np.int32),
        "trainable": sampled,
        "logprobs": rng.standard_normal(tokens).astype(np.float32),
        "versions": np.where(sampled, 0, -1).astype(np.int32),
    }
    return {name: torch.from_numpy(array)[None] for name, array in arrays.items()}


class Bench:
    """One request after another; keys are never used twice."""

    def __init__(self) -> None:
        self._made = 0

    def run(self, request: dict[str, Any]) -> dict[str, Any]:
        count, batch = request["count"], request["batch"]
        item = row(request["item_bytes"], request["seed"])
        keys = [f"k{self._made + i}" for i in range(count)]
        self._made += count
        results = {request["put"]: self._put(request, item, keys)}
        get = {"put single": ("get single", 1), "put batched": ("get batched", batch)}.get(request["put"])
        if get is not None:
            name, limit = get
            batches = [keys[first : first + limit] for first in range(0, count, limit)]
            results[name] = timed(
                [lambda b=b: transfer_queue.kv_batch_get(keys=b, partition_id=PARTITION) for b in batches], count
            )
        transfer_queue.kv_clear(partition_id=PARTITION, keys=keys)
        return results

    def _put(self, request: dict[str, Any], item: dict[str, torch.Tensor], keys: list[str]) -> dict[str, Any]:
        if request["put"] == "put batched":
            size = request["batch"]
            rows = {name: tensor.expand(size, -1).contiguous() for name, tensor in item.items()}
            calls = [
                lambda k=keys[first : first + size]: transfer_queue.kv_batch_put(
                    keys=k,
                    partition_id=PARTITION,
                    fields=TensorDict(dict(rows), batch_size=[size]),
                    tags=[{"status": "ok"}] * size,
                )
                for first in range(0, len(keys), size)
            ]
            return timed(calls, len(keys))
        if request["put"] == "put pipelined":
            return asyncio.run(self._pipelined(request["in_flight"], item, keys))
        calls = [
            lambda k=key: transfer_queue.kv_put(
                key=k, partition_id=PARTITION, fields=TensorDict(dict(item), batch_size=[1]), tag={"status": "ok"}
            )
            for key in keys
        ]
        if request["put"] in ("put single", "put single, nobody waiting"):
            return timed(calls, len(calls))
        return self._while_a_consumer_waits(calls, request["batch"], list(item))

    async def _pipelined(self, in_flight: int, item: dict[str, torch.Tensor], keys: list[str]) -> dict[str, Any]:
        left, seconds = list(reversed(keys)), []

        async def lane() -> None:
            while left:
                key = left.pop()
                began_at = time.perf_counter()
                fields = TensorDict(dict(item), batch_size=[1])
                await transfer_queue.async_kv_put(key=key, partition_id=PARTITION, fields=fields, tag={"status": "ok"})
                seconds.append(time.perf_counter() - began_at)

        began_at = time.perf_counter()
        await asyncio.gather(*(lane() for _ in range(in_flight)))
        return {"seconds": time.perf_counter() - began_at, "calls_s": seconds, "items": len(keys)}

    def _while_a_consumer_waits(self, calls: list[Any], batch: int, fields: list[str]) -> dict[str, Any]:
        """All puts but the last while a consumer has asked for the whole batch."""
        from transfer_queue.interface import _maybe_create_tq_client

        client = _maybe_create_tq_client()
        asking = threading.Event()
        problems: list[str] = []

        def consume() -> None:
            asking.set()
            try:
                client.get_meta(
                    data_fields=fields, batch_size=batch, partition_id=PARTITION, mode="fetch", task_name="bench"
                )
            except Exception as error:  # noqa: BLE001 - what a starved consumer gets is part of the finding
                problems.append(f"{type(error).__name__}: {error}")

        consumer = threading.Thread(target=consume, daemon=True)
        consumer.start()
        asking.wait(WAIT_S)
        time.sleep(0.3)  # the request has to reach the controller; nothing says when it has
        few = calls[:4]  # each takes seconds while a consumer waits
        timing = timed(few, len(few))
        for call in calls[len(few) :]:
            call()
        consumer.join(WAIT_S)
        if problems:
            sys.stderr.write(f"the waiting consumer got {problems[0]}\n")
        return timing


def timed(calls: list[Any], items: int) -> dict[str, Any]:
    seconds = []
    began_at = time.perf_counter()
    for call in calls:
        call_at = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - call_at)
    return {"seconds": time.perf_counter() - began_at, "calls_s": seconds, "items": items}


def main() -> None:
    torch.set_num_threads(1)
    ray.init(
        address="local", num_cpus=16, include_dashboard=False, log_to_driver=False, object_store_memory=2 * 1024**3
    )
    storage = {"total_storage_size": CAPACITY, "num_data_storage_units": STORAGE_UNITS}
    transfer_queue.init(
        OmegaConf.create(
            {
                "metrics": {"enabled": False},
                "backend": {"storage_backend": "SimpleStorage", "SimpleStorage": storage},
            }
        )
    )
    answer({name: version(name) for name in ("TransferQueue", "ray", "torch")})
    bench = Bench()
    for line in sys.stdin:
        answer(bench.run(json.loads(line)))
    transfer_queue.close()
    ray.shutdown()


if __name__ == "__main__":
    main()
