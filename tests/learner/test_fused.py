from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor

from learner.backends.memory import keep_freed_memory
from learner.fused import fuse_norms, rms_norm
from learner.objectives.token_statistics import _chunk, token_logprobs


class PlainRMSNorm(torch.nn.Module):
    """As transformers writes it."""

    def __init__(self, width: int, offset: float = 0.0) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(width))
        self.variance_epsilon = 1e-5
        self.offset = offset

    def forward(self, x: Tensor) -> Tensor:
        normal = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return (self.weight + self.offset) * normal.to(x.dtype)


@pytest.mark.parametrize("shape", [(1, 7, 8), (1, 5, 3, 8)])
def test_norm_and_its_gradients_are_those_of_the_formula(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    plain = PlainRMSNorm(8)
    x = torch.randn(shape, requires_grad=True)
    gradient = torch.randn(shape)
    ours = rms_norm(x, plain.weight, plain.variance_epsilon)
    torch.testing.assert_close(ours, plain(x), rtol=0, atol=1e-6)
    got = torch.autograd.grad(ours, (x, plain.weight), gradient)
    wanted = torch.autograd.grad(plain(x), (x, plain.weight), gradient)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_a_norm_of_another_formula_is_left_alone() -> None:
    torch.manual_seed(0)
    model = torch.nn.ModuleDict({"plain": PlainRMSNorm(8), "offset": PlainRMSNorm(8, offset=1.0)})
    x = torch.randn(3, 8)
    wanted = {name: module(x) for name, module in model.items()}
    assert fuse_norms(model) == 1
    for name, module in model.items():
        torch.testing.assert_close(module(x), wanted[name], rtol=0, atol=1e-6)
    half = x.to(torch.bfloat16)
    assert model["plain"](half).shape == half.shape


def test_log_probabilities_and_their_gradient_are_those_of_the_composed_form() -> None:
    torch.manual_seed(0)
    logits = torch.randn(6, 11, requires_grad=True)
    targets, inverse = torch.randint(0, 11, (6,)), torch.tensor([1.0, 0.5, 2.0, 1.0, 1.0, 4.0])
    gradient = torch.randn(6)
    chosen, entropies = token_logprobs(logits, targets, inverse)
    wanted, wanted_entropies = _chunk(logits, targets, inverse)
    torch.testing.assert_close(chosen, wanted)
    torch.testing.assert_close(entropies, wanted_entropies.detach())
    assert not entropies.requires_grad
    (got,) = torch.autograd.grad(chosen, logits, gradient)
    (composed,) = torch.autograd.grad(wanted, logits, gradient)
    torch.testing.assert_close(got, composed, rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_glibc_takes_the_settings() -> None:
    assert keep_freed_memory()
