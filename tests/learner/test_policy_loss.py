from __future__ import annotations

from typing import Any

import pytest
import torch

from learner.objectives.config import ObjectiveConfig
from learner.objectives.policy_loss import TokenInputs, policy_loss
from learner.objectives.sums import TokenSums, sum_tokens
from learner.objectives.token_statistics import token_logprobs


def logs(*ratios: float) -> torch.Tensor:
    return torch.tensor(ratios).log()


def tokens(logp: torch.Tensor, behaviour: torch.Tensor, advantages: list[float], **fields: Any) -> TokenInputs:
    """Tokens of one trajectory, of lag 0, unless told otherwise."""
    zeros = torch.zeros(len(logp), dtype=torch.int64)
    given = {"lags": zeros, "sample_of": zeros, "entropies": torch.zeros(len(logp)), **fields}
    return TokenInputs(logp, behaviour, torch.tensor(advantages), **given)


def gradient_of(logp: torch.Tensor, behaviour: torch.Tensor, advantages: list[float], **settings: Any) -> torch.Tensor:
    current = logp.clone().requires_grad_()
    policy_loss(tokens(current, behaviour, advantages), ObjectiveConfig(**settings)).loss.sum().backward()
    assert current.grad is not None
    return current.grad


def test_the_default_is_the_truncated_importance_weighted_gradient() -> None:
    current, behaviour, advantages = logs(0.3, 0.1, 0.5), logs(0.2, 0.4, 0.05), [1.0, -2.0, 1.0]
    terms = policy_loss(tokens(current, behaviour, advantages), ObjectiveConfig())
    weight = torch.tensor([1.5, 0.25, 2.0])
    torch.testing.assert_close(terms.weight, weight)
    torch.testing.assert_close(terms.loss, -weight * torch.tensor(advantages))
    torch.testing.assert_close(gradient_of(current, behaviour, advantages), -weight * torch.tensor(advantages))


def test_the_decoupled_loss_in_closed_form() -> None:
    """Lag 2: the proximal policy lies half-way in log-probability, so weight and ratio are the same square root."""
    behaviour, current = logs(0.1, 0.4), logs(0.4, 0.1).requires_grad_()
    config = ObjectiveConfig(correction="decoupled", surrogate="clip", clip_low=0.2, clip_high=0.28, correction_cap=5.0)
    terms = policy_loss(tokens(current, behaviour, [1.0, 1.0], lags=torch.tensor([2, 2])), config)
    torch.testing.assert_close(terms.weight, torch.tensor([2.0, 0.5]))
    torch.testing.assert_close(terms.loss.detach(), torch.tensor([-2.0 * 1.28, -0.5 * 0.5]))
    assert terms.clipped.tolist() == [True, False]
    terms.loss.sum().backward()
    assert current.grad is not None
    torch.testing.assert_close(current.grad, torch.tensor([0.0, -0.25]))


def test_without_correction_the_ratio_is_to_the_behaviour_policy() -> None:
    config = ObjectiveConfig(correction="none", surrogate="clip", clip_low=0.2, clip_high=0.28)
    terms = policy_loss(tokens(logs(0.2, 0.5), logs(0.1, 0.5), [1.0, 1.0]), config)
    torch.testing.assert_close(terms.loss, torch.tensor([-1.28, -1.0]))
    assert terms.weight.tolist() == [1.0, 1.0]
    assert terms.clipped.tolist() == [True, False]


def test_gspo_clips_whole_trajectories() -> None:
    """Ratios 2 and 1/8 have the geometric mean 1/2 over two tokens: below the bound, so a negative advantage is clipped."""
    config = ObjectiveConfig(correction="none", ratio="sequence", surrogate="clip", clip_low=0.2, clip_high=0.28)
    logp, behaviour = logs(0.4, 0.05, 0.3), logs(0.2, 0.4, 0.3)
    terms = policy_loss(tokens(logp, behaviour, [-1.0, -1.0, -1.0], sample_of=torch.tensor([0, 0, 1])), config)
    torch.testing.assert_close(terms.loss, torch.tensor([0.8, 0.8, 1.0]))
    assert terms.clipped.tolist() == [True, True, False]


