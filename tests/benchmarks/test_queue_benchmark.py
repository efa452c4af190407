from __future__ import annotations

import json
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from benchmarks.queue.command import draw, parse_size, queue
from benchmarks.queue.samples import BATCH, BYTES_A_TOKEN, Case, Record, Timing, item_arrays, item_count
from benchmarks.queue.transferqueue import PeerError, TransferQueue

KEYS = {"system", "item_bytes", "case", "items_per_s", "gb_per_s", "p50_ms", "p99_ms"}


def test_every_system_and_case_is_measured_and_drawn(tmp_path: Path) -> None:
    out = tmp_path / "queue.json"
    arguments = ["--items", "4KB", "--peers", "ray-actor", "--repeats", "1", "--ray-calls", "--json", str(out)]
    done = CliRunner().invoke(queue, [*arguments, "--figure", str(tmp_path / "queue.svg")], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    result = json.loads(out.read_text())
    systems = {"millrace", "millrace, no journal", "millrace over Ray calls", "ray-actor"}
    found = {(row["system"], row["item_bytes"], row["case"]) for row in result["results"]}
    assert found == {(system, 4000, case.value) for system in systems for case in Case}
    for row in result["results"]:
        assert row.keys() >= KEYS
        assert row["gb_per_s"] == pytest.approx(row["items_per_s"] * row["item_bytes"] / 1e9, abs=1e-4)
        assert 0 < row["p50_ms"] <= row["p99_ms"]
    assert {change["system"] for change in result["waiting_consumer"]} == systems
    expected = {"millrace": "unix", "millrace, no journal": "unix", "millrace over Ray calls": "fallback"}
    assert result["routes"] == expected
    assert result["machine"]["cpus"]
    assert result["versions"]["ray"]
    assert "put single" in done.output
    assert "items/s" in (tmp_path / "queue.svg").read_text()


def test_a_row_holds_medians_of_rates_and_percentiles_of_calls() -> None:
    timings = [Timing(seconds, [0.001, 0.003], 100) for seconds in (1.0, 2.0, 0.5)]
    row = Record("queue", 10_000_000, Case.PUT_SINGLE, timings).row()
    assert (row["items_per_s"], row["gb_per_s"], row["p50_ms"]) == (100.0, 1.0, 2.0)
    assert row["items_per_s_range"] == [50.0, 200.0]


@pytest.mark.parametrize("size", [3600, 86_000, 664_000])
def test_an_item_has_about_the_bytes_asked_for_and_a_repeat_has_whole_batches(size: int) -> None:
    arrays = item_arrays(size, seed=0)
    assert size - BYTES_A_TOKEN < sum(array.nbytes for array in arrays.values()) <= size
    for put in (Case.PUT_SINGLE, Case.PUT_PIPELINED, Case.PUT_BATCHED):
        assert item_count(put, size, 90.0) % BATCH == 0
        assert 0 < item_count(put, size, 90.0) * size < 100e6


@pytest.mark.parametrize(("text", "size"), [("3.6KB", 3600), ("86kb", 86_000), ("1MB", 1_000_000), ("500B", 500)])
def test_sizes_are_read(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["86", "KB", "3.6KiB", "-1KB", "10B"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(click.BadParameter, match="is no size of an item: write for example"):
        parse_size(text)


def test_an_unknown_peer_is_named() -> None:
    done = CliRunner().invoke(queue, ["--peers", "kafka"])
    assert done.exit_code == 2
    assert "there is no 'kafka'; there are ray-actor, ray-queue, transferqueue" in done.output


async def test_a_runner_that_ends_says_what_it_wrote(tmp_path: Path) -> None:
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho no such module: transfer_queue\nexit 1\n")
    broken.chmod(0o755)
    with pytest.raises(PeerError, match=r"ended at 'start':\nno such module"):
        await TransferQueue(0, broken).start()


def test_a_figure_can_be_a_png(tmp_path: Path) -> None:
    row = Record("queue", 1000, Case.GET_SINGLE, [Timing(1.0, [0.1], 1)]).row()
    draw({"settings": {"item_bytes": [1000]}, "results": [row]}, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
