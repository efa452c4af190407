from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from safetensors.torch import load_file, save_file

from weight_sync.config import WeightsConfig
from weight_sync.errors import WeightTransferError
from weight_sync.transports.disk import FILE, KEPT, DiskReceiver, DiskSender
from weight_sync.transports.protocol import DiskOffer, decode_offer, encode_offer
from weight_sync.transports.select import make_sender


def weights(version: int) -> list[tuple[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(version)
    return [
        ("embed.weight", torch.randn(6, 4, generator=generator)),
        ("norm.weight", torch.randn(4, generator=generator).to(torch.bfloat16)),
    ]


def fetched(offer: bytes) -> dict[str, torch.Tensor]:
    arrived: dict[str, torch.Tensor] = {}
    DiskReceiver().fetch(offer, lambda name, tensor: arrived.__setitem__(name, tensor.clone()))
    return arrived


def path_of(offer: bytes) -> Path:
    decoded = decode_offer(offer)
    assert isinstance(decoded, DiskOffer)
    return Path(decoded.path)


def test_a_version_is_an_ordinary_safetensors_file(tmp_path: Path) -> None:
    sender = DiskSender(directory=tmp_path)
    offer = sender.prepare(3, weights(3))
    stored = load_file(path_of(offer) / FILE)
    for name, tensor in weights(3):
        assert torch.equal(stored[name], tensor)
        assert torch.equal(fetched(offer)[name], tensor)


def test_only_the_newest_versions_stay_and_close_removes_them(tmp_path: Path) -> None:
    sender = DiskSender(directory=tmp_path)
    offers = [sender.prepare(version, weights(version)) for version in range(1, 5)]
    assert len(list(tmp_path.iterdir())) == KEPT
    with pytest.raises(WeightTransferError, match="version 1 "):
        fetched(offers[0])
    assert torch.equal(fetched(offers[-1])["embed.weight"], weights(4)[0][1])
    sender.close()
    assert list(tmp_path.iterdir()) == []


def damage(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:100])


def shrink(file: Path) -> None:
    save_file({"embed.weight": torch.zeros(2, 2), "norm.weight": torch.zeros(4, dtype=torch.bfloat16)}, file)


def lose_one(file: Path) -> None:
    save_file({"embed.weight": torch.zeros(6, 4)}, file)


@pytest.mark.parametrize("harm", [damage, shrink, lose_one, Path.unlink])
def test_what_is_not_the_offered_version_is_refused(tmp_path: Path, harm: Any) -> None:
    offer = DiskSender(directory=tmp_path).prepare(1, weights(1))
    harm(path_of(offer) / FILE)
    with pytest.raises(WeightTransferError):
        fetched(offer)


def test_an_unreadable_offer_names_the_node_that_wrote_it(tmp_path: Path) -> None:
    offer = decode_offer(DiskSender(directory=tmp_path).prepare(1, weights(1)))
    moved = msgspec.structs.replace(offer, node="elsewhere", path=str(tmp_path / "gone"))
    with pytest.raises(WeightTransferError, match="elsewhere"):
        fetched(encode_offer(moved))


def test_a_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(WeightTransferError, match=r"weights\.directory"):
        DiskSender(directory=tmp_path / "file" / "below")


def test_the_configuration_chooses_the_directory(tmp_path: Path) -> None:
    chosen = make_sender(
        WeightsConfig(transport="disk", directory=str(tmp_path / "a")), "disk", disk_directory=tmp_path
    )
    assert str(tmp_path / "a") in str(path_of(chosen.prepare(1, weights(1), [])))
    with pytest.raises(ValueError, match=r"weights\.directory"):
        make_sender(WeightsConfig(transport="disk"), "disk")
