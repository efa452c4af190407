"""What a run directory says of the run beside its journals: state, numbers of each step, evaluations, logs."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import yaml

from orchestrator.config import SECRET_KEY
from orchestrator.run_directory import RunDirectory, RunDirectoryError
from orchestrator.telemetry import MASK

MAX_LOG_KINDS = 60
MAX_LOG_BYTES = 32 << 20
"""Of a longer log its last bytes are read."""
_LOG_LINE = re.compile(r"^(?P<at>\d{4}-\d\d-\d\d \d\d:\d\d:\d\d)\S* (?P<level>[A-Z]+) (?P<name>\S+): (?P<text>.*)$")
_LOUD = ("WARNING", "ERROR", "CRITICAL")
_TOLERANCE_S = 5.0


@dataclass(frozen=True)
class LogNote:
    """Warnings of one kind (texts that differ by numbers only) in one actor's logs."""

    actor: str
    level: str
    text: str
    count: int
    first_at: str
    last_at: str


@dataclass
class Facts:
    """All but the journals. Times are Unix seconds."""

    name: str
    path: str
    status: str
    """``finished``, ``failed``, ``interrupted``, ... as the run itself says; ``running``; or ``killed``: it ended without
    a word."""
    summary: dict[str, Any] | None
    """Of the latest attempt; None when it left none."""
    config: dict[str, Any]
    config_text: str
    """The config with secrets masked."""
    attempts: list[dict[str, Any]]
    metrics: list[dict[str, Any]]
    """One line a learner step, as written."""
    evaluations: list[dict[str, Any]]
    logs: list[LogNote]
    problems: list[str] = field(default_factory=list)
    fleet: list[dict[str, Any]] = field(default_factory=list)
    """What happened to the engines, as written (`orchestrator.fleet_log`)."""

    @property
    def steps_done(self) -> int:
        if self.summary is not None and isinstance(self.summary.get("steps"), int):
            return int(self.summary["steps"])
        return int(self.metrics[-1]["step"]) if self.metrics else 0

    @property
    def steps_planned(self) -> int | None:
        steps = self.setting("run", "steps")
        return steps if isinstance(steps, int) else None

    @property
    def max_lag(self) -> int | None:
        if self.summary is not None and isinstance(self.summary.get("max_lag"), int):
            return int(self.summary["max_lag"])
        bound = self.setting("staleness", "max_lag")
        return bound if isinstance(bound, int) else None

    @property
    def last_sign_at(self) -> float | None:
        """When it last wrote a number."""
        return float(self.metrics[-1]["time"]) if self.metrics and "time" in self.metrics[-1] else None

    @property
    def wall_s(self) -> float | None:
        """Seconds of the latest attempt."""
        if self.summary is not None and isinstance(self.summary.get("wall_s"), int | float):
            return float(self.summary["wall_s"])
        began_at = self.attempts[-1].get("started_at") if self.attempts else None
        return None if began_at is None or self.last_sign_at is None else max(0.0, self.last_sign_at - began_at)

    @property
    def idle(self) -> dict[str, float]:
        """Share of the accelerator-seconds of engines and learner by cause of idleness, as far as the run kept accounts."""
        told = (self.summary or {}).get("idle")
        if not isinstance(told, dict):
            last = self.metrics[-1] if self.metrics else {}
            told = {key.removeprefix("idle/"): share for key, share in last.items() if key.startswith("idle/")}
        return {str(cause): float(share) for cause, share in told.items() if isinstance(share, int | float)}

    @property
    def scales(self) -> dict[str, float]:
        """``time_scale`` and ``token_scale`` of modelled engines; empty when they are real."""
        synthetic = self.setting("engines", "synthetic")
        if self.setting("engines", "kind") != "synthetic" or not isinstance(synthetic, dict):
            return {}
        names = ("time_scale", "token_scale")
        return {name: float(synthetic[name]) for name in names if isinstance(synthetic.get(name), int | float)}

    @property
    def accounts(self) -> dict[str, dict[str, float]]:
        """Lane -> cause -> seconds, idle time explained; empty for a run without a summary."""
        told = (self.summary or {}).get("accounting")
        if not isinstance(told, dict):
            return {}
        return {str(lane): causes for lane, causes in told.items() if isinstance(causes, dict)}

    def setting(self, section: str, name: str) -> Any:
        """One value of the config, or None."""
        part = self.config.get(section)
        return part.get(name) if isinstance(part, dict) else None


def gather(run: RunDirectory) -> Facts:
    """Read everything small. What is missing or damaged is left out and told in ``problems``."""
    problems: list[str] = []
    config, config_text = _config(run, problems)
    attempts = _json_lines(run.attempts, problems)
    metrics = _json_lines(run.metrics, problems)
    summary = _summary(run, attempts, problems)
    return Facts(
        name=run.path.name,
        path=str(run.path),
        status=_status(summary, attempts),
        summary=summary,
        config=config,
        config_text=config_text,
        attempts=attempts,
        metrics=[line for line in metrics if "time/step_s" in line or "loss" in line],
        evaluations=_evaluations(run, problems),
        logs=read_logs(run.logs, problems),
        problems=problems,
        fleet=_json_lines(run.fleet_events, problems),
    )


