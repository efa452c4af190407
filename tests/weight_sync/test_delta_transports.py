"""Versions as changes over every transport: bit-exact, refused without their base, and then whole."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from in_one_process import Taker, evolving_weights, move

from weight_sync.config import WeightsConfig
from weight_sync.errors import WeightTransferError
from weight_sync.relay.stager import Stager
from weight_sync.transports.delta import DeltaSender
from weight_sync.transports.numpy_receiver import NumpyReceiver
from weight_sync.transports.protocol import WHOLE, DeltaOffer, decode_offer, with_routes
from weight_sync.transports.select import make_sender

KINDS = ["shared_memory", "collective", "disk", "relay"]


def make(kind: str, directory: Path, every: int = 4) -> Any:
    config = WeightsConfig(delta=True, delta_snapshot_every=every, bucket_mb=0.02, timeout_s=20.0)
    return make_sender(config, kind, directory=directory, disk_directory=directory / "disk")


@pytest.fixture(params=KINDS)
def sender(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Any]:
    made = make(request.param, tmp_path)
    yield made
    made.close()


def base_of(offer: bytes) -> int:
    decoded = decode_offer(offer)
    assert isinstance(decoded, DeltaOffer)
    return decoded.base


def test_every_version_arrives_bit_for_bit_with_whole_ones_at_intervals(sender: Any) -> None:
    taker, bases, moved = Taker("e0"), [], []
    for version, named in zip(range(1, 8), evolving_weights(), strict=False):
        sender.prepare(version, iter(named), [])
        offer = sender.offer(["e0"])
        bases.append(base_of(offer))
        moved.append(sender.moved_bytes)
        assert move(sender, [taker], offer) == [version]
        taker.expect(named)
    assert bases == [WHOLE, 1, 2, 3, WHOLE, 5, 6]
    assert max(moved[1:4]) < moved[0] / 10


@pytest.mark.parametrize("sender", [kind for kind in KINDS if kind != "collective"], indirect=True)
def test_who_joins_gets_the_whole_version_and_changes_from_then_on(sender: Any) -> None:
    """Over `collective` see test_transports: a process takes part in one broadcast at a time."""
    first, late = Taker("e0"), Taker("late")
    weights = evolving_weights()
    sender.prepare(1, next(weights), [])
    move(sender, [first])
    sender.prepare(2, named := next(weights), [])
    assert move(sender, [first]) == [2]
    assert move(sender, [late]) == [2]
    late.expect(named)
    sender.prepare(3, named := next(weights), [])
    offer = sender.offer(["e0", "late"])
    assert base_of(offer) == 2
    assert move(sender, [first, late], offer) == [3, 3]
    for taker in (first, late):
        taker.expect(named)


def test_a_change_without_its_base_is_refused_and_the_next_offer_is_whole(sender: Any) -> None:
    weights, taker = evolving_weights(), Taker("e0")
    sender.prepare(1, next(weights), [])
    move(sender, [taker])
    taker.receiver._held.clear()
    taker.tensors = {}
    sender.prepare(2, named := next(weights), [])
    offer = sender.offer(["e0"])
    assert base_of(offer) == 1
    assert move(sender, [taker], offer) == [None]
    assert "version 2 is a change of version 1, and nothing is here: ask for a full copy" in taker.error
    assert taker.tensors == {}
    assert move(sender, [taker]) == [2]
    taker.expect(named)


def test_a_damaged_base_is_refused_by_name_and_healed(tmp_path: Path) -> None:
    sender, taker, weights = make("shared_memory", tmp_path), Taker("e0"), evolving_weights()
    sender.prepare(1, next(weights), [])
    move(sender, [taker])
    (held,) = taker.receiver._held.values()
    held._flat[200] ^= 1
    sender.prepare(2, named := next(weights), [])
    assert move(sender, [taker]) == [None]
    assert "tensor embed.weight is here as version 1, and not what version 2 was made from" in taker.error
    assert move(sender, [taker]) == [2]
    taker.expect(named)
    sender.close()


def test_versions_of_another_learner_are_no_base(tmp_path: Path) -> None:
    taker, weights = Taker("e0"), evolving_weights()
    old, new = make("shared_memory", tmp_path), make("shared_memory", tmp_path)
    for sender in (old, new):
        sender.prepare(1, next(weights), [])
        assert move(sender, [taker]) == [1]
    assert len(taker.receiver._held) == 1, "the copy of the learner that is gone is let go of"
    new.prepare(2, named := next(weights), [])
    assert move(new, [taker]) == [2]
    taker.expect(named)
    old.close()
    new.close()


def test_a_version_that_failed_to_be_laid_out_does_not_spoil_the_chain(tmp_path: Path) -> None:
    sender, taker, weights = make("shared_memory", tmp_path), Taker("e0"), evolving_weights()
    sender.prepare(1, next(weights), [])
    move(sender, [taker])

    def broken() -> Iterator[tuple[str, torch.Tensor]]:
        yield next(weights)[0]
        raise RuntimeError("a rank was lost")

    with pytest.raises(RuntimeError, match="a rank was lost"):
        sender.prepare(2, broken(), [])
    with pytest.raises(WeightTransferError, match="no version has been prepared"):
        sender.offer(["e0"])
    for version in (3, 4):
        sender.prepare(version, named := next(weights), [])
        assert move(sender, [taker]) == [version]
        taker.expect(named)
    sender.close()


def test_engines_without_torch_apply_changes_too(tmp_path: Path) -> None:
    sender, receiver = make("shared_memory", tmp_path), NumpyReceiver("e0")
    for version in (1, 2, 3):
        named = [("w", torch.arange(3000, dtype=torch.float32) + (torch.arange(3000) < version))]
        sender.prepare(version, named, [])
        arrived: dict[str, Any] = {}
        receiver.fetch(sender.offer(["e0"]), lambda name, array, into=arrived: into.__setitem__(name, array.copy()))
        np.testing.assert_array_equal(arrived["w"], named[0][1].numpy())
    sender.close()


def test_an_engine_joins_by_the_chain_that_its_stager_holds_without_the_learner(tmp_path: Path) -> None:
    from weight_sync.relay.relayed import Relayed

    sender, stager, relayed = make("relay", tmp_path), Stager(directory=tmp_path), Relayed()
    taker, late, weights = Taker("e0"), Taker("late"), evolving_weights()
    for version in range(1, 8):
        sender.prepare(version, named := next(weights), [])
        offer = sender.offer(["e0"])
        relayed.add(offer)
        assert move(sender, [taker], with_routes(offer, {"e0": stager.address})) == [version]
    sender.close()  # the learner is gone
    chain = relayed.offers_of(7)
    assert [base_of(offer) for offer in chain] == [WHOLE, 5, 6]
    assert relayed.offers_of(6) == []
    for offer in chain:
        late.fetch(with_routes(offer, {"late": stager.address}))
    late.expect(named)
    stager.close()


def test_sends_nothing_to_nobody_and_says_so_when_asked_too_early(tmp_path: Path) -> None:
    sender = make("shared_memory", tmp_path)
    assert isinstance(sender, DeltaSender)
    with pytest.raises(WeightTransferError, match="no version has been prepared"):
        sender.offer(["e0"])
    offer = sender.prepare(1, next(evolving_weights()), [])
    sender.send()
    taker = Taker("e0")
    assert taker.fetch(offer) is None
    assert "version 1 was offered to nobody" in taker.error
    sender.close()


def test_an_engine_may_get_offers_of_several_transports_in_turn(tmp_path: Path) -> None:
    """Each keeps what it needs from version to version: process group, base, mapped files."""
    taker, weights = Taker("e0"), evolving_weights()
    plain = [make_sender(WeightsConfig(timeout_s=20.0), kind) for kind in ("collective", "relay")]
    senders = [*plain, make("shared_memory", tmp_path)]
    for version in (1, 2, 3):
        named = next(weights)
        for sender in senders:
            sender.prepare(version, iter(named), [])
            assert move(sender, [taker]) == [version], taker.error
            taker.expect(named)
    for sender in senders:
        sender.close()
