from __future__ import annotations

import itertools

import torch
from hypothesis import given
from hypothesis import strategies as st

from learner.objectives.corrections import double_sided, masked, second_moment_mask, truncated


def logs(*ratios: float) -> torch.Tensor:
    return torch.tensor(ratios).log()


def test_the_weights_of_each_correction() -> None:
    weights = logs(0.1, 0.5, 1.0, 2.0, 9.0)
    torch.testing.assert_close(truncated(weights, 2.0), torch.tensor([0.1, 0.5, 1.0, 2.0, 2.0]))
    torch.testing.assert_close(masked(weights, 2.5), torch.tensor([0.1, 0.5, 1.0, 2.0, 0.0]))
    torch.testing.assert_close(double_sided(weights, 0.6, 1.5), torch.tensor([0.0, 0.5, 1.0, 2.0, 0.0]))


def test_weights_carry_no_gradient() -> None:
    weights = logs(0.5, 2.0).requires_grad_()
    assert not any(
        w.requires_grad for w in (truncated(weights, 2.0), masked(weights, 2.0), double_sided(weights, 1, 1))
    )


def test_the_second_moment_mask_takes_the_furthest_outward_token_first() -> None:
    log_ratio, advantages = torch.tensor([0.3, -0.3, 0.5, 0.0]), torch.tensor([1.0, 1.0, 1.0, 1.0])
    # Mean of squares: (0.09 + 0.09 + 0.25) / 4 = 0.1075; without the third (0.18 / 3) = 0.06; without the first too, 0.045.
    assert second_moment_mask(log_ratio, advantages, 0.11).tolist() == [True, True, True, True]
    assert second_moment_mask(log_ratio, advantages, 0.07).tolist() == [True, True, False, True]
    assert second_moment_mask(log_ratio, advantages, 0.05).tolist() == [False, True, False, True]
    # What moves back towards the behaviour policy always stays.
    assert second_moment_mask(log_ratio, advantages, 0.01).tolist() == [False, True, False, True]
    assert second_moment_mask(log_ratio, -advantages, 0.07).tolist() == [True, False, True, True]


@given(st.lists(st.tuples(st.floats(-2, 2), st.sampled_from([-1.0, 0.0, 1.0])), min_size=1, max_size=7))
def test_no_smaller_removal_would_do(tokens: list[tuple[float, float]]) -> None:
    log_ratio = torch.tensor([ratio for ratio, _ in tokens], dtype=torch.float64)
    advantages = torch.tensor([advantage for _, advantage in tokens], dtype=torch.float64)
    limit = 0.04
    stay = second_moment_mask(log_ratio, advantages, limit)
    outward = [i for i, (r, a) in enumerate(tokens) if r * a > 0]
    assert all(stay[i] for i in range(len(tokens)) if i not in outward)

    def holds(removed: tuple[int, ...]) -> bool:
        left = [float(log_ratio[i]) ** 2 for i in range(len(tokens)) if i not in removed]
        return sum(left) <= limit * len(left) + 1e-12

    removed = [i for i in range(len(tokens)) if not stay[i]]
    for size in range(len(removed)):
        assert not any(holds(some) for some in itertools.combinations(outward, size))