def _config(run: RunDirectory, problems: list[str]) -> tuple[dict[str, Any], str]:
    try:
        config = yaml.safe_load(run.config.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        problems.append(f"{run.config} cannot be read: {error}")
        return {}, ""
    if not isinstance(config, dict):
        problems.append(f"{run.config} does not hold a configuration")
        return {}, ""
    masked = _masked(config)
    return masked, str(yaml.safe_dump(masked, sort_keys=False, allow_unicode=True, width=100))


def _masked(value: Any, key: str = "") -> Any:
    """The value with the texts of secret keys replaced; references to the environment stay."""
    if isinstance(value, dict):
        return {name: _masked(part, str(name)) for name, part in value.items()}
    if isinstance(value, list):
        return [_masked(part, key) for part in value]
    secret = isinstance(value, str) and value and not value.startswith("${") and SECRET_KEY.search(key)
    return MASK if secret else value


def _json_lines(path: Path, problems: list[str]) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file; a last line that was cut off is left out silently, other damage is told."""
    if not path.exists():
        return []
    values, damaged, last_is_damaged = [], 0, False
    with path.open("rb") as file:
        for line in file:
            try:
                value = json.loads(line)
            except ValueError:
                damaged, last_is_damaged = damaged + 1, True
                continue
            last_is_damaged = False
            if isinstance(value, dict):
                values.append(value)
    if damaged > last_is_damaged:
        problems.append(f"{path}: {damaged - last_is_damaged} damaged lines are left out")
    return values


def _summary(run: RunDirectory, attempts: list[dict[str, Any]], problems: list[str]) -> dict[str, Any] | None:
    """The summary, unless it is of an attempt before the latest."""
    if not run.summary.exists():
        return None
    try:
        summary = run.read_json(run.summary)
    except RunDirectoryError as error:
        problems.append(str(error))
        return None
    began_at = attempts[-1].get("started_at") if attempts else None
    if began_at is not None and run.summary.stat().st_mtime < began_at - _TOLERANCE_S:
        return None
    return summary


def _status(summary: dict[str, Any] | None, attempts: list[dict[str, Any]]) -> str:
    said = None if summary is None else str(summary.get("status", ""))
    if said and said != "running":
        return said
    last = attempts[-1] if attempts else {}
    return "running" if _is_alive(last.get("pid"), last.get("started_at")) else "killed"


def _is_alive(pid: Any, started_at: Any) -> bool:
    """Whether the process that wrote the attempt still runs on this machine (and not another one with its number)."""
    if not isinstance(pid, int) or not isinstance(started_at, int | float):
        return False
    try:
        return psutil.Process(pid).create_time() <= started_at + _TOLERANCE_S
    except psutil.Error:
        return False


def _evaluations(run: RunDirectory, problems: list[str]) -> list[dict[str, Any]]:
    found = []
    for path in sorted(run.evaluations.glob("step-*.json")):
        try:
            result = run.read_json(path)
        except RunDirectoryError as error:
            problems.append(str(error))
            continue
        if isinstance(result.get("step"), int) and isinstance(result.get("success"), int | float):
            found.append(result)
    return sorted(found, key=lambda result: int(result["step"]))


def read_logs(directory: Path, problems: list[str]) -> list[LogNote]:
    """Warnings and errors of all actors, those that differ by numbers only counted together; most severe first."""
    counts: Counter[tuple[str, str, str]] = Counter()
    seen: dict[tuple[str, str, str], tuple[str, str, str]] = {}
    for path in sorted(directory.glob("*.log")):
        try:
            _read_log(path, counts, seen)
        except OSError as error:
            problems.append(f"{path} cannot be read: {error}")
    notes = [LogNote(key[0], key[1], seen[key][0], count, seen[key][1], seen[key][2]) for key, count in counts.items()]
    notes.sort(key=lambda note: (-_LOUD.index(note.level), note.first_at))
    if len(notes) > MAX_LOG_KINDS:
        problems.append(f"{len(notes) - MAX_LOG_KINDS} more kinds of log warnings are in {directory}")
    return notes[:MAX_LOG_KINDS]


def _read_log(
    path: Path, counts: Counter[tuple[str, str, str]], seen: dict[tuple[str, str, str], tuple[str, str, str]]
) -> None:
    actor = path.stem.rsplit("-", 1)[0]
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - MAX_LOG_BYTES))
        for line in file:
            match = _LOG_LINE.match(line.decode("utf-8", "replace").rstrip("\n"))
            if match is None or match["level"] not in _LOUD:
                continue
            key = (actor, match["level"], re.sub(r"\d+", "#", match["text"])[:200])
            counts[key] += 1
            text, first_at, _ = seen.get(key, (match["text"][:400], match["at"], ""))
            seen[key] = (text, first_at, match["at"])
