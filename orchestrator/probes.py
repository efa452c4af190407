"""When to ask an engine whether it is well, how long to wait for the answer, and when to give it up. Pure.

```
            answered                     missed                 missed, the last of `misses` in a row
 healthy ◄───────────── suspect ◄────────────────── healthy      suspect ─────────────► condemned
```

A death is an event and needs no probe. Probes find what is neither dead nor well: a process that was stopped, a loop that
stands still, a server that accepts connections and never answers.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from orchestrator.fleet_config import FleetConfig

PATIENCE = 20.0
"""An answer is late when it takes this many times as long as answers usually take (and longer than the time-out)."""
LONGEST_TIMEOUT = 4.0
"""An engine gets at most this many times the configured time-out, however slow it usually is."""
RESTING = 4.0
"""After an answer that took t seconds an engine has this many t without a probe: asking is no burden for a busy one."""
LONGEST_PAUSE = 8.0
"""The longest pause between two probes, in intervals."""
MEMORY = 0.8
"""Weight of the past in the usual latency."""


class Condition(StrEnum):
    HEALTHY = "healthy"
    SUSPECT = "suspect"
    CONDEMNED = "condemned"


@dataclass(frozen=True)
class Probe:
    """Ask this engine now. ``number`` tells the answer to this probe from one to an earlier one."""

    name: str
    number: int
    timeout_s: float


@dataclass
class _Patient:
    due_at: float
    number: int = 0
    asked: bool = False
    misses: int = 0
    usual_s: float | None = None
    condition: Condition = Condition.HEALTHY


class ProbePolicy:
    """Every engine by name. Times are seconds of one clock that does not go back.

    >>> policy = ProbePolicy(FleetConfig(probe_every_s=2.0, probe_timeout_s=5.0, probe_misses=2))
    >>> policy.joined("a", 0.0); policy.due(1.0), policy.next_at()
    ([], 2.0)
    >>> policy.due(2.0)
    [Probe(name='a', number=1, timeout_s=5.0)]
    >>> policy.missed("a", 1, 7.0), policy.next_at()
    (<Condition.SUSPECT: 'suspect'>, 9.0)
    >>> policy.due(9.0)[0].number, policy.missed("a", 2, 14.0)
    (2, <Condition.CONDEMNED: 'condemned'>)
    """

    def __init__(self, config: FleetConfig) -> None:
        self._config = config
        self._patients: dict[str, _Patient] = {}

    def joined(self, name: str, now: float) -> None:
        """An engine serves from now on; one of that name that was there before is forgotten."""
        self._patients[name] = _Patient(due_at=now + self._config.probe_every_s)

    def left(self, name: str) -> None:
        """An engine is gone; unknown names are ignored."""
        self._patients.pop(name, None)

    def condition(self, name: str) -> Condition:
        """Raises KeyError for an engine that has not joined."""
        return self._patients[name].condition

    def due(self, now: float) -> list[Probe]:
        """Whom to ask now. Each probe is handed out once; an engine is not asked again before its probe has ended."""
        probes = []
        for name, patient in self._patients.items():
            if self._waits(patient) and patient.due_at <= now:
                patient.number += 1
                patient.asked = True
                probes.append(Probe(name, patient.number, self._timeout_s(patient)))
        return probes

    def next_at(self) -> float | None:
        """When the next probe is due; None while nobody can be asked."""
        return min((patient.due_at for patient in self._patients.values() if self._waits(patient)), default=None)

    def answered(self, name: str, number: int, latency_s: float, now: float) -> None:
        """The engine is well. Answers to probes that are not under way are ignored."""
        patient = self._under_way(name, number)
        if patient is None:
            return
        past = latency_s if patient.usual_s is None else patient.usual_s
        patient.usual_s = MEMORY * past + (1 - MEMORY) * latency_s
        patient.misses, patient.condition = 0, Condition.HEALTHY
        every = self._config.probe_every_s
        self._rest(patient, now, min(max(every, RESTING * latency_s), LONGEST_PAUSE * every))

    def missed(self, name: str, number: int, now: float) -> Condition | None:
        """No answer, or a wrong one. Returns the engine's condition; None if this probe is not under way."""
        patient = self._under_way(name, number)
        if patient is None:
            return None
        patient.misses += 1
        if patient.misses >= self._config.probe_misses:
            patient.condition, patient.asked = Condition.CONDEMNED, False
            return patient.condition
        patient.condition = Condition.SUSPECT
        self._rest(patient, now, self._pause_s(patient.misses))
        return patient.condition

    def longest_s(self) -> float:
        """Seconds until an engine that stops answering is condemned, at most."""
        config = self._config
        pauses = sum(self._pause_s(misses) for misses in range(1, config.probe_misses))
        timeouts = config.probe_misses * LONGEST_TIMEOUT * config.probe_timeout_s
        return LONGEST_PAUSE * config.probe_every_s + timeouts + pauses

    def _pause_s(self, misses: int) -> float:
        """After so many misses in a row: a little longer each time, because load is the likeliest reason."""
        every = self._config.probe_every_s
        return float(min(every * 2 ** (misses - 1), LONGEST_PAUSE * every))

    def _timeout_s(self, patient: _Patient) -> float:
        limit = self._config.probe_timeout_s
        return min(max(limit, PATIENCE * (patient.usual_s or 0.0)), LONGEST_TIMEOUT * limit)

    def _rest(self, patient: _Patient, now: float, seconds: float) -> None:
        patient.asked = False
        patient.due_at = now + seconds

    def _under_way(self, name: str, number: int) -> _Patient | None:
        patient = self._patients.get(name)
        return patient if patient is not None and patient.asked and patient.number == number else None

    @staticmethod
    def _waits(patient: _Patient) -> bool:
        return not patient.asked and patient.condition is not Condition.CONDEMNED
