"""Supervised fine-tuning on demonstrations: gives a model the syntax and habits from which reinforcement goes on."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from learner.muon import Muon


class Demonstration(NamedTuple):
    """One conversation as tokens; ``trained`` marks those that carry loss (the model's own)."""

    tokens: list[int]
    trained: list[bool]


@dataclass(frozen=True, kw_only=True)
class WarmUpSettings:
    """Muon for the matrices inside the layers, AdamW for the rest; both rates rise linearly over ``rise_steps`` and
    fall linearly to ``final_share`` of themselves at the last step.
    """

    steps: int = 400
    batch_size: int = 32
    matrix_lr: float = 0.02
    lr: float = 4e-3
    rise_steps: int = 20
    final_share: float = 0.1
    betas: tuple[float, float] = (0.9, 0.98)
    clip_grad: float = 1.0
    seed: int = 0

    def share_at(self, step: int) -> float:
        """The share of the full learning rates in step ``step`` (from 0)."""
        if step < self.rise_steps:
            return (step + 1) / self.rise_steps
        passed = (step - self.rise_steps) / max(1, self.steps - 1 - self.rise_steps)
        return 1 - (1 - self.final_share) * passed


Progress = Callable[[int, int, float], None]
"""Called after each step with steps done, steps in all, and the loss of the step."""


def warm_up(
    model: nn.Module,
    demonstrations: Sequence[Demonstration],
    settings: WarmUpSettings,
    progress: Progress | None = None,
) -> list[float]:
    """Train a Hugging Face causal language model in place; returns the loss of every step (nats a token).

    The same model, demonstrations, settings and number of torch threads give the same weights. Raises ValueError when
    there is nothing to train on, FloatingPointError when the loss is no longer finite.
    """
    if not any(any(demonstration.trained[1:]) for demonstration in demonstrations):
        raise ValueError("warm-up needs demonstrations with at least one trained token each, got none")
    optimizers = _make_optimizers(model, settings)
    generator = torch.Generator().manual_seed(settings.seed)
    model.train()
    losses: list[float] = []
    order: list[int] = []
    for step in range(settings.steps):
        while len(order) < settings.batch_size:
            order += torch.randperm(len(demonstrations), generator=generator).tolist()
        batch = [demonstrations[index] for index in order[: settings.batch_size]]
        del order[: settings.batch_size]
        loss = _loss(model, batch)
        if not math.isfinite(value := float(loss.detach())):
            raise FloatingPointError(f"warm-up step {step}: the loss is {value}; lower the learning rate {settings.lr}")
        model.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), settings.clip_grad)
        for optimizer, full_lr in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = full_lr * settings.share_at(step)
            optimizer.step()
        losses.append(value)
        if progress is not None:
            progress(step + 1, settings.steps, value)
    model.eval()
    return losses


def _make_optimizers(model: Any, settings: WarmUpSettings) -> list[tuple[torch.optim.Optimizer, float]]:
    """The two optimizers, each with its full learning rate."""
    outer = {id(weight) for weight in model.get_input_embeddings().parameters()}
    outer |= {id(weight) for weight in model.get_output_embeddings().parameters()}
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    matrices = [weight for weight in weights if weight.ndim == 2 and id(weight) not in outer]
    inside = {id(weight) for weight in matrices}
    rest = [weight for weight in weights if id(weight) not in inside]
    made: list[tuple[torch.optim.Optimizer, float]] = [(Muon(matrices, settings.matrix_lr), settings.matrix_lr)]
    made.append((torch.optim.AdamW(rest, lr=settings.lr, betas=settings.betas, weight_decay=0.0), settings.lr))
    return made


def _loss(model: Any, batch: Sequence[Demonstration]) -> torch.Tensor:
    """Mean cross entropy over the trained tokens of a batch.

    Demonstrations share rows (short ones would be mostly padding), each seeing only itself; only positions whose next
    token is trained go through the output layer.
    """
    rows = _pack_rows([len(demonstration.tokens) for demonstration in batch])
    length = max(sum(len(batch[index].tokens) for index in row) for row in rows)
    tokens_BT = torch.zeros(len(rows), length, dtype=torch.long)
    positions_BT = torch.zeros(len(rows), length, dtype=torch.long)
    owners_BT = torch.full((len(rows), length), -1)
    predicts_BT = torch.zeros(len(rows), length, dtype=torch.bool)
    """Whether the next token is the same demonstration's and trained."""
    for row, indices in enumerate(rows):
        start = 0
        for index in indices:
            tokens, trained = batch[index]
            part = slice(start, start + len(tokens))
            tokens_BT[row, part] = torch.tensor(tokens)
            positions_BT[row, part] = torch.arange(len(tokens))
            owners_BT[row, part] = index
            predicts_BT[row, start : part.stop - 1] = torch.tensor(trained[1:])
            start = part.stop
    same_BTT = owners_BT[:, :, None] == owners_BT[:, None, :]
    visible_B1TT = (same_BTT & torch.ones(length, length, dtype=torch.bool).tril())[:, None]
    device = next(model.parameters()).device
    hidden_BTD = model.base_model(
        input_ids=tokens_BT.to(device),
        position_ids=positions_BT.to(device),
        attention_mask=visible_B1TT.to(device),
        use_cache=False,
    ).last_hidden_state
    targets_N = tokens_BT.roll(-1, 1)[predicts_BT].to(device)
    logits_NV = model.get_output_embeddings()(hidden_BTD[predicts_BT.to(device)])
    return nn.functional.cross_entropy(logits_NV.float(), targets_N)


def _pack_rows(lengths: Sequence[int]) -> list[list[int]]:
    """Indices by row: the longest first, each into the first row with room; a row has room for the longest of all."""
    room = max(lengths)
    rows: list[list[int]] = []
    filled: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        fitting = (row for row, used in enumerate(filled) if used + lengths[index] <= room)
        row = next(fitting, len(rows))
        if row == len(rows):
            rows.append([])
            filled.append(0)
        rows[row].append(index)
        filled[row] += lengths[index]
    return rows
