from __future__ import annotations

import pytest
import torch

from learner.objectives.regularisers import distillation_loss, kl_penalty, positive_lm_loss

POLICY = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64)
REFERENCE = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)


def exact_kl() -> float:
    return float((POLICY * (POLICY / REFERENCE).log()).sum())


@pytest.mark.parametrize("kind", ["k1", "k3"])
def test_the_unbiased_estimates_have_the_kl_as_their_mean(kind: str) -> None:
    mean = float((POLICY * kl_penalty(POLICY.log(), REFERENCE.log(), kind)).sum())
    assert mean == pytest.approx(exact_kl(), rel=1e-9)


def test_k2_has_the_gradient_of_the_kl_in_the_mean() -> None:
    """Over samples of the policy: d/dlogits of E[k2] with fixed weights is that of the exact KL."""
    logits = POLICY.log().clone().requires_grad_()
    logp = torch.log_softmax(logits, dim=0)
    (POLICY * kl_penalty(logp, REFERENCE.log(), "k2")).sum().backward()
    estimated = logits.grad
    exact_logits = POLICY.log().clone().requires_grad_()
    exact = torch.log_softmax(exact_logits, dim=0)
    (exact.exp() * (exact - REFERENCE.log())).sum().backward()
    torch.testing.assert_close(estimated, exact_logits.grad)


def test_k1_as_a_loss_has_no_gradient_in_the_mean() -> None:
    logits = POLICY.log().clone().requires_grad_()
    logp = torch.log_softmax(logits, dim=0)
    (POLICY * kl_penalty(logp, REFERENCE.log(), "k1")).sum().backward()
    torch.testing.assert_close(logits.grad, torch.zeros(3, dtype=torch.float64), atol=1e-12, rtol=0)


def test_an_unknown_estimate_is_named() -> None:
    with pytest.raises(ValueError, match="unknown KL estimate 'k4'"):
        kl_penalty(POLICY, REFERENCE, "k4")


def test_only_what_succeeded_is_imitated() -> None:
    loss = positive_lm_loss(torch.tensor([-1.0, -2.0, -3.0]), torch.tensor([True, False, False]))
    assert loss.tolist() == [1.0, 0.0, 0.0]


def test_distillation_is_the_reverse_kl() -> None:
    loss = distillation_loss(POLICY.log()[None], REFERENCE.log()[None])
    assert float(loss) == pytest.approx(exact_kl(), rel=1e-6)
    assert float(distillation_loss(POLICY.log()[None], POLICY.log()[None] + 3.0)) == pytest.approx(0.0, abs=1e-7)


def test_distillation_over_the_most_likely_tokens_renormalises() -> None:
    p, q = POLICY[:2] / POLICY[:2].sum(), REFERENCE[:2] / REFERENCE[:2].sum()
    loss = distillation_loss(POLICY.log()[None], REFERENCE.log()[None], top_k=2)
    assert float(loss) == pytest.approx(float((p * (p / q).log()).sum()), rel=1e-5)
