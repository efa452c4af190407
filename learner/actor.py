"""The Ray shell of the learner: leases groups as they finish, trains on them while the rest is generated, publishes.

==============  ================================  ===============================  ================================
loop            consumes                          produces                         waits for
==============  ================================  ===============================  ================================
``run``         groups leased from the queue      one version a step, an ack,      groups; the publication of the
                                                  metrics, checkpoints             version before; the checkpoint
                                                                                   before, until it is written
``prepare``     the weights of the last step      a copy for the transport         nothing
==============  ================================  ===============================  ================================

Computation runs on a thread, so that the actor answers calls (and keeps the next lease open) meanwhile.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experience.accounting import Cause
from experience.books import clock, process_books
from experience.transport.client import QueueConsumer, consumer_for
from learner.config import LearnerConfig, ModelConfig
from learner.training_lane import TrainingLane
from weight_sync.config import WeightsConfig

logger = logging.getLogger(__name__)

CAUSES = {
    "waiting": Cause.QUEUE_EMPTY,
    "training": Cause.TRAIN,
    "publishing": Cause.WEIGHT_STALL,
    "saving": Cause.SAVE,
}
"""As which cause the seconds of a phase count; those between two phases are spent on calls and count as idle."""

LEASE_S = 5.0
"""How long one lease call stays open; it is renewed until groups come."""


@dataclass(frozen=True)
class LearnerSettings:
    """All that a learner process needs to know."""

    learner: LearnerConfig
    model: ModelConfig
    weights: WeightsConfig
    model_path: Path
    checkpoint_directory: Path
    threads: int
    max_lag: int
    groups_per_update: int
    steps: int
    checkpoint_every: int
    keep_checkpoints: int
    deterministic: bool
    seed: int
    ranks: tuple[Any, ...] = ()
    """Actors of the ranks that train together; none: the learner's own process trains."""
    time_shared: bool = False
    """`mode: sync` (a synthetic learner trains on the engines' modelled accelerators)."""


