"""Every `millrace` command that the README shows is one that the command line takes; every documented choice of tests chooses some."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
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


def documented_tests() -> set[tuple[str, str]]:
    """Path and ``-k`` expression of each `pytest` command in the README and the documentation."""
    found = set()
    for path in (REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))):
        for command in re.findall(r"`pytest (tests/[^`]*)`", path.read_text(encoding="utf-8")):
            words = shlex.split(command)
            chosen = words[words.index("-k") + 1] if "-k" in words else ""
            found |= {(word, chosen) for word in words if word.startswith("tests/")}
    return found


def test_every_documented_choice_of_tests_chooses_some() -> None:
    documented = documented_tests()
    files = sorted({path for path, chosen in documented if chosen})
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "--no-header", "-p", "no:cacheprovider", *files]
    made = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    names = [line for line in made.stdout.splitlines() if "::" in line]
    for path, chosen in documented:
        assert (REPOSITORY / path).exists(), path
        mine = [name.lower() for name in names if name.startswith(path)]
        words = re.split(r"\s+(?:or|and)\s+", chosen.lower())
        assert not chosen or any(word in name for word in words for name in mine), f"pytest {path} -k '{chosen}'"
