"""The simulated learner: leases groups as they finish, trains on them, and publishes. The steps of `LearnerActor.run`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from experience.entries import LeasedGroup
from orchestrator.simulator.accounts import Accounts
from orchestrator.simulator.cluster import Cluster
from orchestrator.simulator.entries import entries_of
from orchestrator.simulator.events import EventLoop


class Phase(StrEnum):
    WAITING = "waiting"
    TRAINING = "training"
    PUBLISHING = "publishing"
    """Waits until the version before is served."""
    FINISHED = "finished"


class LearnerPorts(Protocol):
    """What the learner asks of the rest of the run."""

    def lease(self, limit: int, version: int) -> list[LeasedGroup]: ...

    def ack(self, group_ids: list[str], step: int, trained: int, masked: int) -> None: ...

    def publish(self, version: int) -> None:
        """Begin to publish; `Learner.published` is called when all engines serve it."""
        ...


@dataclass(frozen=True)
class LearnerSettings:
    groups_per_update: int
    max_lag: int
    steps: int


class Learner:
    """One learner; ``version`` is the number of steps that it has made. ``changed`` is called before its phase changes."""

    def __init__(
        self,
        settings: LearnerSettings,
        cluster: Cluster,
        loop: EventLoop,
        ports: LearnerPorts,
        accounts: Accounts,
        changed: Callable[[], None],
    ) -> None:
        self._settings, self._cluster, self._loop, self._ports = settings, cluster, loop, ports
        self._accounts, self._changed = accounts, changed
        self.version = 0
        self.phase = Phase.WAITING
        self.step_ended: list[float] = []
        """When each step ended."""
        self._groups: list[LeasedGroup] = []
        self._publishing = False

    def start(self) -> None:
        self.offered()

    def offered(self) -> None:
        """Groups may have become ready."""
        if self.phase is not Phase.WAITING:
            return
        lacking = self._settings.groups_per_update - len(self._groups)
        fresh = self._ports.lease(lacking, self.version)
        if not fresh:
            return
        self._groups += fresh
        complete = len(self._groups) == self._settings.groups_per_update
        if self._cluster.time_shared:
            if complete:
                self._train(self._groups, self._cluster.switch_s, self._finish)
        else:
            self._train(fresh, 0.0, self._finish if complete else self._resume)

    def published(self, version: int) -> None:
        """All engines serve ``version``."""
        del version
        self._publishing = False
        if self.phase is Phase.PUBLISHING:
            self._publish()

    def _train(self, groups: list[LeasedGroup], extra_s: float, then: Callable[[], None]) -> None:
        tokens = sum(entry.context_tokens for entry in entries_of(groups))
        seconds = tokens * self._cluster.seconds_per_token / self._cluster.learner_accelerators
        self._enter(Phase.TRAINING)
        self._loop.after(extra_s + seconds, then)

    def _resume(self) -> None:
        self._enter(Phase.WAITING)
        self.offered()

    def _finish(self) -> None:
        self._loop.after(self._cluster.step_overhead_s, self._stepped)

    def _stepped(self) -> None:
        groups, self._groups = self._groups, []
        trained, masked = self._count(groups)
        step = self.version
        self.version += 1
        self._accounts.steps += 1
        self.step_ended.append(self._loop.now)
        self._ports.ack([group.group_id for group in groups], step, trained, masked)
        if self._publishing:
            self._enter(Phase.PUBLISHING)
        else:
            self._publish()

    def _publish(self) -> None:
        if self.version >= self._settings.steps:
            self._enter(Phase.FINISHED)
            return
        self._publishing = True
        self._enter(Phase.WAITING)
        self._ports.publish(self.version)
        self.offered()

    def _count(self, groups: list[LeasedGroup]) -> tuple[int, int]:
        """Tokens of a step that carry loss, and those that are too old to."""
        trained = masked = 0
        for entry in entries_of(groups):
            self._accounts.context += entry.context_tokens
            self._accounts.episodes += 1
            for version, tokens in entry.segments:
                lag = self.version - version
                if lag <= self._settings.max_lag:
                    trained += tokens
                    self._accounts.lags[lag] += tokens
                else:
                    masked += tokens
        return trained, masked

    def _enter(self, phase: Phase) -> None:
        self._changed()
        self.phase = phase
