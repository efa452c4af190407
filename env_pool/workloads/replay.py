"""Recorded workloads as scripts: Millrace's own traces, and CSV files of requests.

The CSV has a header line with the columns ``id,input_len,output_len,arrival_time,round_idx,tool_wait_after_ms,prefix_len``,
in any order; others are ignored. A row is one round of the session ``id``; the rounds of a session are numbered from 0 without
gaps, wherever they stand. ``input_len`` is the whole prompt of the round in tokens, ``prefix_len`` (may be empty) those of them
that the session had before, ``output_len`` the tokens generated, ``tool_wait_after_ms`` (may be empty) the milliseconds until
the next round, ``arrival_time`` the seconds at which the session began (of its first round; kept, but a run paces itself).
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from env_pool.workloads.scripts import EpisodeScript, ScriptedTurn
from experience.workload_trace import TraceEpisode, TraceHeader, WorkloadTraceError, read_workload

COLUMNS = ("id", "input_len", "output_len", "arrival_time", "round_idx", "tool_wait_after_ms", "prefix_len")
OPTIONAL = frozenset({"arrival_time", "tool_wait_after_ms", "prefix_len"})
"""Columns whose fields may be empty."""


@dataclass(frozen=True)
class Recording:
    """The scripts of a recorded workload: tasks in their order, each with the episodes that were recorded of it."""

    tasks: tuple[tuple[EpisodeScript, ...], ...]

    def script(self, index: int, member: int) -> EpisodeScript:
        """Tasks and members beyond what was recorded begin again with the first."""
        episodes = self.tasks[index % len(self.tasks)]
        return episodes[member % len(episodes)]


def load_recording(file: str) -> Recording:
    """Read a CSV (by its suffix), a trace file or a directory of them. Raises ValueError naming file and line."""
    path = Path(file)
    try:
        changed_ns = path.stat().st_mtime_ns
    except OSError as error:
        raise ValueError(f"tasks.options.file: {file!r} cannot be read: {error.strerror}") from error
    return _load(path, changed_ns)


@lru_cache(maxsize=4)
def _load(path: Path, changed_ns: int) -> Recording:
    del changed_ns  # only there so that a file that changed is read again
    try:
        if path.suffix == ".csv":
            return _recording((key, script) for key, script in read_csv(path))
        return _recording((str(episode.index), _script(header, episode)) for header, episode in read_workload(path))
    except WorkloadTraceError as error:
        raise ValueError(f"tasks.options.file: {error}") from error


def _recording(episodes: Iterable[tuple[str, EpisodeScript]]) -> Recording:
    tasks: dict[str, list[EpisodeScript]] = {}
    for key, script in episodes:
        tasks.setdefault(key, []).append(script)
    return Recording(tuple(tuple(scripts) for scripts in tasks.values()))


def _script(header: TraceHeader, episode: TraceEpisode) -> EpisodeScript:
    turns = [
        ScriptedTurn(
            max(1, round(turn.output_tokens * header.token_scale)),
            turn.tool_s * header.time_scale,
            round(turn.observation_tokens * header.token_scale),
        )
        for turn in episode.turns
    ]
    prompt = max(1, round(episode.prompt_tokens * header.token_scale))
    return EpisodeScript(prompt, episode.reset_s * header.time_scale, turns, "replay")


@dataclass(frozen=True)
class _Round:
    line: int
    position: int
    input_len: int
    output_len: int
    wait_s: float
    prefix_len: int | None


def read_csv(path: Path) -> list[tuple[str, EpisodeScript]]:
    """The sessions of a CSV in the order of their first rows. Raises WorkloadTraceError naming line and column."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            _check_columns(path, reader.fieldnames)
            sessions: dict[str, list[_Round]] = {}
            for row in reader:
                where = f"{path}, line {reader.line_num}"
                sessions.setdefault(_text(row, "id", where), []).append(_round(row, where, reader.line_num))
    except (csv.Error, UnicodeDecodeError) as error:
        raise WorkloadTraceError(f"{path} is not a CSV file: {error}") from error
    if not sessions:
        raise WorkloadTraceError(f"{path} has a header line and no row")
    return [(key, _session(path, key, rounds)) for key, rounds in sessions.items()]


def _check_columns(path: Path, names: Iterable[str] | None) -> None:
    missing = [name for name in COLUMNS if name not in (names or ())]
    if missing:
        raise WorkloadTraceError(
            f"{path}, line 1: column {', '.join(missing)} is missing; a workload has {','.join(COLUMNS)}"
        )


def _text(row: dict[str, str | None], column: str, where: str) -> str:
    value = row.get(column)
    if value is None or not value.strip():
        raise WorkloadTraceError(f"{where}, column {column}: is empty")
    return value.strip()


def _number(row: dict[str, str | None], column: str, where: str) -> float | None:
    if column in OPTIONAL and not (row.get(column) or "").strip():
        return None
    text = _text(row, column, where)
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value >= 0):
        raise WorkloadTraceError(f"{where}, column {column}: must be a number of at least 0, is {text!r}")
    return value


def _whole(row: dict[str, str | None], column: str, where: str, least: int = 0) -> int:
    value = _number(row, column, where)
    if value is None or value != int(value) or value < least:
        raise WorkloadTraceError(f"{where}, column {column}: must be a whole number >= {least}, is {row[column]!r}")
    return int(value)


def _round(row: dict[str, str | None], where: str, line: int) -> _Round:
    input_len = _whole(row, "input_len", where, least=1)
    has_prefix = bool((row.get("prefix_len") or "").strip())
    prefix_len = _whole(row, "prefix_len", where) if has_prefix else None
    if prefix_len is not None and prefix_len > input_len:
        raise WorkloadTraceError(f"{where}, column prefix_len: {prefix_len} exceeds input_len={input_len}")
    _number(row, "arrival_time", where)
    return _Round(
        line=line,
        position=_whole(row, "round_idx", where),
        input_len=input_len,
        output_len=_whole(row, "output_len", where, least=1),
        wait_s=(_number(row, "tool_wait_after_ms", where) or 0.0) / 1000,
        prefix_len=prefix_len,
    )


def _session(path: Path, key: str, rounds: list[_Round]) -> EpisodeScript:
    rounds = sorted(rounds, key=lambda one: one.position)
    for expected, one in enumerate(rounds):
        if one.position != expected:
            raise WorkloadTraceError(
                f"{path}, line {one.line}, column round_idx: session {key!r} goes on with round {one.position} where "
                f"{expected} comes next"
            )
    turns = []
    for number, one in enumerate(rounds):
        following = rounds[number + 1] if number + 1 < len(rounds) else None
        turns.append(ScriptedTurn(one.output_len, one.wait_s, _new_tokens(one, following)))
    return EpisodeScript(rounds[0].input_len, 0.0, turns, "replay")


def _new_tokens(one: _Round, following: _Round | None) -> int:
    """What the next round's prompt has beyond the context that the session had before (at least 1 token)."""
    if following is None:
        return 0
    known = one.input_len + one.output_len if following.prefix_len is None else following.prefix_len
    return max(1, following.input_len - known)
