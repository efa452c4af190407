from __future__ import annotations

import base64
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from weight_sync.config import WeightsConfig
from weight_sync.engine_plugin.shadow import Phase, Shadow, any_fetcher, fetcher_for
from weight_sync.engine_plugin.vllm_extension import MillraceWorker, Named, WorkerWeights, sampled_tokens
from weight_sync.errors import WeightTransferError
from weight_sync.plan import Manifest
from weight_sync.transports.collective import CollectiveSender
from weight_sync.transports.select import make_sender
from weight_sync.transports.shared_memory import SharedMemorySender
from weight_sync.wire_dtypes import on_the_wire

WAIT_S = 30.0
SHAPES = {"a": (2, 3), "b": (4,)}


def weights(version: int, shapes: dict[str, tuple[int, ...]] = SHAPES) -> Named:
    return [(name, torch.full(shape, float(version))) for name, shape in shapes.items()]


def no_share(manifest: Manifest, tensors: Named) -> Named:
    raise AssertionError("tensors of a file are read by every worker")


class Worker:
    """A worker whose model is a mapping; ``breaks`` makes the next load fail half way."""

    def __init__(self, first: bool = True, share: Any = no_share) -> None:
        self.model: dict[str, torch.Tensor] = dict(weights(0))
        self.breaks = False
        self.shadow = Shadow(any_fetcher)
        self.weights = WorkerWeights(
            shadow=self.shadow, expected=SHAPES, head_is_tied=False, first=first, load=self.load, share=share
        )

    def load(self, tensors: Named) -> None:
        for name, tensor in tensors:
            self.model[name] = tensor.clone()
            if self.breaks:
                raise RuntimeError("out of memory")


@pytest.fixture
def sender(tmp_path: Path) -> Any:
    made = SharedMemorySender(directory=tmp_path)
    yield made
    made.close()


def test_a_version_is_served_after_its_commit_and_not_before(sender: SharedMemorySender) -> None:
    worker = Worker()
    for version in (1, 2):
        assert worker.weights.stage(sender.prepare(version, weights(version)), "e0") == version
        worker.shadow.wait(WAIT_S)
        assert worker.weights.state() == {"phase": "ready", "version": version, "error": ""}
        assert float(worker.model["a"][0, 0]) == version - 1
        worker.weights.commit(version)
        assert {name: float(tensor.flatten()[0]) for name, tensor in worker.model.items()} == {
            "a": version,
            "b": version,
        }


@pytest.mark.parametrize(
    ("shapes", "named"),
    [
        ({"a": (2, 3)}, "b missing"),
        ({**SHAPES, "c": (1,)}, "no c"),
        ({"a": (3, 2), "b": (4,)}, r"a has shape \(3, 2\)"),
    ],
)
def test_an_offer_that_does_not_fit_is_refused_before_a_byte_moves(
    sender: SharedMemorySender, shapes: Any, named: str
) -> None:
    worker = Worker()
    with pytest.raises(WeightTransferError, match=named):
        worker.weights.stage(sender.prepare(1, weights(1, shapes)), "e0")
    assert worker.shadow.state.phase is Phase.EMPTY
    with pytest.raises(WeightTransferError, match="version 1 is not staged"):
        worker.weights.commit(1)
    assert float(worker.model["a"][0, 0]) == 0


def test_a_commit_of_what_is_not_staged_changes_nothing_and_can_be_made_good(sender: SharedMemorySender) -> None:
    worker = Worker()
    worker.weights.stage(sender.prepare(1, weights(1)), "e0")
    worker.shadow.wait(WAIT_S)
    with pytest.raises(WeightTransferError, match="version 2 is not staged"):
        worker.weights.commit(2)
    worker.weights.commit(1)
    assert float(worker.model["b"][0]) == 1


def test_after_a_load_that_broke_the_worker_refuses_every_version(sender: SharedMemorySender) -> None:
    worker = Worker()
    worker.weights.stage(sender.prepare(1, weights(1)), "e0")
    worker.shadow.wait(WAIT_S)
    worker.breaks = True
    with pytest.raises(RuntimeError, match="out of memory"):
        worker.weights.commit(1)
    worker.breaks = False
    with pytest.raises(WeightTransferError, match=r"damaged by an earlier failure: RuntimeError: out of memory"):
        worker.weights.commit(1)


