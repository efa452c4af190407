"""A run directory is made whole or refused with the reason and the remedy."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from orchestrator.run_directory import FOLDERS, RunDirectory, RunDirectoryError


def test_create_then_open(tmp_path: Path) -> None:
    made = RunDirectory.create(tmp_path / "deep" / "run", "seed: 3\n")
    assert made.config.read_text() == "seed: 3\n"
    assert all((made.path / folder).is_dir() for folder in FOLDERS)
    assert RunDirectory.open(made.path) == made


def test_existing_run_is_kept_unless_overwritten(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "run", "seed: 0\n")
    (run.checkpoints / "step-000001").mkdir()
    with pytest.raises(RunDirectoryError, match=r"resume .*overwrite=true"):
        RunDirectory.create(run.path, "seed: 1\n")
    assert run.config.read_text() == "seed: 0\n"
    RunDirectory.create(run.path, "seed: 1\n", overwrite=True)
    assert run.config.read_text() == "seed: 1\n"
    assert not any(run.checkpoints.iterdir())


def test_overwrite_never_deletes_what_is_not_a_run(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(RunDirectoryError, match="not of a run"):
        RunDirectory.create(tmp_path, "seed: 0\n", overwrite=True)
    assert (tmp_path / "thesis.tex").read_text() == "precious"


def test_path_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunDirectoryError, match="is a file"):
        RunDirectory.create(tmp_path / "file", "seed: 0\n")


def test_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunDirectoryError, match=r"file/run cannot be written: .*choose another run.dir"):
        RunDirectory.create(tmp_path / "file" / "run", "seed: 0\n")


def test_permission_denied_is_named() -> None:
    # Even root cannot make directories in /proc, so this holds for every user.
    with pytest.raises(RunDirectoryError, match=r"/proc/millrace-run cannot be written"):
        RunDirectory.create("/proc/millrace-run", "seed: 0\n")


def test_open_names_what_is_missing_and_runs_nearby(tmp_path: Path) -> None:
    RunDirectory.create(tmp_path / "runs" / "quickstart", "seed: 0\n")
    with pytest.raises(RunDirectoryError, match=r"has no config.yaml and no journal; runs below it: quickstart"):
        RunDirectory.open(tmp_path / "runs")
    with pytest.raises(RunDirectoryError, match="is not a directory"):
        RunDirectory.open(tmp_path / "absent")


def test_summary_is_replaced_in_one_piece(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "run", "seed: 0\n")
    run.write_summary({"status": "running"})
    with pytest.raises(ValueError, match="not JSON compliant"):
        run.write_summary({"bad": float("nan")})
    assert run.read_json(run.summary) == {"status": "running"}
    run.write_summary({"status": "finished"})
    assert json.loads(run.summary.read_text()) == {"status": "finished"}
    assert not [name for name in os.listdir(run.path) if name.startswith(".")]


def test_missing_and_damaged_json_are_named(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "run", "seed: 0\n")
    with pytest.raises(RunDirectoryError, match="has not got that far"):
        run.read_json(run.summary)
    run.summary.write_text('{"a": ')
    with pytest.raises(RunDirectoryError, match=r"summary.json cannot be read"):
        run.read_json(run.summary)


def test_attempts_are_numbered(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "run", "seed: 0\n")
    assert [run.start_attempt("train", 1.0), run.start_attempt("resume", 2.0)] == [0, 1]
    assert [json.loads(line)["command"] for line in run.attempts.read_text().splitlines()] == ["train", "resume"]
