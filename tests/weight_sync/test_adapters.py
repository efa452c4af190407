"""Adapters on the wire: what an engine makes of them, over every transport, and what it refuses."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from weight_sync.adapters import adapter_names, is_adapter, merged, merged_manifest
from weight_sync.base_weights import BaseWeights
from weight_sync.config import WeightsConfig
from weight_sync.engine_plugin.checkpoint import arriving, checkpoint_shapes, misfit
from weight_sync.engine_plugin.shadow import Phase, Shadow, fetcher_for
from weight_sync.errors import WeightTransferError
from weight_sync.transports.protocol import decode_offer
from weight_sync.transports.select import AnyReceiver, make_sender
from weight_sync.transports.sharded import join_offers

Q, UP, NORM = "model.layers.0.self_attn.q_proj.weight", "model.layers.0.mlp.up_proj.weight", "model.norm.weight"
SHAPES = {Q: (6, 8), UP: (10, 8), NORM: (8,)}
RANK = 2


@pytest.fixture
def base(tmp_path: Path) -> Path:
    directory = tmp_path / "base"
    directory.mkdir()
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    save_file(tensors, directory / "model.safetensors")
    return directory


def weights_of(directory: Path) -> dict[str, torch.Tensor]:
    base = BaseWeights(directory)
    return {name: base.tensor(name).clone() for name in base.specs}


def adapter(seed: int, weights: tuple[str, ...] = (Q, UP)) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for weight in weights:
        rows, columns = SHAPES[weight]
        low, high = adapter_names(weight)
        found[low] = torch.randn(RANK, columns, generator=generator)
        found[high] = torch.randn(rows, RANK, generator=generator)
    return found


def expected_of(directory: Path, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The formula, in float64."""
    whole = weights_of(directory)
    for weight in (Q, UP):
        low, high = (tensors[name].double() for name in adapter_names(weight))
        whole[weight] = (whole[weight].double() + high @ low).float()
    return whole


@pytest.mark.parametrize(
    ("kind", "delta"), [("shared_memory", False), ("collective", False), ("relay", False), ("disk", True)]
)
def test_every_version_is_merged_into_the_pristine_weights(base: Path, tmp_path: Path, kind: str, delta: bool) -> None:
    """Twenty versions later an engine holds what one that joins only then does, bit for bit."""
    config = WeightsConfig(delta=delta, timeout_s=20.0)
    sender = make_sender(config, kind, directory=tmp_path, disk_directory=tmp_path / "disk")
    receiver, late = (AnyReceiver(name, base=BaseWeights(base)) for name in ("e0", "e1"))
    held: dict[str, torch.Tensor] = {}
    for version in range(1, 21):
        tensors = adapter(version)
        offer = sender.prepare(version, list(tensors.items()), ["e0"])
        sending = threading.Thread(target=sender.send)
        sending.start()
        held = {}
        assert receiver.fetch(offer, lambda name, tensor: held.__setitem__(name, tensor.clone())) == version  # noqa: B023
        sending.join(20)
    for name, tensor in expected_of(base, adapter(20)).items():
        torch.testing.assert_close(held[name], tensor, rtol=1e-6, atol=1e-6)
    assert torch.equal(held[NORM], weights_of(base)[NORM])
    joined: dict[str, torch.Tensor] = {}
    offer = sender.offer(["e1"])
    sending = threading.Thread(target=sender.send)
    sending.start()
    late.fetch(offer, lambda name, tensor: joined.__setitem__(name, tensor.clone()))
    sending.join(20)
    assert joined.keys() == held.keys() == SHAPES.keys()
    assert all(torch.equal(joined[name], held[name]) for name in held)
    for part in (receiver, late, sender):
        part.close()


def test_halves_of_a_pair_may_come_from_different_senders(base: Path, tmp_path: Path) -> None:
    tensors = adapter(3)
    lows = {name: tensor for name, tensor in tensors.items() if "lora_A" in name}
    senders = [make_sender(WeightsConfig(), "disk", disk_directory=tmp_path / str(n)) for n in range(2)]
    shares = [lows, {name: tensor for name, tensor in tensors.items() if name not in lows}]
    offers = [s.prepare(1, list(share.items()), []) for s, share in zip(senders, shares, strict=True)]
    held: dict[str, torch.Tensor] = {}
    receiver = AnyReceiver("e0", base=BaseWeights(base))
    receiver.fetch(join_offers(offers), lambda name, tensor: held.__setitem__(name, tensor.clone()))
    for name, tensor in expected_of(base, tensors).items():
        torch.testing.assert_close(held[name], tensor, rtol=1e-6, atol=1e-6)