def test_a_broadcast_reaches_all_workers_through_the_first() -> None:
    relayed: list[Named] = []

    def share(manifest: Manifest, tensors: Named) -> Named:
        if tensors:
            relayed.append(tensors)
        assert [spec.name for spec in manifest.tensors] == list(SHAPES)
        return relayed[-1]

    first, second = Worker(share=share), Worker(first=False, share=share)
    sender = CollectiveSender(timeout_s=WAIT_S)
    offer = sender.prepare(1, weights(1), ["e0"])
    for worker in (first, second):
        worker.weights.stage(offer, "e0")
    sender.send()
    first.shadow.wait(WAIT_S)
    assert first.weights.state()["phase"] == second.weights.state()["phase"] == "ready"
    assert second.shadow.state.phase is Phase.EMPTY
    for worker in (first, second):
        worker.weights.commit(1)
        assert torch.equal(worker.model["a"], torch.ones(2, 3))
    first.shadow.close()
    sender.close()


def test_tokens_are_counted_only_where_the_runner_is_certain() -> None:
    requests = {"generate-tokens-r-12ab": SimpleNamespace(output_token_ids=[5, 6, 7])}
    runner = SimpleNamespace(requests=requests)

    def config(ahead: bool) -> Any:
        return SimpleNamespace(scheduler_config=SimpleNamespace(async_scheduling=ahead))

    assert sampled_tokens(runner, config(False)) == {"generate-tokens-r-12ab": 3}
    assert sampled_tokens(runner, config(True)) == {}
    assert sampled_tokens(SimpleNamespace(), config(False)) == {}


def test_an_error_in_a_worker_is_an_answer(tmp_path: Path) -> None:
    worker = MillraceWorker()
    worker.vllm_config = SimpleNamespace(
        model_config=SimpleNamespace(model=str(tmp_path)), scheduler_config=SimpleNamespace(async_scheduling=False)
    )
    worker.model_runner, worker.device, worker.rank = SimpleNamespace(requests={}), torch.device("cpu"), 0
    answer = worker.millrace_stage(base64.b64encode(b"garbage").decode(), "e0")
    assert answer["ok"] is False
    assert "not an offer" in answer["error"]
    answer = worker.millrace_commit("3")
    assert answer == {"ok": False, "error": "WeightTransferError: version 3 is not staged: none was offered"}
    assert worker.millrace_staged() == {"ok": True, "phase": "empty", "version": None, "error": ""}


def test_staging_does_not_hold_up_its_caller(sender: SharedMemorySender) -> None:
    gate = threading.Event()

    class Slow:
        def fetch(self, offer: bytes, on_tensor: Any) -> int:
            assert gate.wait(WAIT_S)
            return 1

        def close(self) -> None: ...

    shadow = Shadow(lambda member, device: Slow())
    worker = WorkerWeights(
        shadow=shadow, expected=None, head_is_tied=False, first=True, load=lambda tensors: None, share=no_share
    )
    worker.stage(sender.prepare(1, weights(1)), "e0")
    assert worker.state()["phase"] == "fetching"
    gate.set()
    assert shadow.wait(WAIT_S).phase is Phase.READY


@pytest.mark.parametrize("settings", [{"delta": True}, {"dtype": "fp8_block"}, {"delta": True, "dtype": "fp8_block"}])
def test_changes_and_blocks_of_eight_bits_reach_a_model_of_plain_tensors(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    config = WeightsConfig(**settings)
    shapes = {"a_proj.weight": (200, 130), "norm.weight": (130,)}
    made = make_sender(config, "shared_memory", directory=tmp_path)
    model: dict[str, torch.Tensor] = {}
    expected: dict[str, torch.Tensor] = {name: torch.zeros(shape) for name, shape in shapes.items()}
    shadow = Shadow(fetcher_for(shapes))
    worker = WorkerWeights(
        shadow=shadow,
        expected=shapes,
        head_is_tied=False,
        first=True,
        load=lambda named: model.update(named),
        share=no_share,
    )
    for version in (1, 2, 3):
        for tensor in expected.values():
            tensor[version:] += 0.5
        made.prepare(version, on_the_wire(expected.items(), config.dtype), [])
        worker.stage(made.offer(["e0"]), "e0")
        assert shadow.wait(WAIT_S).error == ""
        worker.commit(version)
        for name, tensor in expected.items():
            torch.testing.assert_close(model[name].float(), tensor, rtol=1 / 16, atol=1e-6, msg=name)
    shadow.close()
    made.close()
