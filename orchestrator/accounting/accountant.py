"""The accounts of a whole run: what the actors tell, over their lives, with idle time explained. Pure; time is an argument."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from experience.accounting import WORK, Cause
from experience.slots import EMPTY, FREE, Doing
from orchestrator.accounting.attribution import Attribution, Window
from orchestrator.config import Config

ENGINE, LEARNER = "engine-", "learner-"
TIME_SHARED = (Cause.TRAIN, Cause.SAVE, Cause.WEIGHT_STALL)

Seconds = dict[Cause, float]


@dataclass
class _Life:
    """What an actor has told since its process began."""

    attempt: int
    accounts: Mapping[str, Mapping[Cause, float]] = field(default_factory=dict)
    slots: Mapping[str, float] = field(default_factory=dict)
    cpu_s: float = 0.0


class Accountant:
    """Feed it every pulse (`pulse`) and, once for each round of pulses, `close_window`.

    ``learner_accelerators``: how many the learner's lane stands for. ``time_shared``: the learner runs on the engines'
    own accelerators, in turns with them. ``worker_slots``: the slots of all workers when none is missing. ``split``:
    engines prefill or decode, not both.
    """

    def __init__(
        self,
        now: float,
        worker_slots: int,
        learner_accelerators: float = 1.0,
        time_shared: bool = False,
        split: bool = False,
    ) -> None:
        self._worker_slots = worker_slots
        self._learner_accelerators = learner_accelerators
        self._time_shared = time_shared
        self._closed_at = now
        self._lives: dict[str, _Life] = {}
        self._lanes: dict[str, Seconds] = {}
        self._training: dict[str, Seconds] = {}
        self._fresh: dict[str, Seconds] = {}
        """Seconds of the present window, by lane."""
        self._slots: dict[str, float] = {}
        self._empty: list[float] = []
        self._cpu: dict[str, float] = {}
        self.attribution = Attribution(split)

    def pulse(
        self,
        actor: str,
        attempt: int,
        accounts: Mapping[str, Mapping[Cause, float]],
        slots: Mapping[str, float],
        cpu_s: float,
    ) -> None:
        """What ``actor`` tells: cumulative since its process began. ``attempt`` numbers its lives."""
        life = self._lives.get(actor)
        if life is None or life.attempt != attempt:
            life = _Life(attempt)
        for lane, causes in accounts.items():
            grown = _growth(life.accounts.get(lane, {}), causes)
            _merge(self._fresh.setdefault(lane, {}), grown)
        if slots:
            grown_slots = {name: value - life.slots.get(name, 0.0) for name, value in slots.items()}
            self._empty.append(grown_slots.get(EMPTY, 0.0))
            for name in (*(doing.value for doing in Doing), FREE):
                self._slots[name] = self._slots.get(name, 0.0) + max(0.0, grown_slots.get(name, 0.0))
        self._cpu[actor] = self._cpu.get(actor, 0.0) + max(0.0, cpu_s - life.cpu_s)
        self._lives[actor] = _Life(attempt, accounts, slots, cpu_s)

    def close_window(self, now: float, training: bool, publishing_s: float = 0.0, missing_workers: float = 0.0) -> None:
        """All pulses of this round are in. ``training``: the window lies between the first and the last step.

        ``publishing_s``: seconds of the window in which a version was on its way; ``missing_workers``: share of the
        workers that are dead or starting.
        """
        window = self._window(now, publishing_s, missing_workers)
        self.attribution.begin(window)
        for lane, seconds in self._fresh.items():
            explained = dict(seconds)
            if training and lane.startswith(ENGINE):
                _merge(explained, self.attribution.engine_idle(explained.pop(Cause.IDLE, 0.0), window))
            elif training and lane.startswith(LEARNER):
                _merge(explained, self.attribution.learner_wait(explained.pop(Cause.QUEUE_EMPTY, 0.0), window))
            _merge(self._lanes.setdefault(lane, {}), explained)
            if training:
                _merge(self._training.setdefault(lane, {}), explained)
        self._fresh, self._slots, self._empty = {}, {}, []
        self._closed_at = now

    def lanes(self) -> dict[str, dict[str, float]]:
        """Seconds by lane and cause over the whole run; a lane goes on through the lives of its actor."""
        return {
            lane: {cause.value: round(value, 3) for cause, value in sorted(seconds.items())}
            for lane, seconds in sorted(self._lanes.items())
        }

    def idle(self) -> dict[str, float]:
        """Share of the accelerator-seconds of engines and learner, while it trained, by the cause of doing nothing useful."""
        seconds = self._accelerator_seconds()
        total = sum(seconds.values())
        if total <= 0:
            return {}
        return {
            cause.value: round(value / total, 5)
            for cause, value in sorted(seconds.items(), key=lambda item: -item[1])
            if cause not in WORK and value / total >= 5e-6
        }

    def cpu_s(self) -> dict[str, float]:
        """CPU seconds by actor, over all its lives."""
        return {actor: round(seconds, 2) for actor, seconds in sorted(self._cpu.items())}

    def _accelerator_seconds(self) -> Seconds:
        engines: Seconds = {}
        learner: Seconds = {}
        lanes = 0
        for lane, seconds in self._training.items():
            if lane.startswith(ENGINE):
                _merge(engines, seconds)
                lanes += 1
            elif lane.startswith(LEARNER):
                _merge(learner, seconds)
        if not self._time_shared:
            return _merge(engines, {cause: value * self._learner_accelerators for cause, value in learner.items()})
        for cause in TIME_SHARED:  # the engines' pacing is what the learner does on the same accelerators
            moved = min(engines.get(Cause.PACING, 0.0), learner.get(cause, 0.0) * lanes)
            _merge(engines, {cause: moved, Cause.PACING: -moved})
        return engines

    def _window(self, now: float, publishing_s: float, missing_workers: float) -> Window:
        length = max(0.0, now - self._closed_at)
        engines: Seconds = {}
        learner: Seconds = {}
        for lane, seconds in self._fresh.items():
            if lane.startswith(ENGINE):
                _merge(engines, seconds)
            elif lane.startswith(LEARNER):
                _merge(learner, seconds)
        total = sum(engines.values())
        lost = {
            cause: engines[cause] / total
            for cause in (Cause.FAILURE, Cause.STARTUP)
            if total > 0 and engines.get(cause)
        }
        return Window(
            seconds=length,
            slots=self._slots,
            empty_s=min(self._empty, default=0.0),
            missing_slots=self._worker_slots * missing_workers * length,
            learner=learner,
            publishing_s=publishing_s,
            engines_lost=lost,
        )


def accountant_of(config: Config, now: float) -> Accountant:
    """The accountant of a run with this configuration."""
    synthetic = config.learner.backend == "synthetic"
    return Accountant(
        now,
        worker_slots=config.rollout.concurrency,
        learner_accelerators=config.learner.synthetic.accelerators if synthetic else 1.0,
        time_shared=synthetic and config.mode == "sync",
        split=config.engines.split,
    )


def _growth(before: Mapping[Cause, float], after: Mapping[Cause, float]) -> Seconds:
    return {cause: value - before.get(cause, 0.0) for cause, value in after.items() if value > before.get(cause, 0.0)}


def _merge(into: Seconds, other: Mapping[Cause, float]) -> Seconds:
    for cause, seconds in other.items():
        into[cause] = into.get(cause, 0.0) + seconds
    return into
