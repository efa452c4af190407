"""Real ranks of Megatron-Core over gloo, however they divide the model, against one process with the plain backend."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from learner_fixtures import make_groups, make_learner, train_step
from megatron_fixtures import ARCHITECTURES, Ranks
from safetensors.torch import load_file

from learner.backends.fsdp import FsdpBackend
from learner.backends.megatron import logprobs
from learner.config import LearnerConfig
from learner.learner import Learner
from learner.objectives.token_statistics import token_logprobs

STEPS = 20
NUMBERS = ("loss", "grad_norm", "entropy", "tokens/trained", "ratio/mean", "kl/mismatch")

Division = dict[str, Any]
OF_TWO: dict[str, tuple[str, Division]] = {
    "tp2": ("qwen3", {"tensor_parallel": 2}),
    "pp2": ("qwen2", {"pipeline_parallel": 2}),
    "dp2": ("llama", {"distributed_optimizer": True}),
    "ep2": ("qwen3_moe", {"expert_parallel": 2}),
}
OF_FOUR: dict[str, tuple[str, Division]] = {
    "tp2-pp2": ("qwen2", {"tensor_parallel": 2, "pipeline_parallel": 2}),
    "tp2-dp2": ("qwen3", {"tensor_parallel": 2, "distributed_optimizer": True}),
    "tp2-dp2-ep4": ("qwen3_moe", {"tensor_parallel": 2, "expert_parallel": 4}),
    "pp2-dp2-ep2": ("qwen3_moe", {"pipeline_parallel": 2, "expert_parallel": 2, "distributed_optimizer": True}),
}


def check_steps(alone: Learner, ranked: Learner, steps: int = STEPS, rel: float = 1e-4) -> None:
    """Losses and gradient norms over updates of Adam to ``rel``."""
    for step in range(steps):
        groups = make_groups(5, seed=step, version=alone.version)
        expected, found = train_step(alone, groups), train_step(ranked, groups)
        for name in NUMBERS:
            assert found[name] == pytest.approx(expected[name], rel=rel, abs=1e-7), (step, name)
    mine, theirs = dict(alone.named_tensors()), dict(ranked.named_tensors())
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        torch.testing.assert_close(theirs[name], tensor, rtol=1e-3, atol=2e-4, msg=name)


@pytest.mark.parametrize("case", OF_TWO)
def test_two_ranks_train_as_one(two: Ranks, models: dict[str, Path], case: str) -> None:
    architecture, division = OF_TWO[case]
    alone = make_learner(models[architecture], lr=1e-3)
    check_steps(alone, two.learner(models[architecture], lr=1e-3, **division))


@pytest.mark.slow
@pytest.mark.parametrize("case", OF_FOUR)
def test_four_ranks_train_as_one(four: Ranks, models: dict[str, Path], case: str) -> None:
    architecture, division = OF_FOUR[case]
    alone = make_learner(models[architecture], lr=1e-3)
    check_steps(alone, four.learner(models[architecture], lr=1e-3, **division))


@pytest.mark.gpu
@pytest.mark.parametrize("case", OF_TWO)
def test_ranks_on_gpus_train_as_one_on_a_cpu(cluster: None, models: dict[str, Path], case: str) -> None:
    """One rank without a division where there is one GPU."""
    world = min(torch.cuda.device_count(), 2)
    if not world:
        pytest.skip("needs a CUDA GPU")
    architecture, division = OF_TWO[case]
    ranked = Ranks(world, device="cuda").learner(models[architecture], lr=1e-3, **(division if world == 2 else {}))
    check_steps(make_learner(models[architecture], lr=1e-3), ranked, 3, rel=1e-3)


@pytest.mark.parametrize("case", ["tp2", "pp2"])
def test_shared_prefixes_are_computed_once_here_too(two: Ranks, models: dict[str, Path], case: str) -> None:
    architecture, division = OF_TWO[case]
    groups = make_groups(4)
    for group in groups:
        for trajectory in group.trajectories:
            trajectory.tokens[:7] = group.trajectories[0].tokens[:7]
    apart = make_learner(models[architecture], prefix_sharing="off")
    shared = two.learner(models[architecture], prefix_sharing="on", **division)
    expected, found = train_step(apart, groups), train_step(shared, groups)
    for name in NUMBERS:
        assert found[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-7), name
    assert found["packing/prefix_saved"] > 0.0


@pytest.mark.parametrize("case", OF_TWO)
def test_one_step_of_gradient_descent_gives_the_same_weights(two: Ranks, models: dict[str, Path], case: str) -> None:
    """To 1e-6, unclipped, over several micro-batches."""
    architecture, division = OF_TWO[case]
    division = {name: value for name, value in division.items() if name != "distributed_optimizer"}
    settings: dict[str, Any] = {"optimizer": "sgd", "lr": 0.1, "clip_grad": 0.0, "token_budget": 64}
    alone = make_learner(models[architecture], **settings)
    ranked = two.learner(models[architecture], **division, **settings)
    groups = make_groups(5)
    assert train_step(alone, groups)["passes"] > 2
    train_step(ranked, groups)
    theirs = dict(ranked.named_tensors())
    for name, tensor in alone.named_tensors():
        torch.testing.assert_close(theirs[name], tensor, rtol=0, atol=1e-6, msg=name)


@pytest.mark.parametrize(
    "division", [{"tensor_parallel": 2}, {"pipeline_parallel": 2}, {"distributed_optimizer": True}]
)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_untouched_weights_come_back_bit_by_bit(
    two: Ranks, models: dict[str, Path], tmp_path: Path, architecture: str, division: Division
) -> None:
    experts = {"expert_parallel": 2} if architecture == "qwen3_moe" and "pipeline_parallel" not in division else {}
    learner = two.learner(models[architecture], **division, **experts)
    expected = load_file(models[architecture] / "model.safetensors")
    found = dict(learner.named_tensors())
    assert found.keys() == expected.keys()
    learner.export(tmp_path)
    exported = load_file(tmp_path / "model.safetensors")
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
        assert torch.equal(exported[name], tensor), name


def test_every_rank_gathers_whole_tensors(two: Ranks, models: dict[str, Path]) -> None:
    two.learner(models["qwen2"], pipeline_parallel=2)
    first, second = two.do(lambda backend: {n: t.sum().item() for n, t in backend.named_tensors()})
    assert first == second
    assert len(first) == len(dict(FsdpBackend(models["qwen2"], LearnerConfig(device="cpu")).named_tensors()))


# Log-probabilities and entropies under a vocabulary that is divided over two ranks

TOKENS, VOCABULARY = 7, 9


def problem() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits, targets, inverse temperatures, and what the two results are weighted with, [2, n]."""
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(TOKENS, VOCABULARY, generator=generator) * 3
    logits[0] += 200.0  # exponentials that overflow unless the largest logit of all ranks is taken out
    targets = torch.tensor([0, 4, 5, 8, 2, 7, 6])
    return logits, targets, torch.rand(TOKENS, generator=generator) + 0.5, torch.randn(2, TOKENS, generator=generator)


