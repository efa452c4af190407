"""Recorded workloads: Millrace's own traces and CSV files, whole and damaged."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from env_pool.workloads.replay import COLUMNS, load_recording, read_csv
from env_pool.workloads.scripts import ScriptedTurn
from experience.workload_trace import (
    TraceEpisode,
    TraceHeader,
    TraceTurn,
    WorkloadTraceError,
    WorkloadTraceWriter,
    read_workload,
)

HEADER = ",".join(COLUMNS)
CSV = f"""{HEADER}
a,100,10,0.5,0,1500,0
b,7,3,1.0,0,,
a,150,20,,1,,110
"""


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def episode(index: int, member: int, **changes: object) -> TraceEpisode:
    values = {"id": f"g{index}-{member}", "index": index, "member": member, "arrived_at": 1.0, "prompt_tokens": 5}
    return TraceEpisode(**{**values, "turns": [TraceTurn(3, 0.5, 2), TraceTurn(1, 0.0, 0)], **changes})  # type: ignore[arg-type]


def write_trace(path: Path, *episodes: TraceEpisode, header: TraceHeader | None = None) -> Path:
    writer = WorkloadTraceWriter(path, header or TraceHeader(run="r", model="m"))
    for one in episodes:
        writer.write(one)
    writer.close()
    return path


def test_rounds_of_a_session_in_order(tmp_path: Path) -> None:
    (first, a), (second, b) = read_csv(write(tmp_path / "w.csv", CSV))
    assert (first, second) == ("a", "b")
    assert a.prompt_tokens == 100
    assert a.turns == [ScriptedTurn(10, 1.5, 40), ScriptedTurn(20, 0.0, 0)]
    assert b.turns == [ScriptedTurn(3, 0.0, 0)]
    recording = load_recording(str(tmp_path / "w.csv"))
    assert recording.script(1, 5) == b
    assert recording.script(2, 0) == a


def test_without_prefix_len_the_whole_context_was_known(tmp_path: Path) -> None:
    rows = f"{HEADER}\na,100,10,0,0,0,\na,150,20,0,1,0,\n"
    assert read_csv(write(tmp_path / "w.csv", rows))[0][1].turns[0].observation_tokens == 40


def assert_read_or_refused(path: Path, read: Callable[[Path], list[Any]]) -> None:
    refusal = ""
    try:
        found = read(path)
    except WorkloadTraceError as error:
        found, refusal = [], str(error)
    assert found or str(path) in refusal


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("id,input_len\n", r"w.csv, line 1: column output_len, arrival_time.* is missing"),
        ("", r"line 1: column id, .* is missing"),
        (f"{HEADER}\n", "has a header line and no row"),
        (f"{HEADER}\na,-1,10,0,0,0,0\n", r"line 2, column input_len: must be a number of at least 0, is '-1'"),
        (f"{HEADER}\na,5,nan,0,0,0,0\n", r"line 2, column output_len: must be a number of at least 0, is 'nan'"),
        (f"{HEADER}\na,5,0,0,0,0,0\n", r"line 2, column output_len: must be a whole number >= 1"),
        (f"{HEADER}\na,5,1,0,0,0,0\na,5\n", r"line 3, column round_idx: is empty"),
        (f"{HEADER}\na,5,1,0,0,inf,0\n", r"line 2, column tool_wait_after_ms"),
        (f"{HEADER}\na,5,1,0,0,0,6\n", r"line 2, column prefix_len: 6 exceeds input_len=5"),
        (
            f"{HEADER}\na,5,1,0,1,0,0\n",
            r"line 2, column round_idx: session 'a' goes on with round 1 where 0 comes next",
        ),
        (f"{HEADER}\na,5,1,0,0,0,0\na,5,1,0,0,0,0\n", r"round 0 where 1 comes next"),
        (f"{HEADER}\n,5,1,0,0,0,0\n", r"line 2, column id: is empty"),
    ],
)
def test_bad_csv(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(WorkloadTraceError, match=message):
        read_csv(write(tmp_path / "w.csv", text))


@given(st.binary(max_size=300))
def test_any_csv_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, noise: bytes) -> None:
    path = tmp_path_factory.mktemp("fuzz") / "w.csv"
    path.write_bytes(CSV.encode() + noise)
    assert_read_or_refused(path, read_csv)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    one, two = episode(4, 1, reward=1.0, versions=(2, 3)), episode(0, 0)
    write_trace(tmp_path / "worker-0.jsonl", one)
    write_trace(tmp_path / "worker-1.jsonl", two)
    assert [found for _, found in read_workload(tmp_path)] == [two, one]


def test_an_episode_written_twice_counts_once(tmp_path: Path) -> None:
    path = write_trace(tmp_path / "w.jsonl", episode(0, 0), episode(0, 0, reward=1.0))
    assert [found.reward for _, found in read_workload(path)] == [1.0]


def test_a_trace_is_replayed_in_modelled_units(tmp_path: Path) -> None:
    header = TraceHeader(time_scale=60.0, token_scale=100.0)
    path = write_trace(tmp_path / "w.jsonl", episode(3, 0, reset_s=0.1), episode(9, 1), header=header)
    recording = load_recording(str(path))
    assert len(recording.tasks) == 2
    script = recording.script(0, 0)
    assert (script.prompt_tokens, script.reset_s) == (500, 6.0)
    assert script.turns == [ScriptedTurn(300, 30.0, 200), ScriptedTurn(100, 0.0, 0)]


def test_a_torn_tail_is_left_out(tmp_path: Path) -> None:
    path = write_trace(tmp_path / "w.jsonl", episode(0, 0), episode(1, 0))
    path.write_bytes(path.read_bytes()[:-7])
    assert [found.index for _, found in read_workload(path)] == [0]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("{}\n", r"holds no episode"),
        ('{"format":"other"}\n', r"line 1: format 'other' version 1, this reads 'millrace-workload' version 1"),
        ('{"time_scale":-1}\n', r"line 1: time_scale must be positive"),
        ("[]\n", r"line 1: not the header"),
        ('{}\n{"id":"a"}\n', r"line 2: not an episode of a trace: .*index"),
        (
            '{}\n{"id":"a","index":0,"member":0,"arrived_at":0,"prompt_tokens":1,"turns":[[1,-1,0]]}\n',
            r"line 2: turn 0 must be .*, is \[1, -1.0, 0\]",
        ),
        ('{}\n{"id":"a","index":0,"member":0,"arrived_at":0,"prompt_tokens":1,"turns":[]}\n', r"line 2: .*no turns"),
    ],
)
def test_bad_traces(tmp_path: Path, lines: str, message: str) -> None:
    with pytest.raises(WorkloadTraceError, match=message):
        read_workload(write(tmp_path / "w.jsonl", lines))


def test_a_missing_trace_says_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(WorkloadTraceError, match="give a trace file, or the `workload` directory of a run"):
        read_workload(tmp_path / "nothing")


@given(st.integers(0, 400), st.binary(min_size=1, max_size=20))
def test_any_damage_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, at: int, noise: bytes) -> None:
    path = write_trace(tmp_path_factory.mktemp("fuzz") / "w.jsonl", episode(0, 0), episode(1, 0))
    whole = path.read_bytes()
    path.write_bytes(whole[:at] + noise + whole[at + len(noise) :])
    assert_read_or_refused(path, read_workload)
