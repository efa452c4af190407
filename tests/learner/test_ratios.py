from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from learner.objectives.ratios import interpolated_proximal, log_ratios, sequence_means, sequence_sums

SAMPLES = torch.tensor([0, 0, 1, 1, 1])


def test_means_and_sums_belong_to_their_trajectory() -> None:
    values = torch.tensor([1.0, 3.0, 2.0, 4.0, 9.0])
    torch.testing.assert_close(sequence_means(values, SAMPLES), torch.tensor([2.0, 2.0, 5.0, 5.0, 5.0]))
    torch.testing.assert_close(sequence_sums(values, SAMPLES), torch.tensor([4.0, 4.0, 15.0, 15.0, 15.0]))


def test_a_sequence_ratio_is_the_geometric_mean_of_its_tokens_ratios() -> None:
    logp, anchor = torch.tensor([-1.0, -2.0, -1.0, -1.0, -4.0]), torch.tensor([-2.0, -2.0, -1.0, -4.0, -1.0])
    own = (logp - anchor).exp()
    expected = torch.stack([own[:2].prod() ** (1 / 2)] * 2 + [own[2:].prod() ** (1 / 3)] * 3)
    torch.testing.assert_close(log_ratios(logp, anchor, SAMPLES, "sequence").exp(), expected)
    torch.testing.assert_close(log_ratios(logp, anchor, SAMPLES, "sequence_token").exp(), expected)
    torch.testing.assert_close(log_ratios(logp, anchor, SAMPLES, "token").exp(), own)


@pytest.mark.parametrize(("level", "gradient"), [("sequence", [2.0, 2.0, 3.0, 3.0, 3.0]), ("sequence_token", None)])
def test_gradients_of_a_sequence_ratio(level: str, gradient: list[float] | None) -> None:
    """d/dlogp_j of sum_i s_i: through the mean every token of a trajectory of n gets n * s / n = s of each; alike per token."""
    logp = torch.zeros(5, requires_grad=True)
    log_ratios(logp, torch.zeros(5), SAMPLES, level).sum().backward()
    assert logp.grad is not None
    torch.testing.assert_close(logp.grad, torch.ones(5))
    weighted = torch.zeros(5, requires_grad=True)
    weights = torch.tensor([4.0, 0.0, 9.0, 0.0, 0.0])
    (log_ratios(weighted, torch.zeros(5), SAMPLES, level) * weights).sum().backward()
    assert weighted.grad is not None
    torch.testing.assert_close(weighted.grad, weights if gradient is None else torch.tensor(gradient))


def test_an_unknown_level_is_named() -> None:
    with pytest.raises(ValueError, match="unknown ratio level 'turn'"):
        log_ratios(torch.zeros(5), torch.zeros(5), SAMPLES, "turn")


def test_the_interpolated_proximal_policy_lies_one_update_back() -> None:
    logp = torch.full((4,), -1.0, requires_grad=True)
    behaviour = torch.tensor([-1.0, -3.0, -3.0, -5.0])
    proximal = interpolated_proximal(logp, behaviour, torch.tensor([0, 1, 2, 4]))
    torch.testing.assert_close(proximal, torch.tensor([-1.0, -3.0, -2.0, -2.0]))
    assert not proximal.requires_grad


@given(st.lists(st.floats(-20, 0), min_size=1, max_size=8), st.integers(0, 64))
def test_the_interpolated_policy_lies_between_the_two(values: list[float], lag: int) -> None:
    behaviour, logp = torch.tensor(values), torch.tensor(values[::-1])
    proximal = interpolated_proximal(logp, behaviour, torch.full((len(values),), lag))
    low, high = torch.minimum(behaviour, logp), torch.maximum(behaviour, logp)
    assert bool(((proximal >= low - 1e-4) & (proximal <= high + 1e-4)).all())
