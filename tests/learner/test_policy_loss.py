from __future__ import annotations

from typing import Any

import pytest
import torch

from learner.objectives.policy_loss import clipped_surrogate, policy_loss, truncated_weight
from learner.objectives.sums import TokenSums, sum_tokens
from learner.objectives.token_statistics import token_logprobs

BOUNDS: dict[str, Any] = {"clip_low": 0.2, "clip_high": 0.28, "cap": 2.0}


def logs(*ratios: float) -> torch.Tensor:
    return torch.tensor(ratios).log()


def test_the_clip_binds_only_where_it_lowers_the_objective() -> None:
    ratios, advantages = logs(1.5, 1.5, 0.5, 0.5, 1.1), torch.tensor([1.0, -1.0, 1.0, -1.0, 2.0])
    surrogate, clipped = clipped_surrogate(ratios, advantages, 0.2, 0.28)
    torch.testing.assert_close(surrogate, torch.tensor([1.28, -1.5, 0.5, -0.8, 2.2]))
    assert clipped.tolist() == [True, False, False, True, False]


def test_a_clipped_token_has_no_gradient() -> None:
    log_ratio = logs(1.5, 1.1).requires_grad_()
    clipped_surrogate(log_ratio, torch.tensor([1.0, 1.0]), 0.2, 0.28)[0].sum().backward()
    assert log_ratio.grad is not None
    torch.testing.assert_close(log_ratio.grad, torch.tensor([0.0, 1.1]))


def test_importance_weights_are_capped_and_carry_no_gradient() -> None:
    proximal = logs(0.5, 0.9, 0.9).requires_grad_()
    weight = truncated_weight(proximal, logs(1.0, 0.9, 0.1), cap=2.0)
    torch.testing.assert_close(weight, torch.tensor([0.5, 1.0, 2.0]))
    assert not weight.requires_grad


def test_decoupled_loss_in_closed_form_with_a_separate_proximal_policy() -> None:
    behaviour, proximal = logs(0.2, 0.4), logs(0.3, 0.1)
    current = logs(0.6, 0.11).requires_grad_()
    advantages = torch.tensor([1.0, -2.0])
    terms = policy_loss(current, behaviour, advantages, correction="decoupled", logp_proximal=proximal, **BOUNDS)
    torch.testing.assert_close(terms.weight, torch.tensor([1.5, 0.25]))
    torch.testing.assert_close(terms.loss.detach(), torch.tensor([-1.5 * 1.28, 0.25 * 1.1 * 2.0]))
    assert terms.clipped.tolist() == [True, False]


def test_with_one_update_the_proximal_policy_is_the_current_one_detached() -> None:
    behaviour, advantages = logs(0.2, 0.4, 0.05), torch.tensor([1.0, -2.0, 1.0])
    current = logs(0.3, 0.1, 0.5).requires_grad_()
    terms = policy_loss(current, behaviour, advantages, correction="decoupled", **BOUNDS)
    terms.loss.sum().backward()
    weight = torch.tensor([1.5, 0.25, 2.0])
    torch.testing.assert_close(terms.loss.detach(), -weight * advantages)
    assert current.grad is not None
    torch.testing.assert_close(current.grad, -weight * advantages)
    assert not terms.clipped.any()


def test_tis_and_decoupled_have_one_gradient_while_there_is_one_update() -> None:
    behaviour, advantages = logs(0.2, 0.4), torch.tensor([1.0, -2.0])
    gradients = []
    for correction in ("tis", "decoupled"):
        current = logs(0.3, 0.1).requires_grad_()
        policy_loss(current, behaviour, advantages, correction=correction, **BOUNDS).loss.sum().backward()
        gradients.append(current.grad)
    torch.testing.assert_close(gradients[0], gradients[1])


def test_without_correction_the_ratio_is_to_the_behaviour_policy() -> None:
    current = logs(0.3, 0.5).requires_grad_()
    terms = policy_loss(current, logs(0.1, 0.5), torch.tensor([1.0, 1.0]), correction="none", **BOUNDS)
    torch.testing.assert_close(terms.loss.detach(), torch.tensor([-1.28, -1.0]))
    assert terms.weight.tolist() == [1.0, 1.0]
    assert terms.clipped.tolist() == [True, False]


def test_an_unknown_correction_is_named() -> None:
    with pytest.raises(ValueError, match="unknown correction 'both'"):
        policy_loss(logs(0.5), logs(0.5), torch.ones(1), correction="both", **BOUNDS)


def test_token_logprobs_are_those_of_the_tempered_distribution(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(7, 11, generator=generator)
    targets = torch.randint(0, 11, (7,), generator=generator)
    inverse = torch.tensor([1.0, 2.0, 0.5, 1.0, 1.0, 4.0, 1.0])
    expected = torch.distributions.Categorical(logits=logits * inverse[:, None])
    whole = logits.clone().requires_grad_()
    chosen, entropies = token_logprobs(whole, targets, inverse)
    torch.testing.assert_close(chosen.detach(), expected.log_prob(targets))
    torch.testing.assert_close(entropies, expected.entropy())
    assert not entropies.requires_grad
    chosen.sum().backward()
    monkeypatch.setattr("learner.objectives.token_statistics.CHUNK_ELEMENTS", 22)
    chunked = logits.clone().requires_grad_()
    parts, part_entropies = token_logprobs(chunked, targets, inverse, entropy_gradient=True)
    parts.sum().backward(retain_graph=True)
    torch.testing.assert_close(chunked.grad, whole.grad)
    torch.testing.assert_close(part_entropies.detach(), entropies)
    assert part_entropies.requires_grad


def test_metrics_of_known_tokens() -> None:
    current, behaviour = logs(0.4, 0.1, 0.3), logs(0.2, 0.2, 0.3)
    terms = policy_loss(current, behaviour, torch.tensor([1.0, 1.0, -1.0]), correction="decoupled", **BOUNDS)
    sums = sum_tokens(terms, current, behaviour, torch.tensor([1.0, 2.0, 3.0]), torch.ones(3), torch.tensor([0, 2, 1]))
    sums.normaliser = 3.0
    metrics = sums.metrics()
    expected = {
        "loss": (-2.0 - 0.5 + 1.0) / 3,
        "ratio/mean": 3.5 / 3,
        "ratio/max": 2.0,
        "ratio/clip_fraction": 0.0,
        "correction/weight_mean": 3.5 / 3,
        "correction/ess": 3.5**2 / (3 * 5.25),
        "kl/mismatch": 0.0,
        "kl/mismatch_lag0": 0.6931472,
        "entropy": 2.0,
        "lag/mean": 1.0,
        "lag/max": 2.0,
    }
    assert metrics.keys() == expected.keys()
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(value, abs=1e-6), name


def test_sums_of_parts_are_the_sums_of_the_whole() -> None:
    total = TokenSums()
    total.add(TokenSums(tokens=2, loss=1.5, ratio_max=3.0, lag_max=1))
    total.add(TokenSums(tokens=1, loss=-0.5, ratio_max=2.0, lag_max=4))
    assert (total.tokens, total.loss, total.ratio_max, total.lag_max) == (3, 1.0, 3.0, 4)
    assert TokenSums().metrics() == {}
