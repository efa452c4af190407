"""Muon: what its update is made of."""

from __future__ import annotations

import pytest
import torch

from learner.muon import Muon, orthogonalise


@pytest.mark.parametrize("shape", [(3, 8, 16), (2, 16, 8), (1, 8, 8)])
def test_orthogonalise_keeps_singular_vectors_and_brings_singular_values_near_one(shape: tuple[int, int, int]) -> None:
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    result = orthogonalise(matrices)
    left, _, right = torch.linalg.svd(matrices, full_matrices=False)
    in_old_basis = left.mT @ result @ right.mT
    values = torch.diagonal(in_old_basis, dim1=-2, dim2=-1)
    assert torch.allclose(in_old_basis, torch.diag_embed(values), atol=1e-4)
    assert values.min() > 0.5
    assert values.max() < 1.3


def test_the_step_does_not_depend_on_the_scale_of_the_gradient() -> None:
    results = []
    for scale in (1.0, 1e-4):
        weight = torch.nn.Parameter(torch.zeros(4, 6))
        weight.grad = scale * torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
        Muon([weight], lr=0.1).step()
        results.append(weight.detach().clone())
    assert torch.allclose(results[0], results[1], atol=1e-5)
    assert results[0].norm() == pytest.approx(0.1 * 2.0, rel=0.35)


def test_it_solves_a_linear_regression() -> None:
    generator = torch.Generator().manual_seed(2)
    wanted = torch.randn(5, 7, generator=generator)
    inputs = torch.randn(64, 7, generator=generator)
    weight = torch.nn.Parameter(torch.zeros(5, 7))
    optimizer = Muon([weight], lr=0.1)
    for step in range(200):
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(inputs @ weight.T, inputs @ wanted.T).backward()
        optimizer.param_groups[0]["lr"] = 0.1 * (1 - step / 200)
        optimizer.step()
    assert (weight - wanted).norm() / wanted.norm() < 0.02


def test_vectors_and_closures_are_refused() -> None:
    with pytest.raises(ValueError, match="matrices, got a parameter of shape"):
        Muon([torch.nn.Parameter(torch.zeros(3))])
    with pytest.raises(ValueError, match="no closure"):
        Muon([torch.nn.Parameter(torch.zeros(3, 3))]).step(lambda: 0.0)
