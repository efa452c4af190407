"""Bytes a second of each transport, beside what this machine's memory and a raw broadcast of one flat buffer give.

Learner and engine are two processes. A version is laid out (`prepare`, while training waits), offered, and fetched into
tensors that the engine has already. After every transport of a round, the same process copies as many bytes from memory to
memory, and both processes broadcast one flat buffer of as many bytes; shares are taken round by round, so that what else the
machine does meets both.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.weights.engines import Fetched, Receivers, raw_broadcast

WARM_UP = 2
"""Rounds that do not count: senders have two files that take turns, and each is touched for the first time once."""

HIDDEN, KV, MLP = 1024, 512, 3072
"""Shapes of the matrices of one layer: 26 MiB in bfloat16, as of a model of 0.6 B parameters."""


@dataclass
class Round:
    """Seconds of one round of one transport."""

    prepare: float
    fetch: float
    move: float
    """From the offer until the engine has everything."""
    memcpy: float
    raw: float


@dataclass
class Way:
    """A transport and its settings."""

    name: str
    transport: str
    settings: dict[str, Any] = field(default_factory=dict)


WAYS = (
    Way("shared_memory", "shared_memory"),
    Way("shared_memory, checksums", "shared_memory", {"checksums": True}),
    Way("collective", "collective"),
    Way("relay", "relay"),
    Way("disk", "disk"),
)


def make_weights(megabytes: float) -> list[tuple[str, Any]]:
    """Layers of random bfloat16 matrices, ``megabytes`` MiB or a little more."""
    import torch

    named: list[tuple[str, Any]] = []
    total, layer = 0, 0
    shapes = {
        "self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.k_proj": (KV, HIDDEN), "self_attn.v_proj": (KV, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HIDDEN), "mlp.gate_proj": (MLP, HIDDEN), "mlp.up_proj": (MLP, HIDDEN),
        "mlp.down_proj": (HIDDEN, MLP), "input_layernorm": (HIDDEN,), "post_attention_layernorm": (HIDDEN,),
    }  # fmt: skip
    while total < megabytes * 2**20:
        for name, shape in shapes.items():
            tensor = torch.rand(shape).to(torch.bfloat16)
            named.append((f"model.layers.{layer}.{name}.weight", tensor))
            total += tensor.nbytes
            if total >= megabytes * 2**20:
                break
        layer += 1
    return named


class Memcpy:
    """One thread copying from memory to memory."""

    def __init__(self, nbytes: int) -> None:
        import torch

        self._source, self._target = (torch.full((nbytes,), n, dtype=torch.uint8) for n in (1, 2))

    def seconds(self) -> float:
        began = time.perf_counter()
        self._target.copy_(self._source)
        return time.perf_counter() - began


def measure(megabytes: float, repeats: int, bucket_mb: float, ways: Sequence[Way] = WAYS) -> dict[str, Any]:
    """All transports. ``repeats`` rounds count; of those before, in which memory is touched for the first time, the first is shown."""
    import torch

    from weight_sync.config import WeightsConfig
    from weight_sync.relay.stager import Stager
    from weight_sync.transports.select import make_sender

    torch.set_num_threads(1)
    named = make_weights(megabytes)
    nbytes = sum(tensor.nbytes for _, tensor in named)
    memcpy, receivers = Memcpy(nbytes), Receivers(["engine"])
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="millrace-weights-") as directory:
        reference = _Reference(memcpy, receivers, str(Path(directory) / "store"), nbytes)
        stager = Stager()
        senders = {
            way.name: make_sender(
                WeightsConfig(bucket_mb=bucket_mb, timeout_s=120.0, **way.settings),
                way.transport,
                disk_directory=Path(directory) / "disk",
            )
            for way in ways
        }
        rounds: dict[str, list[Round]] = {way.name: [] for way in ways}
        try:
            for number in range(repeats + WARM_UP):
                for way in ways:
                    rounds[way.name].append(
                        one_round(senders[way.name], stager, named, number + 1, receivers, reference)
                    )
            found = {name: summary(each, nbytes) for name, each in rounds.items()}
        finally:
            receivers.close()
            stager.close()
            for sender in senders.values():
                sender.close()
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()
    return {"bytes": nbytes, "tensors": len(named), "ways": found}


@dataclass
class _Reference:
    memcpy: Memcpy
    receivers: Receivers
    store: str
    nbytes: int

    def raw(self) -> float:
        self.receivers.tell("raw", (self.store, 2, self.nbytes))
        mine = raw_broadcast(0, self.store, 2, self.nbytes)
        return max(mine, float(self.receivers.answer("engine")))


def one_round(
    sender: Any, stager: Any, named: list[tuple[str, Any]], version: int, receivers: Receivers, reference: _Reference
) -> Round:
    """Publish once, and measure what memory and gloo do right after it."""
    from weight_sync.transports.protocol import with_routes

    began = time.monotonic()
    sender.prepare(version, iter(named), [])
    prepared = time.monotonic()
    receivers.tell("fetch", with_routes(sender.offer(["engine"]), {"engine": stager.address}))
    sender.send()
    fetched: Fetched = receivers.answer("engine")
    if fetched.version != version:
        raise RuntimeError(f"version {version} did not arrive: {fetched.error}")
    return Round(
        prepared - began,
        fetched.ended_at - fetched.began_at,
        fetched.ended_at - prepared,
        reference.memcpy.seconds(),
        reference.raw(),
    )


def summary(rounds: list[Round], nbytes: int) -> dict[str, Any]:
    """Of the rounds that count: medians, and shares taken round by round."""
    first, counted = rounds[0], rounds[WARM_UP:]

    def rate(seconds: list[float]) -> float:
        return round(nbytes / statistics.median(seconds) / 1e9, 3)

    def share(numbers: list[float]) -> dict[str, float]:
        return {
            "median": round(statistics.median(numbers), 3),
            "least": round(min(numbers), 3),
            "most": round(max(numbers), 3),
        }

    return {
        "prepare_gb_per_s": rate([each.prepare for each in counted]),
        "fetch_gb_per_s": rate([each.fetch for each in counted]),
        "publish_s": round(statistics.median([each.prepare + each.move for each in counted]), 4),
        "first_publish_s": round(first.prepare + first.move, 4),
        "memcpy_gb_per_s": rate([each.memcpy for each in counted]),
        "raw_gloo_gb_per_s": rate([each.raw for each in counted]),
        # Every byte is copied twice: into the file, and out of it.
        "of_memcpy": share([2 * each.memcpy / (each.prepare + each.fetch) for each in counted]),
        "fetch_of_memcpy": share([each.memcpy / each.fetch for each in counted]),
        "of_raw_gloo": share([each.raw / each.move for each in counted]),
    }
