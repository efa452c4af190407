"""Millrace's own workload trace: what the episodes of a run did, to be replayed with other settings.

A trace is a JSON-lines file, or a directory of them (one a worker). The first line of each file is a `TraceHeader`, every
other line one `TraceEpisode`. Tokens and seconds are as the run carried them; the header's scales turn them into those of
the system that the run modelled (1 in a run that modelled none). A last line that was cut off is left out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import msgspec

FORMAT = "millrace-workload"
VERSION = 1


class WorkloadTraceError(ValueError):
    """A trace that cannot be read; the message names file and line."""


class TraceHeader(msgspec.Struct, frozen=True, kw_only=True):
    """What the episodes below it come from."""

    format: str = FORMAT
    version: int = VERSION
    run: str = ""
    model: str = ""
    environment: str = ""
    time_scale: float = 1.0
    """Modelled seconds per second written here."""
    token_scale: float = 1.0
    """Modelled tokens per token written here."""


class TraceTurn(msgspec.Struct, frozen=True, array_like=True):
    """One turn: tokens generated, seconds spent in the environment after it, tokens of the observation that followed."""

    output_tokens: int
    tool_s: float
    observation_tokens: int


class TraceEpisode(msgspec.Struct, frozen=True, kw_only=True):
    """One delivered episode. Of an episode with several trajectories these are the turns of the first one."""

    id: str
    index: int
    """Of its task, in dispatch order."""
    member: int
    arrived_at: float
    """When it began (Unix seconds)."""
    prompt_tokens: int
    reset_s: float = 0.0
    turns: list[TraceTurn] = msgspec.field(default_factory=list)
    versions: tuple[int, int] | None = None
    """Oldest and newest policy version among its sampled tokens."""
    status: str = "finished"
    reward: float | None = None
    trajectories: int = 1


class WorkloadTraceWriter:
    """Appends episodes to one file; each is there, also after a kill -9, as soon as `write` returns."""

    def __init__(self, path: Path, header: TraceHeader) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("ab", buffering=0)
        if self._file.tell() == 0:
            self._file.write(msgspec.json.encode(header) + b"\n")
        self._encoder = msgspec.json.Encoder()

    def write(self, episode: TraceEpisode) -> None:
        self._file.write(self._encoder.encode(episode) + b"\n")

    def close(self) -> None:
        self._file.close()


def read_workload(path: Path) -> list[tuple[TraceHeader, TraceEpisode]]:
    """All episodes of a trace with the header of their file, by index and member; of one written twice the later one.

    Raises WorkloadTraceError naming file and line of what is wrong.
    """
    if not path.exists():
        raise WorkloadTraceError(f"{path} does not exist: give a trace file, or the `workload` directory of a run")
    files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    found: dict[str, tuple[TraceHeader, TraceEpisode]] = {}
    for file in files:
        for header, episode in _read_file(file):
            found[episode.id] = (header, episode)
    if not found:
        raise WorkloadTraceError(f"{path} holds no episode: the run that wrote it had finished none")
    return sorted(found.values(), key=lambda pair: (pair[1].index, pair[1].member, pair[1].id))


def _read_file(path: Path) -> Iterator[tuple[TraceHeader, TraceEpisode]]:
    content = path.read_bytes()
    lines = content.split(b"\n")
    lines.pop()  # empty after a whole last line, else the part of one that was being written
    if not lines:
        return
    header = _decode_header(path, lines[0])
    decoder = msgspec.json.Decoder(TraceEpisode)
    for number, line in enumerate(lines[1:], start=2):
        try:
            episode = decoder.decode(line)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise WorkloadTraceError(f"{path}, line {number}: not an episode of a trace: {error}") from error
        yield header, _checked(episode, f"{path}, line {number}")


def _decode_header(path: Path, line: bytes) -> TraceHeader:
    try:
        header = msgspec.json.decode(line, type=TraceHeader)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise WorkloadTraceError(f"{path}, line 1: not the header of a {FORMAT} file: {error}") from error
    if (header.format, header.version) != (FORMAT, VERSION):
        raise WorkloadTraceError(
            f"{path}, line 1: format {header.format!r} version {header.version}, this reads {FORMAT!r} version {VERSION}"
        )
    for name in ("time_scale", "token_scale"):
        value = getattr(header, name)
        if not (math.isfinite(value) and value > 0):
            raise WorkloadTraceError(f"{path}, line 1: {name} must be positive, is {value}")
    return header


def _checked(episode: TraceEpisode, where: str) -> TraceEpisode:
    if not episode.turns:
        raise WorkloadTraceError(f"{where}: episode {episode.id!r} has no turns")
    if episode.prompt_tokens < 1:
        raise WorkloadTraceError(f"{where}: prompt_tokens must be at least 1, is {episode.prompt_tokens}")
    if not (math.isfinite(episode.reset_s) and episode.reset_s >= 0):
        raise WorkloadTraceError(f"{where}: reset_s must be a time, is {episode.reset_s}")
    for position, turn in enumerate(episode.turns):
        sound = turn.output_tokens >= 1 and turn.observation_tokens >= 0 and turn.tool_s >= 0
        if not (sound and math.isfinite(turn.tool_s)):
            raise WorkloadTraceError(
                f"{where}: turn {position} must be [output tokens >= 1, tool seconds >= 0, observation tokens >= 0], is "
                f"[{turn.output_tokens}, {turn.tool_s}, {turn.observation_tokens}]"
            )
    return episode
