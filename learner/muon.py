"""Muon: momentum whose update of a matrix is made nearly orthogonal (Jordan 2024, kellerjordan.github.io/posts/muon).

In float32, and for all matrices of one shape at once: torch's own works in bfloat16, which a CPU is slow at.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch

_QUINTIC = (3.4445, -4.7750, 2.0315)
"""Coefficients of the Newton-Schulz iteration of that post: singular values from 0 to 1 end near 1."""


def orthogonalise(matrices_NRC: torch.Tensor, iterations: int = 5) -> torch.Tensor:
    """Each matrix with its singular values brought near 1, its singular vectors kept."""
    wide = matrices_NRC.shape[-2] <= matrices_NRC.shape[-1]
    update = matrices_NRC if wide else matrices_NRC.mT
    update = update / update.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-7)
    first, third, fifth = _QUINTIC
    for _ in range(iterations):
        gram = update @ update.mT
        update = first * update + (third * gram + fifth * gram @ gram) @ update
    result: torch.Tensor = update if wide else update.mT
    return result


class Muon(torch.optim.Optimizer):
    """For the two-dimensional weights inside the layers; embeddings, norms and biases go to AdamW."""

    def __init__(self, parameters: Iterable[torch.nn.Parameter], lr: float = 0.02, momentum: float = 0.95) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum})
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.ndim != 2:
                    raise ValueError(f"Muon is for matrices, got a parameter of shape {tuple(weight.shape)}")

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update with Nesterov momentum."""
        if closure is not None:
            raise ValueError("Muon takes no closure: compute the gradients first")
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[torch.nn.Parameter]] = defaultdict(list)
            for weight in group["params"]:
                if weight.grad is not None:
                    by_shape[weight.shape].append(weight)
            for weights in by_shape.values():
                self._update(weights, group)

    def _update(self, weights: list[torch.nn.Parameter], group: dict[str, Any]) -> None:
        directions = []
        for weight in weights:
            assert weight.grad is not None
            state = self.state[weight]
            average = state.setdefault("momentum", torch.zeros_like(weight))
            average.lerp_(weight.grad, 1 - group["momentum"])
            directions.append(weight.grad.lerp(average, group["momentum"]))
        updates = orthogonalise(torch.stack(directions))
        rows, columns = weights[0].shape
        scale = max(1.0, rows / columns) ** 0.5
        for weight, update in zip(weights, updates, strict=True):
            weight.add_(update, alpha=-group["lr"] * scale)
