from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from weight_sync.engine_plugin.shadow import Phase, Shadow, any_fetcher
from weight_sync.errors import WeightTransferError
from weight_sync.transports.protocol import decode_offer
from weight_sync.transports.shared_memory import SharedMemorySender

WAIT_S = 30.0


def weights(version: int, size: int = 4) -> list[tuple[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(version)
    return [("a", torch.randn(size, 3, generator=generator)), ("b", torch.randn(5, generator=generator))]


@pytest.fixture
def sender(tmp_path: Path) -> Any:
    made = SharedMemorySender(directory=tmp_path)
    yield made
    made.close()


class GatedFetcher:
    """Hands over the tensors of a version when its gate opens; ``fails`` names the versions that break."""

    def __init__(self, fails: tuple[int, ...] = ()) -> None:
        self.gates = {version: threading.Event() for version in range(10)}
        self.started: list[int] = []
        self.fails = fails

    def fetch(self, offer: bytes, on_tensor: Callable[[str, Any], None]) -> int:
        version = decode_offer(offer).manifest.version
        self.started.append(version)
        for name, tensor in weights(version):
            on_tensor(name, tensor)
            assert self.gates[version].wait(WAIT_S)
        if version in self.fails:
            raise WeightTransferError("the learner is gone")
        return version

    def close(self) -> None: ...


def test_a_staged_version_holds_the_sender_s_bits(sender: SharedMemorySender) -> None:
    shadow = Shadow(any_fetcher)
    for version in (1, 2, 3):
        assert shadow.begin(sender.prepare(version, weights(version)), "e0") == version
        assert shadow.wait(WAIT_S).phase is Phase.READY
        for (name, tensor), (wanted_name, wanted) in zip(shadow.take(version), weights(version), strict=True):
            assert name == wanted_name
            assert torch.equal(tensor, wanted)
    shadow.close()


def test_memory_is_used_again(sender: SharedMemorySender) -> None:
    shadow = Shadow(any_fetcher)
    places = []
    for version in (1, 2):
        shadow.begin(sender.prepare(version, weights(version)), "e0")
        shadow.wait(WAIT_S)
        places.append([tensor.data_ptr() for _, tensor in shadow.take(version)])
    assert places[0] == places[1]


def test_nothing_can_be_taken_before_all_of_it_is_there(sender: SharedMemorySender) -> None:
    fetcher = GatedFetcher()
    shadow = Shadow(lambda member, device: fetcher)
    with pytest.raises(WeightTransferError, match="none was offered"):
        shadow.take(1)
    shadow.begin(sender.prepare(1, weights(1)), "e0")
    with pytest.raises(WeightTransferError, match="version 1 is fetching"):
        shadow.take(1)
    fetcher.gates[1].set()
    shadow.wait(WAIT_S)
    with pytest.raises(WeightTransferError, match="version 2 is not staged: version 1 is ready"):
        shadow.take(2)
    assert len(shadow.take(1)) == 2


def test_a_failure_is_told_and_the_next_stage_works(sender: SharedMemorySender) -> None:
    fetcher = GatedFetcher(fails=(1,))
    for gate in fetcher.gates.values():
        gate.set()
    shadow = Shadow(lambda member, device: fetcher)
    shadow.begin(sender.prepare(1, weights(1)), "e0")
    state = shadow.wait(WAIT_S)
    assert (state.phase, state.version) == (Phase.FAILED, 1)
    assert "the learner is gone" in state.error
    with pytest.raises(WeightTransferError, match="the learner is gone"):
        shadow.take(1)
    shadow.begin(sender.prepare(2, weights(2)), "e0")
    assert shadow.wait(WAIT_S).phase is Phase.READY


def test_a_newer_offer_replaces_the_one_under_way(sender: SharedMemorySender) -> None:
    fetcher = GatedFetcher()
    shadow = Shadow(lambda member, device: fetcher)
    shadow.begin(sender.prepare(1, weights(1)), "e0")
    shadow.begin(sender.prepare(2, weights(2)), "e0")
    shadow.begin(sender.prepare(3, weights(3)), "e0")
    fetcher.gates[1].set()
    fetcher.gates[3].set()
    assert shadow.wait(WAIT_S).version == 3
    assert fetcher.started in ([1, 3], [3])
    assert torch.equal(dict(shadow.take(3))["a"], weights(3)[0][1])
    with pytest.raises(WeightTransferError):
        shadow.take(1)


def test_garbage_is_no_offer() -> None:
    shadow = Shadow(any_fetcher)
    with pytest.raises(WeightTransferError, match="not an offer"):
        shadow.begin(b"\x93garbage", "e0")
    assert shadow.state.phase is Phase.EMPTY


def test_waiting_is_bounded(sender: SharedMemorySender) -> None:
    fetcher = GatedFetcher()
    shadow = Shadow(lambda member, device: fetcher)
    shadow.begin(sender.prepare(4, weights(4)), "e0")
    with pytest.raises(WeightTransferError, match=r"version 4 was not fetched within 0\.01 s"):
        shadow.wait(0.01)
    fetcher.gates[4].set()
    shadow.wait(WAIT_S)


def test_tensors_may_change_their_shape(sender: SharedMemorySender) -> None:
    shadow = Shadow(any_fetcher)
    for version, size in ((1, 4), (2, 6)):
        shadow.begin(sender.prepare(version, weights(version, size)), "e0")
        shadow.wait(WAIT_S)
        assert torch.equal(dict(shadow.take(version))["a"], weights(version, size)[0][1])
