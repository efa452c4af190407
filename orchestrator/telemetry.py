"""Metrics (JSON lines and TensorBoard) and the log files of actors. No torch and no TensorFlow."""

from __future__ import annotations

import json
import logging
import math
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from orchestrator.run_directory import RunDirectory, RunDirectoryError

MASK = "********"
LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
_SECRET_TEXT = re.compile(
    r"(?P<key>[\w-]*(?:(?:secret|passw(?:or)?d|credential)[\w-]*|(?:api[_-]?key|access[_-]?key|private[_-]?key|token|authorization))"
    r"[\"']?\s*[=:]\s*[\"']?(?:bearer\s+)?)(?P<value>[^\s\"',;}]{4,})",
    re.IGNORECASE,
)


class Metrics:
    """Writes the numbers of a run to ``metrics.jsonl`` and to TensorBoard, in step order of the caller.

    A value that is not finite is written as null in the JSON line and left out of TensorBoard: both stay readable.
    """

    def __init__(self, run: RunDirectory, *, began_at: float) -> None:
        """Open both files for appending. ``began_at``: Unix time in seconds that ``wall_s`` counts from.

        Raises:
            RunDirectoryError: They cannot be written.
        """
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._run = run
        self._began_at = began_at
        try:
            self._file = run.metrics.open("ab", buffering=0)
            self._events = EventFileWriter(str(run.tensorboard))
        except OSError as error:
            raise RunDirectoryError(f"{run.metrics} cannot be written: {error.strerror or error}") from error

    def log(self, step: int, values: Mapping[str, float | int | None], *, now: float) -> None:
        """Write one line for learner step ``step``. ``now``: Unix time in seconds.

        Raises:
            RunDirectoryError: The disk is full or gone.
        """
        cleaned = {name: _finite(value) for name, value in values.items()}
        line = {"step": step, "wall_s": round(now - self._began_at, 3), "time": round(now, 3), **cleaned}
        try:
            self._file.write((json.dumps(line, allow_nan=False) + "\n").encode())
        except OSError as error:
            raise RunDirectoryError(
                f"{self._run.metrics} cannot be written: {error.strerror or error}; free space, then 'millrace resume'"
            ) from error
        self._events.add_event(_event(step, now, {k: float(v) for k, v in cleaned.items() if v is not None}))

    def flush(self) -> None:
        """Hand the TensorBoard events to the file system; the JSON lines are there already."""
        self._events.flush()

    def close(self) -> None:
        """Write everything out. Safe to call twice."""
        if not self._file.closed:
            self._file.close()
            self._events.close()

    def __enter__(self) -> Metrics:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def read_metrics(run: RunDirectory) -> Iterator[dict[str, Any]]:
    """The lines of ``metrics.jsonl``; a last line that was cut off by a crash is left out.

    Raises:
        RunDirectoryError: A line that is not the last one is damaged.
    """
    if not run.metrics.exists():
        return
    lines = run.metrics.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            value = json.loads(line)
        except ValueError:
            if number == len(lines):
                return
            raise RunDirectoryError(f"{run.metrics}:{number} is not JSON: {line[:60]!r}") from None
        if isinstance(value, dict):
            yield value


def cut_metrics(run: RunDirectory, step: int) -> int:
    """Remove the lines after ``step`` before a resumed run writes them again; returns how many were removed.

    TensorBoard handles a repeated step itself: it shows the newest events.
    """
    if not run.metrics.exists():
        return 0
    lines = list(read_metrics(run))
    kept = [line for line in lines if line.get("step", 0) <= step]
    temporary = run.metrics.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
    temporary.replace(run.metrics)
    return len(lines) - len(kept)


def _finite(value: float | int | None) -> float | int | None:
    if value is None or not math.isfinite(value):
        return None
    return int(value) if isinstance(value, (bool, int)) else float(value)


def _event(step: int, now: float, values: Mapping[str, float]) -> Any:
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary

    summary = Summary(value=[Summary.Value(tag=name, simple_value=value) for name, value in values.items()])
    return Event(step=step, wall_time=now, summary=summary)


# --- logs -----------------------------------------------------------------------------------------------------------


class Redaction(logging.Filter):
    """Masks known secrets, and text that looks like ``api_key=...``, in every record that passes."""

    def __init__(self, secrets: Iterable[str] = ()) -> None:
        super().__init__()
        self._secrets = sorted({secret for secret in secrets if len(secret) >= 4}, key=len, reverse=True)

    def redact(self, text: str) -> str:
        for secret in self._secrets:
            text = text.replace(secret, MASK)
        return _SECRET_TEXT.sub(lambda match: match["key"] + MASK, text)

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg = self.redact(record.getMessage())
        record.args = None
        if record.exc_info and not record.exc_text:
            record.exc_text = logging.Formatter().formatException(record.exc_info)
        if record.exc_text:
            record.exc_text = self.redact(record.exc_text)
        return True


def setup_actor_logging(
    run_dir: str | Path, name: str, attempt: int, *, secrets: Iterable[str] = (), level: int = logging.INFO
) -> Path:
    """Send this process's log records to ``logs/NAME-ATTEMPT.log`` of the run and nowhere else; returns the file.

    Call it first thing in an actor. Uncaught exceptions of the main thread are logged too.

    Raises:
        RunDirectoryError: The file cannot be written.
    """
    path = RunDirectory(Path(run_dir)).log_file(name, attempt)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handler = logging.FileHandler(path, encoding="utf-8")
    except OSError as error:
        raise RunDirectoryError(f"log file {path} cannot be written: {error.strerror or error}") from error
    handler.setFormatter(logging.Formatter(LOG_FORMAT))
    handler.addFilter(Redaction(secrets))
    root = logging.getLogger()
    for old in list(root.handlers):
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(level)
    logging.getLogger("httpx2").setLevel(logging.WARNING)  # at INFO it has a line for every request of every turn
    logging.captureWarnings(True)
    sys.excepthook = _log_uncaught
    return path


def _log_uncaught(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    logging.getLogger("uncaught").critical("the process ends", exc_info=(kind, error, traceback))
