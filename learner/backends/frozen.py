"""A model that is only asked: the reference policy of a KL term, or the teacher of a distillation."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch

from learner.backends.model import load_model
from learner.batching import MicroBatch
from learner.errors import CheckpointError, ModelError
from learner.objectives.token_statistics import token_logprobs


class FrozenModel:
    """Loaded from a Hugging Face directory; never trained. ``role`` names it in errors.

    Raises ModelError if it cannot be loaded or has another vocabulary than ``vocabulary`` tokens.
    """

    def __init__(self, role: str, path: str | Path, device: torch.device, vocabulary: int) -> None:
        try:
            self._model = load_model(path, device).eval().requires_grad_(False)
        except ModelError as error:
            raise ModelError(f"{role}: {error}") from error
        found = self._model.config.vocab_size
        if found != vocabulary:
            raise ModelError(
                f"{role}={path} has a vocabulary of {found} tokens and the trained model one of {vocabulary}: they must share "
                "their tokenizer"
            )
        self.updates = 0
        """Times that other weights were copied in."""

    @torch.no_grad()
    def logits(self, batch: MicroBatch) -> torch.Tensor:
        """[m, vocabulary] of what the batch asks (`MicroBatch.asked`)."""
        output = self._model(
            input_ids=batch.inputs,
            position_ids=batch.position_ids,
            use_cache=False,
            logits_to_keep=batch.asked.positions,
            ragged=batch.layout,
        )
        logits: torch.Tensor = output.logits[0]
        return logits

    @torch.no_grad()
    def logprobs(self, batch: MicroBatch) -> torch.Tensor:
        """Of the batch's targets at the temperature that they were sampled with, float32 [n]."""
        asked = batch.asked
        return batch.spread(token_logprobs(self.logits(batch), asked.targets, asked.inverse_temperatures)[0])

    def take(self, named: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Copy the weights of a model of the same shape in. Raises CheckpointError if they are another model's."""
        mine = dict(self._model.named_parameters())
        given = dict(named)
        wrong = sorted(mine.keys() ^ given.keys()) or [n for n, p in mine.items() if p.shape != given[n].shape]
        if wrong:
            raise CheckpointError(f"the weights are not those of this model: {', '.join(wrong[:3])} do not match")
        with torch.no_grad():
            for name, parameter in mine.items():
                parameter.copy_(given[name])
        self.updates += 1

    def named_tensors(self) -> dict[str, torch.Tensor]:
        """The weights on the CPU, by name."""
        return {name: p.detach().cpu().contiguous() for name, p in self._model.named_parameters()}
