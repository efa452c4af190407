"""How weights leave a learner: from its own process, and from two real ranks that each send a share."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from learner_fixtures import make_groups, make_learner, train_step

from learner.backends.rank_actor import RankActor, RankSettings
from learner.backends.rank_group import RankGroup
from learner.config import LearnerConfig, ModelConfig
from learner.learner import Learner
from learner.publishing import OwnPublisher, Publisher, RanksPublisher, SendingPlace
from weight_sync.config import WeightsConfig
from weight_sync.errors import WeightTransferError
from weight_sync.transports.protocol import ShardedOffer, decode_offer
from weight_sync.transports.select import AnyReceiver

BUCKET_MB = 0.02


def place(kind: str, directory: Path, **settings: Any) -> SendingPlace:
    weights = WeightsConfig(bucket_mb=BUCKET_MB, timeout_s=30.0, **settings)
    return SendingPlace(weights, kind, (socket.gethostname(),), str(directory))


def published(publisher: Publisher, receiver: AnyReceiver, version: int) -> tuple[bytes, dict[str, torch.Tensor]]:
    """The offer, and what an engine gets of it."""
    publisher.prepare(version)
    offer, arrived = publisher.offer(["e0"]), dict[str, torch.Tensor]()
    thread = threading.Thread(target=publisher.send)
    thread.start()
    assert receiver.fetch(offer, lambda name, tensor: arrived.__setitem__(name, tensor.clone())) == version
    thread.join(30)
    return offer, arrived


@pytest.fixture(scope="module")
def ranked(model_directory: Path) -> Iterator[tuple[Learner, RankGroup]]:
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    config = LearnerConfig(warm_up_steps=0, device="cpu", ranks=2, lr=1e-3)
    kind = ray.remote(RankActor).options(num_cpus=0, max_concurrency=100)
    ranks = [kind.remote(RankSettings(rank, 2, config, "float32", 1, 1, 60.0)) for rank in range(2)]
    group = RankGroup(ranks, config, 60.0)
    learner = Learner(config, ModelConfig(), max_lag=4, seed=1, group=group)
    learner.load(model_directory)
    yield learner, group
    ray.shutdown()


@pytest.mark.parametrize(
    ("kind", "settings"),
    [("shared_memory", {}), ("collective", {}), ("relay", {"delta": True}), ("disk", {"dtype": "bfloat16"})],
)
def test_every_rank_sends_its_share_and_an_engine_gets_all(
    ranked: tuple[Learner, RankGroup], kind: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    learner, group = ranked
    publisher, receiver = RanksPublisher(place(kind, tmp_path, **settings), group), AnyReceiver("e0")
    for version in (1, 2):
        train_step(learner, make_groups(2, seed=version, version=learner.version))
        offer, arrived = published(publisher, receiver, version)
        expected = dict(group.named_tensors())
        assert arrived.keys() == expected.keys()
        for name, tensor in expected.items():
            wanted = tensor.to(torch.bfloat16) if "dtype" in settings else tensor
            assert torch.equal(arrived[name], wanted), name
    decoded = decode_offer(offer)
    assert isinstance(decoded, ShardedOffer)
    shares = [decode_offer(part).manifest.total_bytes for part in decoded.parts]
    assert len(shares) == 2
    assert max(shares) < 0.75 * sum(shares), "no rank sends (nearly) all of it"
    receiver.close()
    publisher.close()


def test_a_rank_that_cannot_lay_its_share_out_fails_the_version_and_holds_nobody_up(
    ranked: tuple[Learner, RankGroup], tmp_path: Path
) -> None:
    learner, group = ranked
    publisher = RanksPublisher(place("disk", tmp_path / "gone"), group)
    (tmp_path / "gone").rename(tmp_path / "moved")
    (tmp_path / "gone").write_text("no directory")
    with pytest.raises(Exception, match="version 1 cannot be written to"):
        publisher.prepare(1)
    (tmp_path / "gone").unlink()
    (tmp_path / "moved").rename(tmp_path / "gone")
    _, arrived = published(publisher, AnyReceiver("e0"), 2)
    assert arrived.keys() == dict(group.named_tensors()).keys()
    assert train_step(learner, make_groups(2, seed=9, version=learner.version))["loss"] == pytest.approx(0, abs=10)
    publisher.close()


def test_one_process_publishes_what_it_has(model_directory: Path, tmp_path: Path) -> None:
    learner = make_learner(model_directory)
    publisher = OwnPublisher(place("shared_memory", tmp_path), learner.device, learner.named_tensors)
    with pytest.raises(WeightTransferError, match="no version has been prepared"):
        publisher.offer(["e0"])
    _, arrived = published(publisher, AnyReceiver("e0"), 1)
    expected = dict(learner.named_tensors())
    assert arrived.keys() == expected.keys()
    assert all(torch.equal(arrived[name], tensor) for name, tensor in expected.items())
    publisher.close()