def test_cispo_keeps_a_gradient_where_ppo_has_none() -> None:
    logp, behaviour, advantages = logs(0.8, 0.1), logs(0.1, 0.1), [1.0, 1.0]
    bounds: dict[str, Any] = {"correction": "none", "clip_high": 3.0}
    torch.testing.assert_close(
        gradient_of(logp, behaviour, advantages, surrogate="clipped_weight", **bounds), torch.tensor([-4.0, -1.0])
    )
    clip = gradient_of(logp, behaviour, advantages, surrogate="clip", clip_low=0.2, **bounds)
    torch.testing.assert_close(clip, torch.tensor([0.0, -1.0]))


@pytest.mark.parametrize(
    ("settings", "weights"),
    [
        ({"correction": "masked_is", "correction_cap": 2.0}, [0.0, 0.5, 2.0]),
        ({"correction": "masked_is", "correction_cap": 2.0, "correction_level": "sequence"}, [4 ** (1 / 3)] * 3),
        ({"correction": "double_sided", "correction_low": 0.4, "correction_high": 1.0}, [0.0, 0.0, 2.0]),
        ({"correction": "tis", "correction_cap": 3.0}, [3.0, 0.5, 2.0]),
    ],
)
def test_the_weights_of_the_corrections(settings: dict[str, Any], weights: list[float]) -> None:
    logp, behaviour = logs(0.4, 0.1, 0.2), logs(0.1, 0.2, 0.1)
    terms = policy_loss(tokens(logp, behaviour, [1.0, 1.0, 1.0]), ObjectiveConfig(**settings))
    torch.testing.assert_close(terms.weight, torch.tensor(weights))
    torch.testing.assert_close(terms.loss, -torch.tensor(weights))
    assert terms.clipped.tolist() == [weight == 0.0 for weight in weights]


def test_masked_tokens_have_neither_loss_nor_gradient() -> None:
    current = logs(0.2, 0.3).requires_grad_()
    inputs = tokens(current, logs(0.1, 0.3), [1.0, 1.0], stays=torch.tensor([False, True]))
    config = ObjectiveConfig(correction="none", second_moment_limit=0.04)
    terms = policy_loss(inputs, config)
    terms.loss.sum().backward()
    assert terms.loss.tolist() == [0.0, -1.0]
    assert terms.clipped.tolist() == [True, False]
    assert current.grad is not None
    torch.testing.assert_close(current.grad, torch.tensor([0.0, -1.0]))


def test_regularisers_are_added_to_the_loss() -> None:
    logp, reference = logs(0.5, 0.25), logs(0.25, 0.25)
    inputs = tokens(logp, logp, [1.0, -1.0], reference=reference, entropies=torch.tensor([1.0, 2.0]))
    config = ObjectiveConfig(kl_coef=0.5, kl_kind="k3", entropy_coef=0.1, positive_lm_coef=2.0)
    k3 = torch.tensor([0.5 - 1.0 + float(torch.tensor(2.0).log()), 0.0])
    imitation = torch.tensor([2.0 * float(torch.tensor(2.0).log()), 0.0])
    expected = torch.tensor([-1.0, 1.0]) + 0.5 * k3 - torch.tensor([0.1, 0.2]) + imitation
    torch.testing.assert_close(policy_loss(inputs, config).loss, expected)


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
    terms = policy_loss(tokens(current, behaviour, [1.0, 1.0, -1.0]), ObjectiveConfig())
    sums = sum_tokens(terms, current, behaviour, torch.tensor([1.0, 2.0, 3.0]), torch.ones(3), torch.tensor([0, 2, 1]))
    sums.normaliser = 3.0
    metrics = sums.metrics()
    expected = {
        "loss": (-2.0 - 0.5 + 1.0) / 3,
        "ratio/mean": 3.5 / 3,
        "ratio/max": 2.0,
        "staleness/ess": 3.5**2 / (3 * 5.25),
        "staleness/second_moment": 2 * 0.6931472**2 / 3,
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
