"""The run directory: everything a run leaves behind, under one path.

::

    config.yaml          resolved, runnable again as it is
    metrics.jsonl        one JSON object a line
    tensorboard/         the same numbers as TensorBoard events
    journal/             the queue's journal: every group and every trajectory
    episodes/            step logs of the rollout workers
    eval/                one JSON file and one journal an evaluation
    checkpoints/         step-000050/, ...
    model/               the model a recipe made (absent when model.path is set)
    logs/                ACTOR-ATTEMPT.log
    workload/            WORKER.jsonl: what each delivered episode did, to be replayed (see env_pool.workloads)
    vitals/              ACTOR.jsonl: how promptly each actor acts (see experience.vitals)
    fleet.jsonl          what happened to the engines (see orchestrator.fleet_log)
    control.json         while the run is under way: where it takes commands (see orchestrator.control)
    timeline/            ACTOR.jsonl: where each actor's seconds went
    summary.json         written at the end, and at every evaluation
    attempts.jsonl       one line for each start: train, resume, ...
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.machine import describe_machine

CONFIG = "config.yaml"
FOLDERS = ("tensorboard", "journal", "episodes", "eval", "checkpoints", "logs")


class RunDirectoryError(RuntimeError):
    """A run directory that cannot be created or read. The message is complete: show it without a traceback."""


@dataclass(frozen=True)
class RunDirectory:
    """The paths of one run. Make one with :meth:`create` or :meth:`open`."""

    path: Path

    @classmethod
    def create(cls, path: str | Path, config_yaml: str, *, overwrite: bool = False) -> RunDirectory:
        """Make the directory of a new run and write its config.

        Raises:
            RunDirectoryError: A run is there already (and not ``overwrite``), something that is not a run is there,
                or the place cannot be written.
        """
        root = Path(path).expanduser().resolve()
        _make_room(root, overwrite)
        run = cls(root)
        try:
            root.mkdir(parents=True, exist_ok=True)
            for folder in FOLDERS:
                (root / folder).mkdir(exist_ok=True)
            _write_atomically(run.config, config_yaml)
        except OSError as error:
            raise _unwritable(root, error) from error
        return run

    @classmethod
    def open(cls, path: str | Path) -> RunDirectory:
        """The directory of an existing run.

        Raises:
            RunDirectoryError: It is missing, or not the directory of a run; the message names what is missing.
        """
        root = Path(path).expanduser().resolve()
        if not root.is_dir():
            raise RunDirectoryError(f"{path} is not a directory; give the directory of a run, such as runs/quickstart")
        missing = [name for name in (CONFIG, "journal") if not (root / name).exists()]
        if missing:
            below = sorted(
                child.parent.name for child in root.glob(f"*/{CONFIG}") if (child.parent / "journal").is_dir()
            )
            hint = f"; runs below it: {', '.join(below[:5])}" if below else ""
            raise RunDirectoryError(f"{path} is not the directory of a run: it has no {' and no '.join(missing)}{hint}")
        return cls(root)

    @property
    def config(self) -> Path:
        return self.path / CONFIG

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @property
    def journal(self) -> Path:
        return self.path / "journal"

    @property
    def episodes(self) -> Path:
        return self.path / "episodes"

    @property
    def evaluations(self) -> Path:
        return self.path / "eval"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def model(self) -> Path:
        """Where a recipe writes the model that it makes."""
        return self.path / "model"

    @property
    def served(self) -> Path:
        """What engines begin with when a run goes on from the checkpoint of an adapter."""
        return self.path / "served"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def summary(self) -> Path:
        return self.path / "summary.json"

    @property
    def attempts(self) -> Path:
        return self.path / "attempts.jsonl"

    @property
    def timeline(self) -> Path:
        """Spans of every actor, see `experience.accounting.read_timeline`."""
        return self.path / "timeline"

    @property
    def vitals(self) -> Path:
        """How late event loops were, how long dispatches took: see `experience.vitals`."""
        return self.path / "vitals"

    @property
    def fleet_events(self) -> Path:
        """What happened to the engines, see `orchestrator.fleet_log`."""
        return self.path / "fleet.jsonl"

    @property
    def control(self) -> Path:
        """Where the run takes commands while it is under way, see `orchestrator.control`."""
        return self.path / "control.json"

    @property
    def workload(self) -> Path:
        """The workload trace, see `experience.workload_trace`."""
        return self.path / "workload"

    def log_file(self, actor: str, attempt: int) -> Path:
        """The log of one life of one actor."""
        return self.logs / f"{actor}-{attempt}.log"

    def evaluation_file(self, step: int) -> Path:
        return self.evaluations / f"step-{step:06d}.json"

    def evaluation_journal(self, step: int) -> Path:
        """The journal directory with the trajectories of the evaluation at ``step``."""
        return self.evaluations / f"step-{step:06d}.journal"

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Replace ``summary.json``; a reader sees the old one or the new one, never a part."""
        self.write_json(self.summary, summary)

    def write_evaluation(self, step: int, evaluation: Mapping[str, Any]) -> None:
        self.write_json(self.evaluation_file(step), evaluation)

    def write_json(self, path: Path, value: Mapping[str, Any]) -> None:
        """Write a JSON file of the run in one piece.

        Raises:
            RunDirectoryError: The disk is full or the place cannot be written.
        """
        try:
            _write_atomically(path, json.dumps(value, indent=2, allow_nan=False) + "\n")
        except OSError as error:
            raise _unwritable(path, error) from error

    def read_json(self, path: Path) -> dict[str, Any]:
        """Read a JSON file of the run.

        Raises:
            RunDirectoryError: It is missing or damaged.
        """
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise RunDirectoryError(f"{path} does not exist: the run has not got that far") from None
        except (OSError, ValueError) as error:
            raise RunDirectoryError(f"{path} cannot be read: {error}") from error
        if not isinstance(value, dict):
            raise RunDirectoryError(f"{path} does not hold a JSON object")
        return value

    def start_attempt(self, command: str, started_at: float) -> int:
        """Record that a process starts on this run; returns its number, from 0. ``started_at``: Unix seconds."""
        try:
            number = len(self.attempts.read_text(encoding="utf-8").splitlines()) if self.attempts.exists() else 0
            with self.attempts.open("a", encoding="utf-8") as file:
                line = {"attempt": number, "command": command, "pid": os.getpid(), "started_at": started_at}
                line["machine"] = describe_machine()
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise _unwritable(self.attempts, error) from error
        return number

    def set_aside(self, step: int) -> list[str]:
        """Rename checkpoints and evaluations of later steps than ``step`` to ``NAME.abandoned``: the run goes on from
        there and will make its own. Returns their names."""
        moved = []
        for path in sorted([*self.checkpoints.glob("step-*"), *self.evaluations.glob("step-*")]):
            match = re.fullmatch(r"step-(\d+)(\.json|\.journal)?", path.name)
            if match is None or int(match[1]) <= step:
                continue
            target = path.with_name(f"{path.name}.abandoned")
            try:
                shutil.rmtree(target, ignore_errors=True)
                path.replace(target)
            except OSError as error:
                raise _unwritable(path, error) from error
            moved.append(path.name)
        return moved


def _make_room(root: Path, overwrite: bool) -> None:
    """Refuse or remove what is at ``root``."""
    if root.exists() and not root.is_dir():
        raise RunDirectoryError(f"run.dir {root} is a file; choose another run.dir")
    try:
        if not root.exists() or not any(root.iterdir()):
            return
        if not (root / CONFIG).exists():
            raise RunDirectoryError(
                f"run.dir {root} holds files that are not of a run; choose another run.dir or empty it"
            )
        if not overwrite:
            raise RunDirectoryError(
                f"run.dir {root} holds a run already; continue it with 'millrace resume {root}', replace it with "
                "run.overwrite=true, or choose another run.dir"
            )
        for child in root.iterdir():
            if child.is_dir() and not child.is_symlink():
                shutil.rmtree(child)
            else:
                child.unlink()
    except OSError as error:
        raise _unwritable(root, error) from error


def _write_atomically(path: Path, text: str) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _unwritable(path: Path, error: OSError) -> RunDirectoryError:
    reason = error.strerror or str(error)
    return RunDirectoryError(
        f"{path} cannot be written: {reason}; free space or permissions, or choose another run.dir"
    )