def test_a_servers_shadow_holds_the_whole_model(base: Path, tmp_path: Path) -> None:
    sender = make_sender(WeightsConfig(), "shared_memory", directory=tmp_path)
    offer = sender.prepare(1, list(adapter(1).items()), [])
    expected, files = checkpoint_shapes(base), BaseWeights(base)
    assert expected is not None
    manifest = arriving(decode_offer(offer).manifest, expected, files)
    assert misfit(manifest, expected, False) is None
    shadow = Shadow(fetcher_for(expected, files))
    shadow.begin(offer, "e0")
    assert shadow.wait(20).phase is Phase.READY, shadow.state
    taken = dict(shadow.take(1))
    assert {name: tuple(tensor.shape) for name, tensor in taken.items()} == SHAPES
    for name, tensor in expected_of(base, adapter(1)).items():
        torch.testing.assert_close(taken[name], tensor, rtol=1e-6, atol=1e-6)
    shadow.close()
    sender.close()


def test_dtypes_of_what_arrives(base: Path) -> None:
    weight = torch.randn(6, 8).to(torch.bfloat16)
    low, high = torch.randn(2, 8), torch.randn(6, 2)
    assert merged(weight, low, high).dtype is torch.float32, "a float32 engine loses nothing"
    half = merged(weight, low.to(torch.bfloat16), high.to(torch.bfloat16))
    exact = weight.double() + high.to(torch.bfloat16).double() @ low.to(torch.bfloat16).double()
    assert torch.equal(half, exact.to(torch.bfloat16)), "one rounding, at the end"
    sender = make_sender(WeightsConfig(), "disk", disk_directory=base.parent / "versions")
    offer = decode_offer(sender.prepare(1, [(n, t.to(torch.bfloat16)) for n, t in adapter(1).items()], []))
    kinds = {spec.name: spec.dtype for spec in merged_manifest(offer.manifest, BaseWeights(base)).tensors}
    assert kinds == dict.fromkeys(SHAPES, "float32")


def test_what_does_not_fit_is_refused_by_name(base: Path, tmp_path: Path) -> None:
    sender = make_sender(WeightsConfig(), "disk", disk_directory=tmp_path / "versions")
    whole = adapter(1)
    low, high = adapter_names(Q)

    def refused(tensors: dict[str, torch.Tensor], message: str, directory: Path = base) -> None:
        offer = sender.prepare(1, list(tensors.items()), [])
        with pytest.raises(WeightTransferError, match=message):
            AnyReceiver("e0", base=BaseWeights(directory)).fetch(offer, lambda name, tensor: None)

    refused({name: tensor for name, tensor in whole.items() if name != high}, "only one half of .*q_proj")
    refused({**whole, high: torch.zeros(5, RANK)}, r"has shape \(6, 8\), its adapter B \(5, 2\) times A \(2, 8\)")
    other = {name.replace("q_proj", "k_proj"): tensor for name, tensor in whole.items()}
    refused(other, "has no model.layers.0.self_attn.k_proj.weight")
    refused({**whole, NORM: torch.zeros(8)}, "tensors of an adapter and others")
    (tmp_path / "bare").mkdir()
    refused(whole, "must hold them as safetensors", tmp_path / "bare")
    (tmp_path / "fp8").mkdir()
    save_file({Q: torch.zeros(6, 8), Q + "_scale_inv": torch.ones(1, 1)}, tmp_path / "fp8" / "model.safetensors")
    refused({low: whole[low], high: whole[high]}, "8-bit weights", tmp_path / "fp8")
    with pytest.raises(WeightTransferError, match="merged into the weights of the engine's model directory"):
        AnyReceiver("e0").fetch(sender.prepare(1, list(whole.items()), []), lambda name, tensor: None)


def test_a_directory_that_points_to_its_base_and_one_that_points_nowhere(base: Path, tmp_path: Path) -> None:
    served = tmp_path / "served"
    served.mkdir()
    save_file({name: torch.zeros(shape) for name, shape in SHAPES.items()}, served / "model.safetensors")
    (served / "base_model.json").write_text(f'{{"base_model": "{base}"}}')
    assert torch.equal(weights_of(served)[Q], weights_of(base)[Q])
    (served / "base_model.json").write_text("{}")
    with pytest.raises(WeightTransferError, match="does not name a model directory"):
        weights_of(served)
    (base / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(WeightTransferError, match="no readable safetensors file"):
        weights_of(base)


def test_names_tell_an_adapter() -> None:
    assert adapter_names(Q) == (
        "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight",
        "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight",
    )
    assert is_adapter(adapter(1))
    assert not is_adapter(SHAPES)
    assert not is_adapter([])
