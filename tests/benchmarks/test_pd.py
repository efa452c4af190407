"""bench pd: a small run of everything it does, and the words that it makes of figures."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from benchmarks.cli import bench
from benchmarks.pd.cases import (
    CASES,
    LARGEST,
    PREFIX_TURNS,
    Layout,
    config_of,
    default_splits,
    parse_splits,
    settings_of,
    write_prefixes,
)
from benchmarks.pd.measure import PdRow, SplitFigures
from benchmarks.pd.words import best_split, sentences, summary, verdict_of
from env_pool.workloads.replay import load_recording
from orchestrator.composition import ConfigError

SPLIT = SplitFigures(
    prefill_busy=0.3,
    decode_busy=0.9,
    prefill_kv=0.2,
    handed_over=10,
    moved_tokens=1000,
    exposed_ms=1.0,
    redone=0,
    flips=0,
    roles="1:7",
)
MIXED = PdRow(
    case="swe",
    layout="mixed",
    step_s=100.0,
    tokens_per_s=5000.0,
    first_token_p50_s=0.2,
    first_token_p99_s=1.0,
    inter_token_p50_ms=20.0,
    inter_token_p99_ms=40.0,
    decoding=16.0,
    prompt_share=0.3,
    idle=0.1,
    computed_per_sampled=3.0,
    prefix_hit=0.9,
    kv_running=0.3,
    kv_suspended=0.4,
    evicted_per_sampled=0.0,
    steps=4,
    wall_s=1.0,
)


@pytest.mark.slow
def test_a_small_run_prints_tables_words_and_files(tmp_path: Path) -> None:
    json_path, figure_path = tmp_path / "pd.json", tmp_path / "pd.svg"
    arguments = ["pd", "--suite", "reason", "--suite", "prefixes", "--engines", "2", "--split", "1:1", "--steps", "1"]
    arguments += ["--kv", "keep", "--json", str(json_path), "--figure", str(figure_path)]
    result = CliRunner().invoke(bench, arguments, env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    written = json.loads(json_path.read_text())
    assert written["bench"] == "pd"
    rows = written["results"]["rows"]
    assert [(row["case"], row["layout"]) for row in rows] == [
        (case, layout) for case in ("reason", "prefixes") for layout in ("mixed", "1:1", "auto from 1:1")
    ]
    for row in rows:
        assert row["step_s"] > 0
        assert row["inter_token_p99_ms"] >= row["inter_token_p50_ms"] > 0
        assert row["first_token_p99_s"] >= row["first_token_p50_s"] > 0
        assert (row["split"] is None) == (row["layout"] == "mixed")
    assert "the best static split is 1:1" in result.output
    assert written["results"]["summary"][0] in result.output.replace("\n", " ") or written["results"]["summary"]
    assert figure_path.stat().st_size > 1000


def test_a_case_is_measured_in_every_layout(tmp_path: Path) -> None:
    from benchmarks.pd.command import run_cases

    told: list[str] = []
    case = replace(CASES[0], in_flight=128, groups=8)
    layouts = [Layout(), Layout(1, 1)]
    rows = run_cases([case], layouts, 2, 1, 0, (), lambda case, rows: told.append(f"{case.name} {len(rows)}"))
    assert told == ["reason 2"]
    assert [row.layout for row in rows] == ["mixed", "1:1"]
    assert rows[1].split is not None
    assert rows[1].split.handed_over > 0
    assert rows[1].tokens_per_s < rows[0].tokens_per_s, "half of the engines have next to nothing to do"


def test_roles_by_load_settle_near_the_best_split_under_heavy_tails() -> None:
    """Simulated `swe`: from the worst division it gets to the best in some windows, and stays."""
    from benchmarks.pd.command import run_cases

    layouts = [Layout(1, 3), Layout(2, 2), Layout(2, 2, auto=True)]
    first, second, auto = run_cases([CASES[1]], layouts, 4, 4, 0, (), lambda case, rows: None)
    assert auto.split is not None
    # not step times: with tails this heavy, which episodes end in the few steps measured counts for more than how fast they go
    assert auto.tokens_per_s >= max(first.tokens_per_s, second.tokens_per_s) / 1.05
    assert auto.split.flips <= 2, auto.split.reasons
    assert auto.split.roles == "1:3"


def test_layouts_use_equal_resources(tmp_path: Path) -> None:
    recording = tmp_path / "prefixes.jsonl"
    write_prefixes(recording, 0, 2)
    for case in CASES:
        for layout in (Layout(), *default_splits(8), Layout(3, 5, auto=True)):
            config = config_of(settings_of(case, layout, 8, 2, 0, recording))
            assert config.engines.count == 8
            assert config.engines.roles == ("auto" if layout.auto else "fixed")
            assert config.run.steps == case.skip + 2


def test_the_case_of_long_prefixes_has_many_turns_and_one_prompt_a_group(tmp_path: Path) -> None:
    path = tmp_path / "prefixes.jsonl"
    write_prefixes(path, 3, 4)
    recording = load_recording(str(path))
    assert len(recording.tasks) == 4
    for scripts in recording.tasks:
        assert len({script.prompt_tokens for script in scripts}) == 1
        assert all(len(script.turns) == PREFIX_TURNS for script in scripts)
        assert all(10_000 < script.prompt_tokens <= 64_000 for script in scripts)
        assert max(script.context_tokens for script in scripts) < LARGEST
    write_prefixes(path, 3, 4)
    assert load_recording(str(path)).tasks == recording.tasks


def test_words_say_what_got_better_and_what_got_worse_and_why() -> None:
    better = replace(MIXED, layout="1:7", split=SPLIT, step_s=80.0, inter_token_p99_ms=21.0, first_token_p50_s=0.5)
    verdict = verdict_of(MIXED, better)
    assert verdict.step == pytest.approx(-0.2)
    assert [one.split(" ")[0] for one in verdict.helps] == ["step", "between"]
    assert len(verdict.hurts) == 1
    assert "first token p50 +150%" in verdict.hurts[0]
    assert any("30% of their work on prompts" in one for one in verdict.because)
    assert any("prompts queue at 1 prefill engines that are busy 30%" in one for one in verdict.because)


def test_words_name_idle_engines_crowded_ones_and_evicted_kv() -> None:
    worse = replace(
        MIXED,
        layout="4:4",
        split=SPLIT,
        step_s=150.0,
        inter_token_p50_ms=30.0,
        decoding=30.0,
        evicted_per_sampled=2.0,
        computed_per_sampled=9.0,
    )
    because = " ".join(verdict_of(MIXED, worse).because)
    assert "35% of all engine time is idle" in because
    assert "30 sequences each instead of 16" in because
    assert "50% of the KV" in because
    assert "9.0 prompt tokens are computed for each" in because


def test_the_summary_sorts_cases_by_their_step() -> None:
    rows = [MIXED, replace(MIXED, layout="1:7", split=SPLIT, step_s=80.0), replace(MIXED, layout="4:4", split=SPLIT)]
    best = best_split(rows)
    assert best is rows[1]
    lines = sentences([*rows, replace(MIXED, layout="auto from 4:4", split=replace(SPLIT, flips=3), step_s=82.0)])
    assert lines[0] == "swe: the best static split is 1:7, a step 20.0% shorter than mixed"
    assert "3 flips, at the end 1:7, 2.5% longer than the best static split" in lines[-1]
    verdicts = [verdict_of(MIXED, row) for row in rows[1:]]
    assert summary(verdicts) == [
        "Shorter steps with the best split: swe -20% (1:7)",
        "No notable difference in step time: swe +0.0% (4:4)",
    ]
    assert sentences([MIXED]) == []


def test_splits_that_cannot_be_compared_are_refused() -> None:
    assert parse_splits("1:7, 2:6,1:7", 8) == [Layout(1, 7), Layout(2, 6)]
    for text in ("1-7", "0:8", "a:b"):
        with pytest.raises(ConfigError, match="give PREFILL:DECODE"):
            parse_splits(text, 8)
    with pytest.raises(ConfigError, match="it is compared with 8 that do both"):
        parse_splits("1:3", 8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--suite", "sw"], "there is no such suite"), (["--engines", "1"], "a split needs at least 2")],
)
def test_bad_options_are_named(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(bench, ["pd", *arguments])
    assert result.exit_code == 1
    assert message in result.output
