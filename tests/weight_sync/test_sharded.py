"""One version from several senders."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from in_one_process import Taker, evolving_weights

from weight_sync.config import WeightsConfig
from weight_sync.errors import WeightTransferError
from weight_sync.tensors import each_once
from weight_sync.transports.protocol import ShardedOffer, decode_offer, encode_offer
from weight_sync.transports.select import make_sender
from weight_sync.transports.sharded import join_offers, share_of


@given(st.lists(st.integers(1, 50), max_size=30), st.integers(1, 5), st.integers(1, 400))
def test_every_tensor_has_one_sender_and_all_walk_to_the_end(sizes: list[int], world: int, bucket_bytes: int) -> None:
    walked = []

    def named() -> Iterator[tuple[str, torch.Tensor]]:
        for index, size in enumerate(sizes):
            yield f"t{index}", torch.zeros(size)
        walked.append(True)

    shares = [[name for name, _ in share_of(named(), rank, world, bucket_bytes)] for rank in range(world)]
    assert sorted(name for share in shares for name in share) == sorted(f"t{index}" for index in range(len(sizes)))
    assert len(walked) == world


def test_nothing_is_kept_of_what_others_send() -> None:
    """At most one gathered tensor is alive that is not this rank's."""
    import weakref

    alive: list[weakref.ref[torch.Tensor]] = []
    most = 0

    def named() -> Iterator[tuple[str, torch.Tensor]]:
        nonlocal most
        for index in range(20):
            tensor = torch.full((64,), float(index))
            alive.append(weakref.ref(tensor))
            yield f"t{index}", tensor
            del tensor
            most = max(most, sum(ref() is not None for ref in alive))

    for _ in share_of(each_once(named()), 0, 4, 256):
        pass
    assert most <= 2


@pytest.mark.parametrize("kind", ["shared_memory", "collective", "relay", "disk"])
@pytest.mark.parametrize("delta", [False, True])
def test_an_engine_gets_the_shares_of_all(kind: str, delta: bool, tmp_path: Path) -> None:
    import threading

    config = WeightsConfig(delta=delta, bucket_mb=0.005, timeout_s=20.0)
    senders = [make_sender(config, kind, directory=tmp_path, disk_directory=tmp_path / f"d{r}") for r in range(2)]
    taker = Taker("e0")
    for version, named in zip(range(1, 4), evolving_weights(), strict=False):
        for rank, sender in enumerate(senders):
            sender.prepare(version, share_of(iter(named), rank, 2, config.bucket_bytes), [])
        offer = join_offers([sender.offer(["e0"]) for sender in senders])
        fetched: list[Any] = []
        thread = threading.Thread(target=_note, args=(fetched, taker, offer))
        thread.start()
        for sender in senders:  # at once in a run: in one process, broadcasts wait for each other
            sender.send()
        thread.join(60)
        assert fetched == [version], taker.error
        taker.expect(named)
    for sender in senders:
        sender.close()


def _note(into: list[Any], taker: Taker, offer: bytes) -> None:
    into.append(taker.fetch(offer))


def test_parts_that_are_not_one_version_are_refused(tmp_path: Path) -> None:
    a, b = (make_sender(WeightsConfig(), "shared_memory", directory=tmp_path) for _ in range(2))
    one, two = a.prepare(1, [("a", torch.ones(2))], []), b.prepare(2, [("b", torch.ones(2))], [])
    with pytest.raises(WeightTransferError, match=r"different versions: \[1, 2\]"):
        join_offers([one, two])
    same = b.prepare(1, [("a", torch.ones(2))], [])
    with pytest.raises(WeightTransferError, match="a was given twice"):
        join_offers([one, same])
    good = decode_offer(join_offers([one, b.prepare(1, [("b", torch.ones(2))], [])]))
    assert isinstance(good, ShardedOffer)
    taker = Taker("e0")
    assert taker.fetch(encode_offer(msgspec.structs.replace(good, parts=good.parts[:1]))) is None
    assert "its parts do not hold the tensors that it names" in taker.error
    assert taker.tensors == {}
    a.close()
    b.close()
