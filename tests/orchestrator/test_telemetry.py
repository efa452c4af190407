"""Metrics are readable by a person, by a script and by TensorBoard; logs hold no secrets and stay off the terminal."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.run_directory import RunDirectory, RunDirectoryError
from orchestrator.telemetry import MASK, Metrics, Redaction, cut_metrics, read_metrics, setup_actor_logging


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory.create(tmp_path / "run", "seed: 0\n")


@pytest.fixture
def root_logger() -> Iterator[logging.Logger]:
    root = logging.getLogger()
    handlers, level, hook = list(root.handlers), root.level, sys.excepthook
    yield root
    for handler in root.handlers:
        if handler not in handlers:
            handler.close()
    root.handlers[:] = handlers
    root.setLevel(level)
    sys.excepthook = hook
    logging.captureWarnings(False)


def test_json_lines_hold_step_time_and_values(run: RunDirectory) -> None:
    with Metrics(run, began_at=100.0) as metrics:
        metrics.log(1, {"reward/mean": 0.5, "lag/max": 2}, now=101.5)
        metrics.log(2, {"reward/mean": float("nan"), "loss": None}, now=103.0)
    first, second = (json.loads(line) for line in run.metrics.read_text().splitlines())
    assert first == {"step": 1, "wall_s": 1.5, "time": 101.5, "reward/mean": 0.5, "lag/max": 2}
    assert second["reward/mean"] is None
    assert second["loss"] is None


def test_tensorboard_reads_the_same_numbers(run: RunDirectory) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with Metrics(run, began_at=0.0) as metrics:
        for step in range(3):
            metrics.log(step, {"reward/mean": step / 4, "bad": float("inf")}, now=float(step))
    accumulator = EventAccumulator(str(run.tensorboard))
    accumulator.Reload()
    assert accumulator.Tags()["scalars"] == ["reward/mean"]
    assert [(e.step, e.value) for e in accumulator.Scalars("reward/mean")] == [(0, 0.0), (1, 0.25), (2, 0.5)]


def test_lines_are_on_disk_before_close(run: RunDirectory) -> None:
    metrics = Metrics(run, began_at=0.0)
    metrics.log(7, {"a": 1}, now=1.0)
    assert [line["step"] for line in read_metrics(run)] == [7]
    metrics.close()
    metrics.close()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full exists on Linux only")
def test_full_disk_is_named(run: RunDirectory) -> None:
    run.metrics.symlink_to("/dev/full")
    with (
        Metrics(run, began_at=0.0) as metrics,
        pytest.raises(RunDirectoryError, match="No space left on device; free space"),
    ):
        metrics.log(1, {"a": 1}, now=1.0)


def test_a_line_cut_by_a_crash_is_left_out_and_a_damaged_one_is_named(run: RunDirectory) -> None:
    run.metrics.write_text('{"step": 1}\n{"step": 2')
    assert [line["step"] for line in read_metrics(run)] == [1]
    run.metrics.write_text('{"step": 1\n{"step": 2}\n')
    with pytest.raises(RunDirectoryError, match=r"metrics.jsonl:1 "):
        list(read_metrics(run))


def test_resuming_drops_the_lines_after_the_checkpoint(run: RunDirectory) -> None:
    with Metrics(run, began_at=0.0) as metrics:
        for step in range(6):
            metrics.log(step, {"a": step}, now=float(step))
    assert cut_metrics(run, 3) == 2
    assert [line["step"] for line in read_metrics(run)] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("text", "kept", "gone"),
    [
        ("api_key=abcdef123", "api_key=", "abcdef123"),
        ('{"hf_token": "hf_verysecret"}', "hf_token", "hf_verysecret"),
        ("Authorization: Bearer eyJhbGci", "Authorization", "eyJhbGci"),
        ("password: hunter22", "password", "hunter22"),
    ],
)
def test_text_that_looks_like_a_secret_is_masked(text: str, kept: str, gone: str) -> None:
    redacted = Redaction().redact(text)
    assert kept in redacted
    assert MASK in redacted
    assert gone not in redacted


@pytest.mark.parametrize("text", ["max_tokens=1024", "token_budget: 8192", "tokens/s: 20000", "generated_tokens=12345"])
def test_token_counts_are_not_secrets(text: str) -> None:
    assert Redaction().redact(text) == text


def test_actor_logs_go_to_their_file_only_and_without_secrets(
    run: RunDirectory, root_logger: logging.Logger, capfd: pytest.CaptureFixture[str]
) -> None:
    path = setup_actor_logging(run.path, "engine-0", 2, secrets=["s3cr3t-value"])
    logging.getLogger("rollout_workers").info("calling with %s", "s3cr3t-value")
    logging.getLogger("httpx2").info("one request of thousands")
    try:
        raise RuntimeError("refused s3cr3t-value")
    except RuntimeError:
        logging.getLogger("rollout_workers").exception("failed")
    text = path.read_text()
    assert path.name == "engine-0-2.log"
    assert "calling with" in text
    assert "one request of thousands" not in text
    assert "Traceback" in text
    assert "s3cr3t-value" not in text
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err == ""


def test_log_file_that_cannot_be_written_is_named(run: RunDirectory) -> None:
    run.log_file("learner", 0).mkdir()
    with pytest.raises(RunDirectoryError, match=r"learner-0\.log"):
        setup_actor_logging(run.path, "learner", 0)


def test_telemetry_imports_neither_torch_nor_tensorflow() -> None:
    code = (
        "import sys, tempfile\n"
        "from orchestrator.run_directory import RunDirectory\n"
        "from orchestrator.telemetry import Metrics\n"
        "run = RunDirectory.create(tempfile.mkdtemp(), 'a: 1')\n"
        "with Metrics(run, began_at=0.0) as metrics: metrics.log(0, {'a': 1}, now=0.0)\n"
        "assert not {'torch', 'tensorflow', 'ray', 'transformers'} & set(sys.modules), 'heavy import'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
