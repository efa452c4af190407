"""Millrace's plugin in SGLang's scheduler: what passes through SGLang's own hooks, and what it does with a model.

The model is a torch module with SGLang's two methods. That SGLang really calls them is shown with the real server, in
the contract suite.
"""

from __future__ import annotations

import base64
import json
import pickle
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from weight_sync.engine_plugin import sglang_loader
from weight_sync.engine_plugin.sglang_messages import (
    MODEL_PATH,
    Command,
    PluginState,
    carrier,
    decode_command,
    decode_reply,
    decode_state,
    encode_command,
    encode_state,
)
from weight_sync.errors import WeightTransferError
from weight_sync.transports.collective import CollectiveSender
from weight_sync.transports.shared_memory import SharedMemorySender

WAIT_S = 30.0


class Served(torch.nn.Module):
    """As much of a model of SGLang's as the plugin touches."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(4, 3)
        self.second = torch.nn.Linear(3, 2, bias=False)
        self.loads = 0

    def load_weights(self, weights: list[tuple[str, torch.Tensor]]) -> None:
        parameters = dict(self.named_parameters())
        for name, tensor in weights:
            parameters[name].copy_(tensor)
        self.loads += 1

    def get_weights_by_name(self, name: str, truncate_size: int = 100) -> list[float]:
        return [float(value) for value in dict(self.named_parameters())[name].flatten()[:truncate_size]]


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Served:
    model = Served()
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    monkeypatch.setenv(MODEL_PATH, str(tmp_path))
    hook(model, Command(kind="attach"))
    return model


@pytest.fixture
def sender(tmp_path: Path) -> Iterator[SharedMemorySender]:
    sender = SharedMemorySender(directory=tmp_path)
    yield sender
    sender.close()


def hook(model: Any, command: Command) -> None:
    """What SGLang does with the body of an update call."""
    named_tensors = pickle.loads(base64.b64decode(carrier(command)))
    sglang_loader.load(model, [(name, tensor.to("cpu")) for name, tensor in named_tensors])


def ask(model: Any, command: Command) -> PluginState:
    """What SGLang does with a question for weights by name, and what Millrace reads of the answer."""
    parameter = model.get_weights_by_name(encode_command(command), 1)
    return decode_reply(json.dumps([float(number) for number in parameter]).encode())


def staged(model: Any, offer: bytes, member: str = "e0") -> PluginState:
    state = ask(model, Command(kind="stage", offer=offer, member=member))
    deadline = time.monotonic() + WAIT_S
    while state.staging:
        assert time.monotonic() < deadline, "the offer was not fetched in time"
        time.sleep(0.002)
        state = ask(model, Command(kind="state"))
    return state


def weights(value: float) -> dict[str, torch.Tensor]:
    return {name: torch.full_like(tensor, value) for name, tensor in Served().state_dict().items()}


def test_staged_beside_the_served_weights_then_loaded(model: Served, sender: SharedMemorySender) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = staged(model, sender.prepare(3, weights(0.5).items()))
    assert state == PluginState(version=3)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not ask(model, Command(kind="expect", version=3)).error
    hook(model, Command(kind="commit", version=3))
    assert all(bool((tensor == 0.5).all()) for tensor in model.state_dict().values())
    assert model.loads == 1


def test_fifty_versions_one_after_another(model: Served, sender: SharedMemorySender) -> None:
    for version in range(1, 51):
        assert staged(model, sender.prepare(version, weights(float(version)).items())).version == version
        hook(model, Command(kind="commit", version=version))
        assert model.second.weight.flatten()[0].item() == float(version)


def test_by_broadcast(model: Served) -> None:
    sender = CollectiveSender(timeout_s=WAIT_S)
    offer = sender.prepare(1, weights(2.0).items(), ["e0"])
    ask(model, Command(kind="stage", offer=offer, member="e0"))
    sender.send()
    deadline = time.monotonic() + WAIT_S
    while (state := ask(model, Command(kind="state"))).staging:
        assert time.monotonic() < deadline, "the broadcast did not end in time"
        time.sleep(0.002)
    assert state == PluginState(version=1)
    hook(model, Command(kind="commit", version=1))
    assert model.second.weight.flatten()[0].item() == 2.0
    sglang_loader.plugin_of(model).close()
    sender.close()


def test_the_models_own_weights_can_still_be_asked_for(model: Served) -> None:
    assert model.get_weights_by_name("second.weight", 2) == model.second.weight.flatten()[:2].tolist()


def test_the_plugin_is_no_part_of_the_model(model: Served) -> None:
    hook(model, Command(kind="attach"))
    assert set(model.state_dict()) == set(Served().state_dict())
    assert len(list(model.children())) == 2


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda named: named.update({"third.weight": torch.zeros(1)}), "the model has no third.weight"),
        (lambda named: named.pop("first.bias"), "first.bias missing"),
        (lambda named: named.update({"first.bias": torch.zeros(4)}), r"first.bias has shape \(4,\)"),
    ],
)
def test_what_does_not_fit_is_refused_before_a_byte_moves(
    change: Any, says: str, model: Served, sender: SharedMemorySender
) -> None:
    named = weights(1.0)
    change(named)
    refused = ask(model, Command(kind="stage", offer=sender.prepare(4, named.items()), member="e0"))
    assert not refused.staging
    assert re.search(says, refused.error)
    assert ask(model, Command(kind="expect", version=4)).error
    with pytest.raises(WeightTransferError, match="version 4 is not staged"):
        hook(model, Command(kind="commit", version=4))
    assert model.loads == 0


def test_a_fetch_that_fails_is_told_and_the_next_one_works(model: Served, sender: SharedMemorySender) -> None:
    lost = sender.prepare(5, weights(1.0).items())
    sender.prepare(6, weights(1.0).items())
    sender.prepare(7, weights(2.0).items())  # the two files take turns: version 5 is written over
    assert "version" in staged(model, lost).error
    assert staged(model, sender.offer()) == PluginState(version=7)
    hook(model, Command(kind="commit", version=7))
    assert model.loads == 1


@pytest.mark.parametrize(
    "command",
    [Command(kind="stage", offer=b"\x00 garbage", member="e0"), Command(kind="commit", version=1)],
)
def test_questions_never_raise(model: Served, command: Command) -> None:
    assert ask(model, command).error


def test_the_loader_takes_commands_only(model: Served) -> None:
    with pytest.raises(ValueError, match="no command of Millrace"):
        sglang_loader.load(model, [("model.embed_tokens.weight", torch.zeros(1))])
    with pytest.raises(ValueError, match="for a weight loader"):
        hook(model, Command(kind="state"))
    with pytest.raises(WeightTransferError, match="not attached"):
        hook(Served(), Command(kind="commit", version=1))


@given(st.binary(max_size=300), st.text(max_size=20), st.integers(-1, 2**40))
def test_commands_and_states_arrive_as_sent(offer: bytes, text: str, version: int) -> None:
    command = Command(kind="stage", offer=offer, member=text, version=version)
    assert decode_command(encode_command(command)) == command
    ((name, tensor),) = pickle.loads(base64.b64decode(carrier(command)))
    assert decode_command(name) == command
    assert tensor.numel() == 0
    state = PluginState(version=version, staging=True, error=text)
    assert decode_state(encode_state(state)) == state


@given(st.one_of(st.binary(max_size=40), st.text(max_size=40).map(lambda text: json.dumps(text).encode())))
def test_foreign_answers_are_value_errors(body: bytes) -> None:
    with pytest.raises(ValueError, match="plugin"):
        decode_reply(body)
