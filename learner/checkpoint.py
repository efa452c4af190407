"""Checkpoints: ``step-000050/`` is a Hugging Face directory with an ``optimizer/`` and a ``state.json`` beside its files.

A checkpoint is written to a temporary directory that is renamed when everything is on disk, so a directory of that name
is whole. ``state.json`` holds the SHA-256 of every other file, and loading checks them. `backends.checkpoint_files` writes
the tensors.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from learner.errors import CheckpointError

STATE_FILE = "state.json"
OWN_FILE = "learner.safetensors"
"""What the learner's own process holds beside the ranks: the critic with its optimizer, the entropy coefficient."""
FORMAT = 2
_NAME = re.compile(r"step-(\d{6,})$")
_TEMPORARY = ".writing"
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "chat_template.json", "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "generation_config.json",
)  # fmt: skip
"""Copied from the model directory when they exist."""


@dataclass(frozen=True)
class CheckpointState:
    """What a checkpoint holds besides tensors. ``extra`` is the caller's: cursors, ledger, journal positions."""

    step: int
    version: int
    updates: int
    extra: dict[str, Any] = field(default_factory=dict)


def checkpoint_path(directory: Path, step: int) -> Path:
    return directory / f"step-{step:06d}"


def all_checkpoints(directory: Path) -> list[Path]:
    """The checkpoints in a directory, oldest first."""
    if not directory.is_dir():
        return []
    found = [(int(match[1]), path) for path in directory.iterdir() if (match := _NAME.match(path.name))]
    return [path for _, path in sorted(found)]


def latest(directory: Path) -> Path | None:
    """The newest checkpoint in a directory, None if there is none."""
    found = all_checkpoints(directory)
    return found[-1] if found else None


def begin_checkpoint(directory: Path, step: int) -> Path:
    """An empty temporary directory to write the files of a checkpoint to.

    Raises CheckpointError if the directory cannot be written.
    """
    target = checkpoint_path(directory, step)
    temporary = target.with_name(target.name + _TEMPORARY)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for left_over in directory.glob(f"*{_TEMPORARY}"):
            shutil.rmtree(left_over)
        temporary.mkdir()
    except OSError as error:
        raise CheckpointError(f"cannot write checkpoints to {directory}: {error}") from error
    return temporary


def commit_checkpoint(temporary: Path, state: CheckpointState, keep: int) -> Path:
    """Writes ``state.json``, gives the directory its name, and removes all but the newest ``keep`` checkpoints."""
    target = temporary.with_name(temporary.name.removesuffix(_TEMPORARY))
    content = {
        "format": FORMAT,
        "step": state.step,
        "version": state.version,
        "updates": state.updates,
        "extra": state.extra,
    }
    try:
        files = sorted(path for path in temporary.rglob("*") if path.is_file())
        content["files"] = {str(path.relative_to(temporary)): _sha256(path) for path in files}
        (temporary / STATE_FILE).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
        for path in [*temporary.rglob("*"), temporary]:
            _flush_to_disk(path)
        if target.exists():
            shutil.rmtree(target)
        temporary.rename(target)
        _flush_to_disk(target.parent)
    except (OSError, TypeError) as error:
        raise CheckpointError(
            f"cannot write checkpoint {target}: {error}; free space there, then resume the run"
        ) from error
    for old in all_checkpoints(target.parent)[:-keep]:
        if old != target:
            shutil.rmtree(old, ignore_errors=True)
    return target


def read_checkpoint(path: Path) -> CheckpointState:
    """Checks every file of a checkpoint and returns its state.

    Raises CheckpointError naming the file that is missing or damaged, and the checkpoint to use instead.
    """
    if not path.is_dir():
        raise CheckpointError(f"{path} does not exist{_instead(path)}")
    content = _read_state(path)
    for name, expected in content["files"].items():
        file = path / name
        if not file.is_file():
            raise CheckpointError(f"checkpoint {path} lacks its file {name}{_instead(path)}")
        if _sha256(file) != expected:
            raise CheckpointError(f"{file} is damaged or truncated (its SHA-256 does not match){_instead(path)}")
    return CheckpointState(content["step"], content["version"], content["updates"], content["extra"])


def _read_state(path: Path) -> dict[str, Any]:
    file = path / STATE_FILE
    try:
        content: dict[str, Any] = json.loads(file.read_text())
        fields = [content[name] for name in ("step", "version", "updates", "extra", "files")]
    except FileNotFoundError as error:
        raise CheckpointError(f"checkpoint {path} lacks its file {STATE_FILE}{_instead(path)}") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file} is damaged ({error}){_instead(path)}") from error
    if content.get("format") != FORMAT or not isinstance(fields[-1], dict):
        raise CheckpointError(f"{file} has format {content.get('format')}, this version reads {FORMAT}{_instead(path)}")
    return content


def _instead(path: Path) -> str:
    others = [other for other in all_checkpoints(path.parent) if other.name != path.name]
    before = [other for other in others if other.name < path.name] or others
    return (
        f"; use the checkpoint {before[-1]} instead (millrace resume RUN --from {before[-1].name})"
        if before
        else "; there is no other checkpoint beside it"
    )


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copies the tokenizer's files from a model directory, if there are any. Raises CheckpointError."""
    try:
        for name in TOKENIZER_FILES:
            if (source / name).is_file() and not (target / name).exists():
                shutil.copyfile(source / name, target / name)
    except OSError as error:
        raise CheckpointError(f"cannot copy the tokenizer from {source} to {target}: {error}") from error


def source_after(source: Path | None, written: Path) -> Path | None:
    """Where to copy the tokenizer from next: a checkpoint that a run was resumed from goes when newer ones are there."""
    return written if source is not None and source.parent.resolve() == written.parent.resolve() else source


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
