"""Several ranks, each an actor, that do everything together."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from learner.backends.protocol import PassResult
from learner.backends.rank_actor import SAVE_TIMEOUT_S
from learner.backends.ranks import Bin
from learner.config import LearnerConfig
from learner.errors import CheckpointError, LearnerError, ModelError
from learner.objectives.config import ObjectiveConfig
from learner.objectives.sums import TokenSums
from learner.prefix_tree import Sharing

logger = logging.getLogger(__name__)

GRACE_S = 5.0
"""When one rank fails, the others may say for so long why: what failed first is often the echo of a rank that was lost."""


class RankGroup:
    """``ranks`` are the actors' handles, in order of rank. A rank that is lost ends every call with LearnerError at once: the
    others, which wait for it in a collective, are not waited for. Calls may come from several threads."""

    on_cpu: bool
    updates: int

    def __init__(self, ranks: Sequence[Any], config: LearnerConfig, timeout_s: float) -> None:
        self._ranks = list(ranks)
        self._timeout_s = timeout_s
        self._config = config
        self._facts: dict[str, Any] = {}
        self._met = False
        self.on_cpu = True
        self.updates = 0
        # Ranks do things together in the order in which they are told, which must be the same for all of them.
        self._order = threading.Lock()

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    @property
    def width(self) -> int:
        """Bins under way at once: one for every stage of every data-parallel place's pipeline."""
        return self._places * int(self._facts.get("pipeline_parallel", 1))

    @property
    def _places(self) -> int:
        """Data-parallel ranks."""
        return int(self._facts.get("data_parallel", len(self._ranks)))

    @property
    def sharing(self) -> Sharing | None:
        """See `TrainingBackend.sharing`."""
        return self._config.sharing if self._facts.get("shares_prefixes", False) else None

    def load(self, path: str | Path, initial: str | Path | None) -> None:
        """Have the ranks meet and build model and optimizer. Raises LearnerError, ModelError."""
        if not self._met:
            address = self._answers([self._ranks[0].address.remote()], "start (has each rank its GPU?)")[0]
            self._all("join", address)
            self._met = True
        self._facts = self._all("load", str(path), None if initial is None else str(initial))[0]
        self.on_cpu = self._facts["device"] == "cpu"
        self.updates = 0
        logger.info("%d ranks train %s", len(self._ranks), self._facts)

    def train(self, bins: Sequence[Bin], objective: ObjectiveConfig) -> PassResult:
        shares = self._shared(bins)
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

    def gradient_is_finite(self) -> bool:
        return all(self._all("gradient_is_finite"))

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

    def begin_save(self, directory: Path) -> None:
        self._all("begin_save", str(directory))

    def finish_save(self) -> None:
        self._all("finish_save", timeout_s=SAVE_TIMEOUT_S)

    def restore(self, directory: Path, updates: int) -> None:
        self._all("restore", str(directory), updates)
        self.updates = updates

    def describe(self) -> dict[str, Any]:
        return {**self._facts, "ranks": len(self._ranks)}

    # Calls

    def _shared(self, bins: Sequence[Bin]) -> list[list[Bin]]:
        """Bin i goes to data-parallel place i modulo their number; all get equally many, with empty ones at the end."""
        width = self._places
        rounds = -(-len(bins) // width)
        padded = [*bins, *([] for _ in range(rounds * width - len(bins)))]
        return [list(padded[rank::width]) for rank in range(width)]

    def _each(self, method: str, shares: list[list[Bin]], objective: ObjectiveConfig) -> list[Any]:
        """Every rank gets the share of its data-parallel place, and nothing else."""
        return self._told(method, [(shares[place], objective) for place in self._facts["places"]])

    def _distinct(self, results: list[Any]) -> list[Any]:
        """The results of one rank for each data-parallel place: the last, which has what a pipeline computes."""
        by_place = dict(zip(self._facts["places"], results, strict=True))
        return [by_place[place] for place in range(self._places)]

    def _all(self, method: str, *args: Any, timeout_s: float | None = None) -> list[Any]:
        return self._told(method, [args] * len(self._ranks), timeout_s)

    def _told(self, method: str, arguments: Sequence[tuple[Any, ...]], timeout_s: float | None = None) -> list[Any]:
        """The answers of all ranks to one call, each with arguments of its own."""
        with self._order:
            calls = [getattr(rank, method).remote(*own) for rank, own in zip(self._ranks, arguments, strict=True)]
        return self._answers(calls, method, timeout_s)

    def _answers(self, calls: list[Any], what: str, timeout_s: float | None = None) -> list[Any]:
        import ray

        waiting, limit = list(calls), timeout_s or self._timeout_s
        while waiting:
            done, waiting = ray.wait(waiting, num_returns=1, timeout=limit)
            if not done:
                late = [str(calls.index(call)) for call in waiting]
                raise LearnerError(f"{what}: no answer from rank {', '.join(late)} of the learner in {limit:g} s")
            try:
                ray.get(done[0])  # an error of one rank is told at once, whatever the others wait for
            except ray.exceptions.RayError as error:
                raise self._failure(calls, calls.index(done[0]), error, what) from error
        return list(ray.get(calls))

    def _failure(self, calls: list[Any], rank: int, error: Any, what: str) -> Exception:
        """What to say when ``rank`` answers with ``error``: the loss of another one may be behind it."""
        import ray

        if isinstance(known := _cause(error), OWN_ERRORS):
            return known
        errors = {rank: error}
        done, _ = ray.wait(calls, num_returns=len(calls), timeout=GRACE_S)
        for call in done:
            try:
                ray.get(call)
            except ray.exceptions.RayError as other:
                errors[calls.index(call)] = other
        lost = [place for place, answer in errors.items() if isinstance(answer, ray.exceptions.RayActorError)]
        if lost:
            return self._loss(min(lost), f"during {what!r}", errors[min(lost)])
        for answer in errors.values():
            if isinstance(known := _cause(answer), OWN_ERRORS):
                return known
        known = _cause(error)
        return LearnerError(f"rank {rank} of {len(calls)} of the learner: {what!r}: {type(known).__name__}: {known}")

    def _loss(self, rank: int, when: str, error: BaseException) -> LearnerError:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        why = lines[-1] if "creation task" in lines[0] else lines[0]  # Ray gives the traceback as text
        return LearnerError(
            f"rank {rank} of {len(self._ranks)} of the learner was lost {when}: {why.strip()}; the step is not applied: "
            "`millrace resume` goes on from the last checkpoint"
        )

    async def lost(self) -> LearnerError:
        """Returns when the process of a rank has ended, also while no call is under way."""
        import ray

        async def ended(rank: int, call: Any) -> tuple[int, BaseException]:
            try:
                await call
            except ray.exceptions.RayError as error:
                return rank, error
            return rank, RuntimeError("it ended by itself")

        watched = [asyncio.ensure_future(ended(rank, actor.alive.remote())) for rank, actor in enumerate(self._ranks)]
        try:
            done, _ = await asyncio.wait(watched, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in watched:
                task.cancel()
        rank, error = min((task.result() for task in done), key=lambda found: found[0])
        return self._loss(rank, "(its process has ended)", error)


OWN_ERRORS = (LearnerError, ModelError, CheckpointError)


def _cause(error: Any) -> Any:
    return getattr(error, "cause", None) or error
