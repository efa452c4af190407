"""A run that makes no progress: when to say so, and whom everybody waits for. Decisions; `orchestrator.watchdog` carries them out."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from experience.slots import Doing, Wait

STAGES = {
    Doing.GENERATING: "generation",
    Doing.ENVIRONMENT: "environment",
    Doing.REWARD: "reward",
    Doing.DELIVERING: "queue",
}
ACTORS = {
    Doing.GENERATING: "engine",
    Doing.ENVIRONMENT: "environment",
    Doing.REWARD: "reward",
    Doing.DELIVERING: "queue",
}
ROLE_STAGES = {
    "queue": "queue",
    "engine": "generation",
    "environment": "environment",
    "reward": "reward",
    "worker": "dispatch",
}
LEARNER_STAGES = {"training": "training", "saving": "saving", "publishing": "weight sync", "waiting": "training"}


class StallWatch:
    """When has nothing been trained for longer than expected? Times are seconds of one clock.

    Expected are ``factor`` median steps and the longest of the recent episodes, ``floor_s`` at least; before the first step
    ``first_s``.

    >>> watch = StallWatch(factor=3.0, floor_s=1.0, first_s=100.0, now=0.0)
    >>> watch.overdue(99.0), watch.overdue(101.0), watch.overdue(150.0), watch.overdue(203.0)
    (False, True, False, True)
    >>> for at in (210.0, 212.0, 214.0): watch.trained(at)
    >>> watch.episode(5.0); watch.expected_s()
    11.0
    """

    def __init__(self, factor: float, floor_s: float, first_s: float, now: float) -> None:
        self._factor = factor
        self._floor_s = floor_s
        self._first_s = first_s
        self._steps: deque[float] = deque(maxlen=20)
        self._episodes: deque[float] = deque(maxlen=256)
        self._stepped = False
        self.since = now
        """When something was trained last (or the watch began)."""
        self._warned_s = 0.0

    @property
    def warned(self) -> bool:
        """Whether there was a warning since the last step."""
        return self._warned_s > 0

    def trained(self, now: float) -> None:
        """A step is done."""
        if self._stepped:
            self._steps.append(now - self.since)
        self._stepped = True
        self.since, self._warned_s = now, 0.0

    def episode(self, seconds: float) -> None:
        """An episode took that long. Those that a stall held up are no measure."""
        if not self.warned:
            self._episodes.append(seconds)

    def expected_s(self) -> float:
        """How long a step may take before somebody should look."""
        if not self._stepped:
            return max(self._floor_s, self._first_s)
        steps = self._factor * statistics.median(self._steps) if self._steps else self._first_s
        return max(self._floor_s, steps + max(self._episodes, default=0.0))

    def overdue(self, now: float) -> bool:
        """Whether a warning is due: when more than expected has passed, and again whenever that time has doubled."""
        idle = now - self.since
        if idle <= max(self.expected_s(), 2 * self._warned_s):
            return False
        self._warned_s = idle
        return True


@dataclass(frozen=True)
class Evidence:
    """What is known of a run that stands still."""

    phase: str = "training"
    silent: Mapping[str, float] = field(default_factory=dict)
    """Actors that do not answer, with the seconds."""
    away: Sequence[str] = ()
    """Actors that are dead or starting."""
    learner_phase: str = "waiting"
    learner_phase_s: float = 0.0
    """How long the learner has been in that phase."""
    publishing: int | None = None
    """The version on its way to the engines."""
    publishing_s: float = 0.0
    publication_awaits: Sequence[str] = ()
    evaluating: bool = False
    in_flight: int = 0
    oldest: Sequence[tuple[str, str]] = ()
    """(group, worker) in order of dispatch."""
    waits: Sequence[Wait] = ()
    """Of the oldest groups first."""
    now: float = 0.0
    """On the clock of ``waits``."""
    ready: int = 0
    needed: int = 1
    """Groups of a step."""
    paced: bool = False
    alone: Mapping[str, str] = field(default_factory=dict)
    """Role -> its only actor, where there is one only."""
    phases: Mapping[str, str] = field(default_factory=dict)
    """Engines that only prefill, or only decode."""

    def generation(self, engine: str) -> str:
        """What the stage of an engine is called: its phase, where prefill and decode are split."""
        return self.phases.get(engine.partition(".")[0], "generation")


@dataclass(frozen=True)
class Stall:
    """Whom everybody waits for."""

    stage: str
    actor: str
    detail: str
    group: str = ""
    episode: str = ""

    def __str__(self) -> str:
        whom = " ".join(part for part in (self.episode or self.group, f"({self.actor})" if self.actor else "") if part)
        return f"{self.stage}: {whom}: {self.detail}" if whom else f"{self.stage}: {self.detail}"


def judge(evidence: Evidence) -> Stall:
    """The stage, the group or episode and the actor that the run waits for: the first of these that applies."""
    return (
        _silent(evidence)
        or _weight_sync(evidence)
        or _learner(evidence)
        or _evaluation(evidence)
        or _episode(evidence)
        or _nothing(evidence)
    )


def _silent(evidence: Evidence) -> Stall | None:
    group = evidence.oldest[0][0] if evidence.oldest else ""
    for role in ("queue", "learner", "worker", "engine", "environment", "reward"):
        for actor in (name for name in [*evidence.silent, *evidence.away] if name.startswith(f"{role}-")):
            stage = LEARNER_STAGES.get(evidence.learner_phase, "training") if role == "learner" else ROLE_STAGES[role]
            if role == "engine":
                stage = evidence.generation(actor)
            if role == "engine" and evidence.publishing is not None and evidence.publishing_s > 1.0:
                stage = "weight sync"
            seconds = evidence.silent.get(actor)
            detail = "is dead or starting" if seconds is None else f"has not answered for {seconds:.0f} s"
            return Stall(stage, actor, f"{detail}; see its log {actor}-*.log", group)
    return None


def _weight_sync(evidence: Evidence) -> Stall | None:
    if evidence.publishing is None or not evidence.publication_awaits or evidence.publishing_s < 1.0:
        return None
    return Stall(
        "weight sync",
        ", ".join(evidence.publication_awaits),
        f"version {evidence.publishing} has been on its way for {evidence.publishing_s:.0f} s",
    )


def _learner(evidence: Evidence) -> Stall | None:
    stage = LEARNER_STAGES.get(evidence.learner_phase)
    if stage is None or evidence.learner_phase == "waiting" or evidence.phase == "evaluating":
        return None
    if evidence.learner_phase_s < 1.0:
        return None
    return Stall(
        stage, "learner-0", f"the learner has been {evidence.learner_phase} for {evidence.learner_phase_s:.0f} s"
    )


def _evaluation(evidence: Evidence) -> Stall | None:
    waits = [wait for wait in evidence.waits if wait.evaluation]
    if not waits or not (evidence.phase == "evaluating" or (evidence.evaluating and evidence.in_flight == 0)):
        return None
    return _of_wait("evaluation", waits[0], evidence)


def _episode(evidence: Evidence) -> Stall | None:
    waits = [wait for wait in evidence.waits if not wait.evaluation]
    if evidence.ready >= evidence.needed:
        group = evidence.oldest[0][0] if evidence.oldest else ""
        return Stall(
            "queue",
            "queue-0",
            f"{evidence.ready} groups are ready and the learner has none (a step takes {evidence.needed})",
            group,
        )
    if not waits:
        return None
    return _of_wait(STAGES[waits[0].doing], waits[0], evidence)


def _of_wait(stage: str, wait: Wait, evidence: Evidence) -> Stall:
    role = ACTORS[wait.doing]
    actor = wait.actor or evidence.alone.get(role) or f"one of the {role} actors"
    seconds = evidence.now - wait.since
    if stage == "generation":
        stage = evidence.generation(actor)
    return Stall(stage, actor, f"{wait.doing.value} for {seconds:.0f} s", wait.group_id, wait.episode_id)


def _nothing(evidence: Evidence) -> Stall:
    if evidence.oldest:
        group, worker = evidence.oldest[0]
        detail = f"{evidence.in_flight} groups in flight, none of which has a live episode"
        return Stall("dispatch", worker, detail, group)
    why = "pacing allows none at this version" if evidence.paced else "none was dispatched"
    return Stall("dispatch", "controller-0", f"no group is in flight: {why}; the learner is {evidence.learner_phase}")
