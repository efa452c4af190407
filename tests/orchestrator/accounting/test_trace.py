"""The trace file: sound by its format, whatever goes in."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from trace_checks import check_trace

from experience.accounting import Cause, Span, TimelineWriter
from orchestrator.accounting import trace as trace_module
from orchestrator.accounting.command import trace_command
from orchestrator.accounting.trace import Counter, GroupPath, Member, Step, TraceSources, build_trace
from orchestrator.run_directory import RunDirectory

ZERO = 1_000_000.0


def path_of(index: int, began_s: float, lasted_s: float, step: int | None) -> GroupPath:
    members = tuple(
        Member(f"g{index}-{k}", ZERO + began_s + 0.1 * k, ZERO + began_s + 0.1 * k + lasted_s) for k in range(2)
    )
    return GroupPath(f"g{index}", members, step)


STEPS = [Step(number, ZERO + 10.0 * number, ZERO + 10.0 * number + 9.0) for number in range(1, 5)]
GROUPS = st.lists(
    st.tuples(st.floats(0.0, 40.0), st.floats(0.001, 20.0), st.sampled_from([None, 1, 2, 3, 4, 99])), max_size=40
)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)
@given(GROUPS, st.booleans())
def test_every_arrow_holds_on_to_slices(
    tmp_path: Path, drawn: list[tuple[float, float, int | None]], episodes: bool
) -> None:
    groups = [path_of(index, *values) for index, values in enumerate(drawn)]
    spans = [Span("engine-0", Cause.DECODE, ZERO, ZERO + 3.0), Span("engine-0", Cause.IDLE, ZERO + 3.0, ZERO + 50.0)]
    sources = TraceSources(spans, groups, STEPS, [Counter("lag mean", ZERO + 5.0, 1.5)])
    target = tmp_path / "trace.json"
    target.write_text(json.dumps(build_trace(sources, ZERO, episodes)))
    events = check_trace(target)["traceEvents"]
    ends = {step.number: step.ended_at for step in STEPS}
    trained = sum((group.began_at + group.ended_at) / 2 <= ends.get(group.step or 0, 0.0) for group in groups)
    assert sum(event["ph"] == "s" for event in events) == trained
    names = {event["args"]["name"] for event in events if event["name"] == "process_name"}
    assert {"engine", "learner"} <= names
    assert ("episodes" in names) == (episodes and bool(groups))


def test_too_many_slices_are_merged_and_a_note_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace_module, "MOST_SLICES", 100)
    causes = (Cause.DECODE, Cause.PREFILL)
    spans = [Span("engine-0", causes[i % 2], ZERO + i / 100, ZERO + (i + 1) / 100) for i in range(5_000)]
    trace = build_trace(TraceSources(spans), ZERO)
    slices = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    assert len(slices) <= 100
    assert sum(event["dur"] for event in slices) == pytest.approx(50e6, rel=1e-6)
    assert "thinned" in trace["otherData"]["notes"][0]


def make_run(directory: Path) -> RunDirectory:
    run = RunDirectory.create(directory, "mode: async\n")
    TimelineWriter(run.timeline, "engine-0").write(
        [Span("engine-0", Cause.DECODE, ZERO, ZERO + 4.0), Span("engine-0", Cause.IDLE, ZERO + 4.0, ZERO + 9.0)]
    )
    lines = [
        {"step": 1, "wall_s": 6.0, "time": ZERO + 6.0, "time/step_s": 5.0, "lag/mean": 1.0},
        {"step": 2, "wall_s": 8.0, "time": ZERO + 8.0, "time/step_s": 2.5, "lag/mean": 2.0},
    ]
    run.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run


def test_the_command_writes_the_part_of_the_run_that_was_asked_for(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    whole = CliRunner().invoke(trace_command, [str(run.path)])
    assert whole.exit_code == 0, whole.output
    assert "no groups and no arrows" in whole.output
    events = check_trace(run.path / "trace.json")["traceEvents"]
    assert [event["name"] for event in events if event["ph"] == "X"] == ["decode", "step 1", "idle", "step 2"]
    part = CliRunner().invoke(trace_command, [str(run.path), "--from", "5", "--out", str(tmp_path / "part.json")])
    assert part.exit_code == 0, part.output
    slices = [event for event in check_trace(tmp_path / "part.json")["traceEvents"] if event["ph"] == "X"]
    assert ("idle", 5e6, 4e6) in [(event["name"], event["ts"], event["dur"]) for event in slices]
    assert "decode" not in [event["name"] for event in slices]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--from", "9", "--to", "3"], "give 0 <= from < to"),
        (["--from", "1000"], "nothing to trace"),
        (["--out", "/nowhere/at/all.json"], "cannot be written"),
    ],
)
def test_bad_requests_say_what_is_wrong(arguments: list[str], said: str, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    result = CliRunner().invoke(trace_command, [str(run.path), *arguments])
    assert result.exit_code == 1
    assert said in result.output


def test_a_directory_that_is_no_run_is_refused(tmp_path: Path) -> None:
    result = CliRunner().invoke(trace_command, [str(tmp_path)])
    assert result.exit_code == 1
    assert "not the directory of a run" in result.output
