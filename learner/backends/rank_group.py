"""Several ranks, each an actor, that do everything together."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from learner.backends.protocol import PassResult
from learner.backends.ranks import Bin
from learner.batching import tokens_of
from learner.config import LearnerConfig
from learner.errors import LearnerError
from learner.objectives.config import ObjectiveConfig
from learner.objectives.sums import TokenSums

logger = logging.getLogger(__name__)


class RankGroup:
    """``ranks`` are the actors' handles, in order of rank. A rank that is lost ends every call with LearnerError at once: the
    others, which wait for it in a collective, are not waited for."""

    on_cpu: bool
    updates: int

    def __init__(self, ranks: Sequence[Any], config: LearnerConfig, timeout_s: float) -> None:
        self._ranks = list(ranks)
        self._timeout_s = timeout_s
        self._config = config
        self._facts: dict[str, Any] = {}
        self.on_cpu = True
        self.updates = 0
        self.imbalance: list[float] = []
        """Of each round so far: tokens of the fullest rank over the mean, minus 1."""

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    @property
    def width(self) -> int:
        """Data-parallel ranks."""
        return int(self._facts.get("data_parallel", len(self._ranks)))

    def load(self, path: str | Path, initial: str | Path | None) -> None:
        """Have the ranks meet and build model and optimizer. Raises LearnerError, ModelError."""
        if not self._facts:
            address = self._call([self._ranks[0].address.remote()], "an address")[0]
            self._all("join", address)
        self._facts = self._all("load", str(path), None if initial is None else str(initial))[0]
        self.on_cpu = self._facts["device"] == "cpu"
        logger.info("%d ranks train %s", len(self._ranks), self._facts)

    def train(self, bins: Sequence[Bin], objective: ObjectiveConfig) -> PassResult:
        shares = self._shared(bins)
        self.imbalance.append(imbalance([sum(map(tokens_of, share)) for share in shares]))
        results: list[PassResult] = self._each("train", shares, objective)
        sums = TokenSums()
        bad: list[str] = []
        for result in self._distinct(results):
            sums.add(result.sums)
            bad.extend(result.bad_samples)
        return PassResult(sums, tuple(bad))

    def logprobs(self, bins: Sequence[Bin], objective: ObjectiveConfig) -> list[npt.NDArray[np.float32]]:
        shares = self._shared(bins)
        found = self._distinct(self._each("logprobs", shares, objective))
        width = len(shares)
        return [found[index % width][index // width] for index in range(len(bins))]

    def step(self, normaliser: float) -> float | None:
        norm: float | None = self._all("step", normaliser)[0]
        if norm is not None:
            self.updates += 1
        return norm

    def discard_gradient(self) -> None:
        self._all("discard_gradient")

    def nodes(self) -> list[str]:
        """Host name of every rank."""
        return [host for host, _ in self._all("where")]

    def together(self, method: str, *args: Any) -> list[Any]:
        """Call ``method`` of every rank's actor; the answers in order of rank. Raises as every call here does."""
        return self._all(method, *args)

    def named_tensors(self) -> Iterable[tuple[str, torch.Tensor]]:
        """All weights in this process: for looking at them. What engines get leaves the ranks (`learner.publishing`)."""
        found: list[tuple[str, torch.Tensor]] = self._all("named_tensors")[0]
        return found

    def save_model(self, directory: Path) -> None:
        self._all("save_model", str(directory))

    def optimizer_state(self) -> dict[str, torch.Tensor]:
        state: dict[str, torch.Tensor] = self._all("optimizer_state")[0]
        return state

    def load_optimizer_state(self, state: dict[str, torch.Tensor], updates: int) -> None:
        self._all("load_optimizer_state", state, updates)
        self.updates = updates

    def reference_state(self) -> dict[str, torch.Tensor]:
        state: dict[str, torch.Tensor] = self._all("reference_state")[0]
        return state

    def load_reference_state(self, state: dict[str, torch.Tensor]) -> None:
        self._all("load_reference_state", state)

    def describe(self) -> dict[str, Any]:
        return {**self._facts, "ranks": len(self._ranks)}

    # Calls

    def _shared(self, bins: Sequence[Bin]) -> list[list[Bin]]:
        """Bin i goes to data-parallel rank i modulo ``width``; all get equally many, with empty ones at the end."""
        width = self.width
        rounds = -(-len(bins) // width)
        padded = [*bins, *([] for _ in range(rounds * width - len(bins)))]
        return [list(padded[rank::width]) for rank in range(width)]

    def _each(self, method: str, shares: list[list[Bin]], objective: ObjectiveConfig) -> list[Any]:
        """Every rank gets the share of its data-parallel place."""
        places = self._facts["places"]
        calls = [
            getattr(rank, method).remote(shares[place], objective)
            for rank, place in zip(self._ranks, places, strict=True)
        ]
        return self._call(calls, method)

    def _distinct(self, results: list[Any]) -> list[Any]:
        """The results of one rank for each data-parallel place: the last, which has what a pipeline computes."""
        by_place = dict(zip(self._facts["places"], results, strict=True))
        return [by_place[place] for place in range(self.width)]

    def _all(self, method: str, *args: Any) -> list[Any]:
        return self._call([getattr(rank, method).remote(*args) for rank in self._ranks], method)

    def _call(self, calls: list[Any], what: str) -> list[Any]:
        import ray

        waiting = list(calls)
        while waiting:
            done, waiting = ray.wait(waiting, num_returns=1, timeout=self._timeout_s)
            if not done:
                late = [str(calls.index(call)) for call in waiting]
                raise LearnerError(
                    f"{what}: no answer from rank {', '.join(late)} of the learner in {self._timeout_s:g} s"
                )
            try:
                ray.get(done[0])  # an error of one rank is told at once, whatever the others wait for
            except ray.exceptions.RayTaskError as error:
                raise error.as_instanceof_cause() from error
            except ray.exceptions.RayActorError as error:
                rank = calls.index(done[0])
                raise LearnerError(
                    f"rank {rank} of {len(calls)} of the learner was lost during {what!r}: {error}"
                ) from error
        return list(ray.get(calls))


def imbalance(loads: Sequence[int]) -> float:
    """How much more than the mean the fullest has: ``max / mean - 1``; 0 for nothing.

    >>> imbalance([90, 110])
    0.1
    """
    total = sum(loads)
    return round(max(loads) * len(loads) / total - 1.0, 12) if total else 0.0
