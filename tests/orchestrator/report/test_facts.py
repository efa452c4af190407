"""State, numbers and logs of a run, and the words made of them."""

from __future__ import annotations

import json
import os
import time

import pytest

from orchestrator.report.facts import gather, read_logs
from orchestrator.report.figures import POINTS, series
from orchestrator.report.journals import survey
from orchestrator.report.page import json_for_html
from orchestrator.report.words import duration, number, percent, verdict
from orchestrator.run_directory import RunDirectory


def test_a_finished_run(run: RunDirectory) -> None:
    facts = gather(run)
    assert (facts.status, facts.steps_done, facts.steps_planned, facts.max_lag) == ("finished", 12, 12, 2)
    assert [result["step"] for result in facts.evaluations] == [0, 12]
    assert facts.problems == []
    tones = {sentence.text.split()[0]: sentence.tone for sentence in verdict(facts, survey(run))}
    assert tones["The"] in ("good", "warn")
    assert tones["Success"] == "good"


def test_the_attempt_that_writes_now_is_running(run: RunDirectory) -> None:
    run.summary.unlink()
    run.start_attempt("resume", time.time())
    facts = gather(run)
    assert facts.status == "running"
    assert "still going" in verdict(facts, survey(run))[0].text
    assert "cpus" in facts.attempts[-1]["machine"]


def test_the_summary_of_an_earlier_attempt_is_not_the_runs(run: RunDirectory) -> None:
    os.utime(run.summary, (1.0, 1.0))
    line = {"attempt": 1, "command": "resume", "pid": 999_999_999, "started_at": time.time()}
    with run.attempts.open("a") as file:
        file.write(json.dumps(line) + "\n")
    facts = gather(run)
    assert facts.summary is None
    assert facts.status == "killed"
    assert "started 2 times" in verdict(facts, survey(run))[-1].text


def test_a_failed_run_says_why(run: RunDirectory) -> None:
    summary = json.loads(run.summary.read_text())
    run.write_summary({**summary, "status": "failed", "error": "the learner died", "steps": 5})
    first = verdict(gather(run), survey(run))[0]
    assert first.tone == "bad"
    assert "ended as failed after 5 of 12 steps" in first.text
    assert "the learner died" in first.text
    assert "millrace resume" in first.text


def test_damaged_files_are_told(run: RunDirectory) -> None:
    run.summary.write_text("{")
    run.evaluation_file(0).write_text("[]")
    run.metrics.write_text('nothing\n{"step": 1, "time/step_s": 1.0, "time": 5.0}\n{"step": 2, "ti')
    facts = gather(run)
    assert len(facts.problems) == 3
    assert "1 damaged lines" in " ".join(facts.problems)
    assert [line["step"] for line in facts.metrics] == [1]


def test_secrets_of_the_config_are_not_in_the_report(run: RunDirectory) -> None:
    run.config.write_text("rewards:\n- {kind: http, api_key: sk-12345, url: a}\n- {api_key: '${oc.env:KEY}'}\n")
    facts = gather(run)
    assert "sk-12345" not in facts.config_text
    assert "${oc.env:KEY}" in facts.config_text
    assert "url: a" in facts.config_text


def test_warnings_that_differ_by_numbers_are_one(run: RunDirectory) -> None:
    notes = read_logs(run.logs, [])
    assert [(note.actor, note.level, note.count) for note in notes] == [("worker-0", "WARNING", 2)]
    assert notes[0].first_at == "2026-01-01 10:00:00"


def test_long_curves_are_thinned_to_means(run: RunDirectory) -> None:
    lines = [{"step": step, "time/step_s": 1.0, "entropy": float(step % 2)} for step in range(1, 3001)]
    run.metrics.write_text("\n".join(map(json.dumps, lines)) + "\n")
    steps, values = series(gather(run), "entropy")
    assert len(steps) == len(values) == POINTS
    assert values == pytest.approx([0.5] * POINTS)


def test_idle_shares_come_from_the_last_step_where_there_is_no_summary(run: RunDirectory) -> None:
    run.summary.unlink()
    with run.metrics.open("a") as file:
        file.write(json.dumps({"step": 13, "time/step_s": 1.0, "idle/reward": 0.3, "idle/pacing": 0.1}) + "\n")
    assert gather(run).idle == {"reward": 0.3, "pacing": 0.1}


def test_modelled_engines_are_named_with_their_scales(run: RunDirectory) -> None:
    run.config.write_text("engines: {kind: synthetic, synthetic: {time_scale: 25, token_scale: 50}}\n")
    told = [sentence.text for sentence in verdict(gather(run), survey(run))]
    assert any("time scale 25 and token scale 50" in text for text in told)
    assert not any("held-out" in text for text in told)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.123, "0.12 s"), (42.0, "42.0 s"), (203.2, "3 min 23 s"), (7300.0, "2 h 1 min"), (None, "unknown")],
)
def test_durations(seconds: float | None, text: str) -> None:
    assert duration(seconds) == text


def test_numbers_and_shares() -> None:
    assert [number(1234567), number(0.12345), number(1234.5), number(None)] == ["1,234,567", "0.123", "1,234.5", "-"]
    assert [percent(0), percent(1), percent(0.125), percent(1, 3000), percent(1, 0)] == [
        "0 %",
        "100 %",
        "12.5 %",
        "< 0.1 %",
        "0 %",
    ]


def test_json_in_a_script_element_cannot_end_it() -> None:
    text = json_for_html({"a": "</script><!-- \u2028 &"})
    assert "<" not in text
    assert "\u2028" not in text
    assert json.loads(text) == {"a": "</script><!-- \u2028 &"}