def divided(backend: Any, *, entropy: bool, chunk: int) -> list[list[float]]:
    """Both results, and the gradient of this rank's columns; ``chunk`` logits at a time."""
    del backend
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logprobs, "CHUNK_ELEMENTS", chunk)
        return computed(entropy)


def computed(entropy: bool) -> list[list[float]]:
    rank, group = torch.distributed.get_rank(), torch.distributed.group.WORLD
    logits, targets, inverse, weights = problem()
    padded = torch.nn.functional.pad(logits, (0, 1), value=50.0)  # a column that stands for no token
    mine = padded.chunk(2, dim=1)[rank].clone().requires_grad_()
    logp, entropies = logprobs.parallel_token_logprobs(
        mine, targets, inverse, group, VOCABULARY, entropy_gradient=entropy
    )
    ((weights[0] * logp).sum() + (weights[1] * entropies).sum()).backward()  # type: ignore[no-untyped-call]
    assert mine.grad is not None
    return [logp.tolist(), entropies.tolist(), mine.grad.flatten().tolist()]


@pytest.mark.parametrize(("entropy", "chunk"), [(False, 1 << 24), (True, 1 << 24), (True, 15)])
def test_divided_rows_give_what_whole_rows_give(two: Ranks, models: Any, entropy: bool, chunk: int) -> None:
    two.learner(models["qwen3"])  # the ranks meet
    logits, targets, inverse, weights = problem()
    logits.requires_grad_()
    logp, entropies = token_logprobs(logits, targets, inverse, entropy_gradient=entropy)
    ((weights[0] * logp).sum() + (weights[1] * (entropies if entropy else 0)).sum()).backward()  # type: ignore[no-untyped-call]
    assert logits.grad is not None
    expected = torch.nn.functional.pad(logits.grad, (0, 1)).chunk(2, dim=1)
    for rank, (found, found_entropies, gradient) in enumerate(two.do(partial(divided, entropy=entropy, chunk=chunk))):
        torch.testing.assert_close(torch.tensor(found), logp.detach(), rtol=0, atol=3e-6)
        torch.testing.assert_close(torch.tensor(found_entropies), entropies.detach(), rtol=0, atol=3e-6)
        mine = torch.tensor(gradient).view(TOKENS, -1)
        torch.testing.assert_close(mine, expected[rank], rtol=1e-4, atol=2e-6)
