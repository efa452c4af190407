"""Log-probabilities and entropies under a vocabulary that is divided over two ranks, against those of whole rows."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from megatron_fixtures import Ranks

from learner.backends.megatron import logprobs
from learner.objectives.token_statistics import token_logprobs

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
