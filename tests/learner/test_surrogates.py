from __future__ import annotations

import pytest
import torch

from learner.objectives.surrogates import clipped, clipped_weight, plain


def logs(*ratios: float) -> torch.Tensor:
    return torch.tensor(ratios).log()


def test_the_clip_binds_only_where_it_lowers_the_objective() -> None:
    ratios, advantages = logs(1.5, 1.5, 0.5, 0.5, 1.1), torch.tensor([1.0, -1.0, 1.0, -1.0, 2.0])
    objective, binds = clipped(ratios, advantages, 0.2, 0.28)
    torch.testing.assert_close(objective, torch.tensor([1.28, -1.5, 0.5, -0.8, 2.2]))
    assert binds.tolist() == [True, False, False, True, False]


def test_a_clipped_token_has_no_gradient() -> None:
    log_ratio = logs(1.5, 1.1).requires_grad_()
    clipped(log_ratio, torch.tensor([1.0, 1.0]), 0.2, 0.28)[0].sum().backward()
    assert log_ratio.grad is not None
    torch.testing.assert_close(log_ratio.grad, torch.tensor([0.0, 1.1]))


def test_the_dual_clip_bounds_what_a_bad_token_costs() -> None:
    ratios = logs(10.0, 10.0, 2.0).requires_grad_()
    objective, binds = clipped(ratios, torch.tensor([-1.0, 1.0, -1.0]), 0.2, 0.28, dual_clip=3.0)
    torch.testing.assert_close(objective.detach(), torch.tensor([-3.0, 1.28, -2.0]))
    assert binds.tolist() == [True, True, False]
    objective.sum().backward()
    assert ratios.grad is not None
    torch.testing.assert_close(ratios.grad, torch.tensor([0.0, 0.0, -2.0]))


def test_without_a_bound_the_gradient_is_the_weighted_policy_gradient() -> None:
    log_ratio = logs(3.0, 0.5).requires_grad_()
    objective, binds = plain(log_ratio, torch.tensor([1.0, -2.0]))
    objective.sum().backward()
    assert log_ratio.grad is not None
    torch.testing.assert_close(log_ratio.grad, torch.tensor([3.0, -1.0]))
    assert not binds.any()


@pytest.mark.parametrize(("low", "weights"), [(None, [0.1, 1.0, 5.0]), (0.2, [0.8, 1.0, 5.0])])
def test_a_clipped_weight_leaves_every_token_a_gradient(low: float | None, weights: list[float]) -> None:
    logp = torch.tensor([-1.0, -2.0, -3.0], requires_grad=True)
    advantages = torch.tensor([1.0, -1.0, 2.0])
    objective, binds = clipped_weight(logp, logs(0.1, 1.0, 20.0), advantages, low, 4.0)
    objective.sum().backward()
    assert logp.grad is not None
    torch.testing.assert_close(logp.grad, torch.tensor(weights) * advantages)
    assert binds.tolist() == [low is not None, False, True]
