from __future__ import annotations

import pytest
import torch
from engine_helpers import make_engine, make_model, request, run_all

from rollout_workers.engines.torch_engine import WeightError
from rollout_workers.engines.torch_engine.weights import WeightStore
from weight_sync.file_names import FileNames


def filled(value: float) -> list[tuple[str, torch.Tensor]]:
    return [(name, torch.full_like(tensor, value)) for name, tensor in make_model().named_parameters()]


def stage(store: WeightStore, version: int, tensors: list[tuple[str, torch.Tensor]]) -> None:
    store.stage_begin(version)
    for name, tensor in tensors:
        store.stage_tensor(name, tensor)
    store.stage_end()


def test_staging_leaves_the_served_weights_alone_until_the_commit() -> None:
    model = make_model()
    model.requires_grad_(False)
    before = model.model.norm.weight.clone()
    store = WeightStore(model, 0)
    stage(store, 1, filled(2.0))
    assert torch.equal(model.model.norm.weight, before)
    store.commit(1)
    assert store.version == 1
    assert all((tensor == 2).all() for tensor in model.parameters())
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


def test_two_copies_of_the_weights_are_enough() -> None:
    model = make_model()
    store = WeightStore(model, 0)
    seen = set()
    for version in range(1, 7):
        stage(store, version, filled(float(version)))
        store.commit(version)
        seen.add(model.model.norm.weight.data_ptr())
    assert len(seen) == 2


def test_a_pinned_version_survives_later_updates() -> None:
    model = make_model()
    store = WeightStore(model, 0)
    stage(store, 1, filled(1.0))
    store.commit(1)
    store.pin(1)
    for version in (2, 3, 4):
        stage(store, version, filled(float(version)))
        store.commit(version)
    store.activate(1)
    assert (model.model.norm.weight == 1).all()
    store.activate(None)
    assert (model.model.norm.weight == 4).all()
    store.unpin(1)
    assert store.pinned == frozenset()


def test_an_incomplete_stage_cannot_be_committed_and_can_be_begun_again() -> None:
    store = WeightStore(make_model(), 0)
    tensors = filled(1.0)
    with pytest.raises(WeightError, match=r"1 parameters missing: model\.embed_tokens\.weight"):
        stage(store, 1, tensors[1:])
    with pytest.raises(WeightError, match="cannot commit version 1: none is staged"):
        store.commit(1)
    stage(store, 2, tensors)
    with pytest.raises(WeightError, match="cannot commit version 1: version 2 is staged"):
        store.commit(1)
    store.commit(2)
    with pytest.raises(WeightError, match="none is staged"):
        store.commit(2)


def test_tensors_that_do_not_fit_are_refused_by_name() -> None:
    store = WeightStore(make_model(), 0)
    with pytest.raises(WeightError, match="before stage_begin"):
        store.stage_tensor("x", torch.zeros(1))
    store.stage_begin(1)
    with pytest.raises(WeightError, match=r"no parameter 'model\.nonsense'"):
        store.stage_tensor("model.nonsense", torch.zeros(1))
    with pytest.raises(WeightError, match=r"'model\.norm\.weight' has shape \(3,\), the model's is \(48,\)"):
        store.stage_tensor("model.norm.weight", torch.zeros(3))


def test_either_name_of_a_tied_tensor_will_do_and_other_types_are_converted() -> None:
    model = make_model()
    store = WeightStore(model, 0)
    renamed = [
        (name.replace("model.embed_tokens", "lm_head"), tensor.to(torch.bfloat16)) for name, tensor in filled(3.0)
    ]
    stage(store, 1, renamed)
    store.commit(1)
    assert (model.model.embed_tokens.weight == 3).all()
    assert model.dtype == torch.float32


def test_only_the_served_version_can_be_pinned() -> None:
    store = WeightStore(make_model(), 5)
    with pytest.raises(WeightError, match="cannot pin version 4: the engine serves version 5"):
        store.pin(4)


def test_staging_between_steps_disturbs_no_request() -> None:
    whole = run_all(make_engine(), request(max_tokens=30))["r"]
    engine = make_engine()
    engine.submit(request(max_tokens=30))
    engine.stage_begin(1)
    chunks = []
    for name, tensor in filled(0.5):
        engine.stage_tensor(name, tensor)
        chunks += engine.step()
    engine.stage_end()
    while engine.has_work:
        chunks += engine.step()
    tokens = [token for chunk in chunks for token in chunk.tokens.tolist()]
    assert tokens == whole.tokens.tolist()
    assert engine.weight_bytes == sum(tensor.nbytes for _, tensor in filled(0.0))


def test_experts_arrive_one_by_one() -> None:
    """Under the names of files, which is how they travel; the loaded model has one tensor for all experts of a layer."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    shape = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "head_dim": 8}
    more = {"num_attention_heads": 2, "num_key_value_heads": 1, "moe_intermediate_size": 8, "num_experts": 3}
    served, new = (Qwen3MoeForCausalLM(Qwen3MoeConfig(**shape, **more)).requires_grad_(False) for _ in range(2))
    names = FileNames.of("qwen3_moe")
    arriving = [part for name, tensor in new.named_parameters() for part in names.split(name, tensor)]
    store = WeightStore(served, 0)
    with pytest.raises(
        WeightError, match=r"1 parameters missing: model\.layers\.0\.mlp\.experts\.2\.down_proj\.weight"
    ):
        stage(store, 1, [(name, tensor) for name, tensor in arriving if "experts.2.down" not in name])
    with pytest.raises(WeightError, match=r"has no parameter .model\.layers\.0\.mlp\.experts\.down_proj"):
        stage(store, 1, [("model.layers.0.mlp.experts.down_proj", new.model.layers[0].mlp.experts.down_proj)])
    stage(store, 1, arriving)
    store.commit(1)
    for (name, found), expected in zip(served.named_parameters(), new.parameters(), strict=True):
        assert torch.equal(found, expected), name
