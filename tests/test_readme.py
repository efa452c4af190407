"""Every `millrace` command that the README shows is one that the command line takes."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from orchestrator.cli import main

REPOSITORY = Path(__file__).resolve().parents[1]
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")


def documented_commands() -> list[list[str]]:
    """The arguments of each shown command, comments taken off."""
    shown = re.findall(r"^\$ (?:\.venv/bin/)?millrace (.*)$", README, re.MULTILINE)
    quoted = re.findall(r"`(?:\.venv/bin/)?millrace ([a-z][^`]*)`", README)
    return [shlex.split(line, comments=True) for line in (*shown, *quoted)]


def test_the_readme_shows_commands() -> None:
    names = {arguments[0] for arguments in documented_commands()}
    assert names >= {"train", "plan", "resume", "eval", "show", "bench"}


@pytest.mark.parametrize("arguments", documented_commands(), ids=" ".join)
def test_a_documented_command_is_accepted(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("configs", "examples"):
        (tmp_path / folder).symlink_to(REPOSITORY / folder)
    (tmp_path / "base.yaml").write_text("defaults: [configs/quickstart.yaml]\n")
    (tmp_path / "mine.yaml").write_text("rollout: {group_size: 4}\n")
    if arguments[0] in ("train", "plan"):
        extra = ["--print-config"] if arguments[0] == "train" else []
        result = CliRunner().invoke(main, [*arguments, *extra])
        assert result.exit_code == 0, result.output
        return
    command: click.Command | None = main
    rest = arguments
    while isinstance(command, click.Group):
        command, rest = command.get_command(click.Context(command), rest[0]), rest[1:]
    assert command is not None, f"there is no command {' '.join(arguments)}"
    command.make_context(" ".join(arguments), list(rest))
