"""Terms added to the loss of a token: distance to a reference policy, entropy, imitation of what succeeded.

Float32 [n] in and out; all are losses, to be minimised, with gradient through the current policy.
"""

from __future__ import annotations

import torch
from torch import Tensor


def kl_penalty(logp: Tensor, logp_reference: Tensor, kind: str) -> Tensor:
    """An estimate of KL(pi || reference) at each sampled token (Schulman 2020, "Approximating KL divergence").

    With ``d = log pi - log reference``: ``k1``: ``d``; ``k2``: ``d^2 / 2``; ``k3``: ``exp(-d) - 1 + d``. The *gradient* of
    k2 is that of the KL itself on samples of pi; that of k1 has expectation zero, so as a loss it has no effect and is refused
    (Tang and Munos 2025, "On a few pitfalls in KL divergence gradient estimation for RL").

    Raises ValueError for an unknown kind.
    """
    difference = logp - logp_reference
    if kind == "k1":
        return difference
    if kind == "k2":
        return difference.square() / 2.0
    if kind == "k3":
        return torch.expm1(-difference) + difference
    raise ValueError(f"unknown KL estimate {kind!r}: use k1, k2 or k3")


def positive_lm_loss(logp: Tensor, positive: Tensor) -> Tensor:
    """``-log pi`` of tokens of successful trajectories (``positive``, bool [n]), else 0.

    Yue et al. 2025, "VAPO", arXiv:2504.05118, section 4.3 (positive example LM loss).
    """
    return torch.where(positive, -logp, torch.zeros_like(logp))


def distillation_loss(logits: Tensor, teacher_logits: Tensor, top_k: int | None = None) -> Tensor:
    """Reverse KL(student || teacher) at each position, exact over the vocabulary, [n].

    ``logits`` and ``teacher_logits`` [n, vocabulary], already divided by the temperature. ``top_k``: over the k most likely tokens
    of the student, both distributions renormalised there. Agarwal et al. 2024, "On-Policy Distillation of Language Models",
    section 3.2; Gu et al. 2024, "MiniLLM".
    """
    if top_k is not None and top_k < logits.shape[-1]:
        chosen = logits.detach().topk(top_k, dim=-1).indices
        logits, teacher_logits = logits.gather(-1, chosen), teacher_logits.gather(-1, chosen)
    student = torch.log_softmax(logits.float(), dim=-1)
    teacher = torch.log_softmax(teacher_logits.float(), dim=-1)
    return (student.exp() * (student - teacher)).sum(dim=-1)