class LearnerActor:
    """One learner. Version v is what the weights are after v steps; step v trains on groups at version v."""

    def __init__(self, name: str, settings: LearnerSettings) -> None:
        self.name = name
        self._settings = settings
        self._learner: Any = None
        self._sender: Any = None
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="learner")
        self._prepared = -1
        self._copied = asyncio.Event()
        self._copied.set()
        self._phase = "starting"
        self._account = process_books().account()
        self._group: Any = None
        """The ranks that train together; None: this process trains."""
        self._writing: asyncio.Future[None] | None = None
        """The checkpoint that is being written while training goes on."""
        self._groups = 0
        self._seconds = {"waiting": 0.0, "training": 0.0, "publishing": 0.0, "saving": 0.0}
        self._ended = asyncio.Event()
        self._moved_bytes = 0
        """What an engine gets of the last version offered."""

    async def load(self, checkpoint: str | None) -> int:
        """Build model and optimizer from the model directory, or from a checkpoint. Returns the version."""
        return int(await self._compute(self._load, checkpoint))

    async def run(self, queue: Any, controller: Any, engine_nodes: list[str]) -> int:
        """Train to the last step; returns the final version. One `controller.step_done` call a step.

        ``engine_nodes`` are the host names of the engines: they decide the transport.
        """
        training = asyncio.ensure_future(self._train(queue, controller, engine_nodes))
        if self._group is None:
            return await training
        lost: asyncio.Future[Exception] = asyncio.ensure_future(self._group.lost())
        watched: list[asyncio.Future[Any]] = [training, lost]
        await asyncio.wait(watched, return_when=asyncio.FIRST_COMPLETED)
        if training.done():
            lost.cancel()
            return training.result()
        training.cancel()
        raise lost.result()

    async def _train(self, queue: Any, controller: Any, engine_nodes: list[str]) -> int:
        settings = self._settings
        await self._compute(self._open_sender, engine_nodes)
        consumer = await consumer_for(queue)
        publication: asyncio.Future[Any] | None = None
        while self._learner.version < settings.steps:
            metrics, group_ids = await self._step(consumer)
            version = self._learner.version
            await queue.ack.remote(
                group_ids, version - 1, int(metrics["tokens/trained"]), int(metrics["tokens/masked"])
            )
            if self._is_published(version):
                if publication is not None:
                    with _Timer(self, "publishing"):
                        await publication
                self._copied.clear()
                publication = asyncio.ensure_future(_call(controller.publish.remote(version)))
            await controller.step_done.remote(version, {**metrics, **self._shares()})
            if self._writing is not None and self._writing.done():
                await self._written()
            if self._is_due(version):
                with _Timer(self, "saving"):
                    await self._save(queue, controller)
        if publication is not None:
            await publication
        with _Timer(self, "saving"):
            await self._written()
        self._phase = "finished"
        return int(self._learner.version)

    async def prepare(self, version: int) -> None:
        """Copy the weights of ``version`` aside; training goes on, the next update waits for this."""
        if self._learner.version != version:
            raise RuntimeError(f"the learner is at version {self._learner.version}, not {version}")
        if self._group is None:
            await asyncio.to_thread(self._prepare)
        else:
            await self._compute(self._prepare)  # ranks gather together, and not amid a pass
        self._copied.set()

    async def offer(self, version: int, members: list[str]) -> bytes:
        """The offer of the prepared version for these engines; `send` must follow."""
        if self._sender is None or self._prepared != version:
            raise RuntimeError(f"version {version} is not the one prepared")
        offer: bytes = await asyncio.to_thread(self._sender.offer, members)
        if members:
            from weight_sync.transports.protocol import carriers

            self._moved_bytes = sum(carrier.manifest.total_bytes for carrier in carriers(offer))
        return offer

    async def send(self) -> None:
        """Move the bytes of the last offer."""
        await asyncio.to_thread(self._sender.send)

    async def cancel_send(self) -> None:
        """A member of the last offer is gone: end `send` at once, so that the others need not wait for it."""
        if self._sender is not None:
            await asyncio.to_thread(self._sender.cancel)

    async def taken(self, member: str, version: int) -> None:
        """An engine was given ``version`` without this process's help."""
        if self._sender is not None:
            await asyncio.to_thread(self._sender.taken, member, version)

    async def export(self, directory: str) -> None:
        """Write the present weights as a Hugging Face directory."""
        await self._compute(self._learner.export, Path(directory))

    async def stats(self) -> dict[str, Any]:
        return {"phase": self._phase, "groups": self._groups, "seconds": dict(self._seconds)}

    async def alive(self) -> None:
        """Ends with the process only."""
        await self._ended.wait()

    async def stop(self) -> None:
        """Release shared memory and process groups."""
        if self._sender is not None:
            self._sender.close()
        self._ended.set()

    async def _step(self, consumer: QueueConsumer) -> tuple[dict[str, float], list[str]]:
        """One update: groups are trained on as they arrive, and normalised once."""
        settings = self._settings
        version = self._learner.version
        began_at = time.monotonic()
        waited_before, training_before = self._seconds["waiting"], self._seconds["training"]
        self._groups = 0
        group_ids: list[str] = []
        self._learner.begin_step()
        while len(group_ids) < settings.groups_per_update:
            with _Timer(self, "waiting"):
                encoded = await consumer.lease(self.name, settings.groups_per_update - len(group_ids), version, LEASE_S)
            if not encoded:
                continue
            with _Timer(self, "training"):
                group_ids += await self._compute(self._learner.add, encoded)
            self._groups = len(group_ids)
        with _Timer(self, "publishing"):
            limit = settings.weights.timeout_s * 4
            try:
                await asyncio.wait_for(self._copied.wait(), limit)
            except TimeoutError:
                raise TimeoutError(f"version {version} was not copied for publication within {limit:g} s") from None
        with _Timer(self, "training"):
            metrics: dict[str, float] = await self._compute(self._learner.finish_step)
        self._rebook(training_before, metrics)
        metrics["time/step_s"] = time.monotonic() - began_at
        metrics["time/wait_s"] = self._seconds["waiting"] - waited_before
        return metrics, group_ids

    def _rebook(self, training_before: float, metrics: dict[str, float]) -> None:
        """A synthetic learner trains in modelled time, also while this actor waits for groups: those seconds are training."""
        if "time/train_s" not in metrics:
            return
        missing = metrics["time/train_s"] - (self._seconds["training"] - training_before)
        moved = min(max(0.0, missing), self._seconds["waiting"])
        self._seconds["waiting"] -= moved
        self._seconds["training"] += moved

    def _is_published(self, version: int) -> bool:
        """Every ``weights.every``-th version, and the last one."""
        return version == self._settings.steps or version % self._settings.weights.every == 0

    def _is_due(self, version: int) -> bool:
        every = self._settings.checkpoint_every
        return version == self._settings.steps or (every > 0 and version % every == 0)

    async def _save(self, queue: Any, controller: Any) -> None:
        """Begin a checkpoint; training goes on while it is written."""
        await self._written()
        extra = await controller.checkpoint_extra.remote()
        await self._compute(self._learner.begin_save, self._settings.checkpoint_directory, extra)
        self._writing = asyncio.ensure_future(self._write(queue, self._learner.version))

    async def _write(self, queue: Any, version: int) -> None:
        path = await asyncio.to_thread(self._learner.finish_save)
        await queue.commit.remote(version - 1)
        logger.info("checkpoint %s written", path)

    async def _written(self) -> None:
        """The checkpoint that was begun is on disk. Raises CheckpointError."""
        writing, self._writing = self._writing, None
        if writing is not None:
            await writing

    def _make_learner(self) -> Any:
        settings = self._settings
        if settings.learner.backend == "synthetic":
            from learner.synthetic import SyntheticLearner

            learner = SyntheticLearner(
                settings.learner,
                max_lag=settings.max_lag,
                keep_checkpoints=settings.keep_checkpoints,
                time_shared=settings.time_shared,
                clock=clock,
            )
            lane = TrainingLane(self._account, learner.training.take_spans)
            process_books().adopt(lane, self._account.began_at)
            return learner
        from learner.backends.rank_group import RankGroup
        from learner.learner import Learner

        if settings.ranks:
            self._group = RankGroup(settings.ranks, settings.learner, settings.learner.rank_timeout_s)
        return Learner(
            settings.learner,
            settings.model,
            max_lag=settings.max_lag,
            threads=settings.threads,
            deterministic=settings.deterministic,
            keep_checkpoints=settings.keep_checkpoints,
            seed=settings.seed,
            initial=settings.model_path,
            group=self._group,
        )

    def _load(self, checkpoint: str | None) -> int:
        settings = self._settings
        self._learner = self._make_learner()
        if checkpoint is None:
            self._learner.load(settings.model_path)
        else:
            self._learner.restore(Path(checkpoint))
        self._phase = "ready"
        return int(self._learner.version)

    def _open_sender(self, engine_nodes: list[str]) -> None:
        from learner.publishing import OwnPublisher, RanksPublisher, SendingPlace
        from weight_sync.transports.select import choose_transport

        weights = self._settings.weights
        senders = [socket.gethostname()] if self._group is None else self._group.nodes()
        kind = choose_transport(weights.transport, senders[0], [*engine_nodes, *senders])
        beside = self._settings.checkpoint_directory.parent / "weights"
        place = SendingPlace(weights, kind, tuple(engine_nodes), str(beside))
        if self._group is None:
            self._sender = OwnPublisher(place, self._learner.device, self._learner.named_tensors)
        else:
            self._sender = RanksPublisher(place, self._group)
        logger.info("weights travel by %s from %d senders", kind, len(senders))

    def _prepare(self) -> None:
        self._sender.prepare(self._learner.version)
        self._prepared = self._learner.version

    def _shares(self) -> dict[str, float]:
        total = sum(self._seconds.values()) or 1.0
        shares = {f"learner/{phase}_share": seconds / total for phase, seconds in self._seconds.items()}
        if self._moved_bytes:
            shares["weights/moved_mb"] = self._moved_bytes / 2**20
        if self._moved_bytes and self._settings.learner.lora.rank:
            shares["weights/moved_share"] = self._moved_bytes / self._learner.model_bytes
        return shares

    async def _compute(self, function: Any, *args: Any) -> Any:
        """Run on the one thread that owns the model."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *args)


class _Timer:
    """Charges the seconds of a block to a phase of the learner."""

    def __init__(self, actor: LearnerActor, phase: str) -> None:
        self._actor = actor
        self._phase = phase

    def __enter__(self) -> None:
        self._began_at = clock()
        self._actor._phase = self._phase
        self._actor._account.switch(CAUSES[self._phase], self._began_at)

    def __exit__(self, *_: object) -> None:
        ended_at = clock()
        self._actor._seconds[self._phase] += ended_at - self._began_at
        self._actor._account.switch(Cause.IDLE, ended_at)


async def _call(reference: Any) -> Any:
    return await reference
