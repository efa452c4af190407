"""Spans in a grid: seconds are kept, gaps are cut out, many lanes become one row."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from experience.accounting import Cause, Span
from orchestrator.report.timeline import CAUSES, make_timeline, role_of
from orchestrator.report.utilisation import COLOURS, LEVELS, utilisation


def test_every_cause_has_a_colour_of_its_own() -> None:
    assert set(COLOURS) == set(Cause)
    assert len(set(COLOURS.values())) == len(Cause)


def test_a_span_fills_the_bins_it_covers_in_part() -> None:
    spans = [Span("engine-0", Cause.DECODE, 100.0, 101.5), Span("engine-0", Cause.IDLE, 101.5, 104.0)]
    timeline = make_timeline(spans, bins=4)
    assert timeline is not None
    decode = timeline.rows[0].shares[:, CAUSES.index(Cause.DECODE)]
    assert decode == pytest.approx([1.0, 0.5, 0.0, 0.0])
    assert timeline.seconds == {"engine": {Cause.DECODE: 1.5, Cause.IDLE: 2.5}}


@given(st.lists(st.tuples(st.sampled_from(list(Cause)), st.floats(0.001, 3.0)), min_size=1, max_size=30))
def test_seconds_are_neither_lost_nor_made(lengths: list[tuple[Cause, float]]) -> None:
    at, spans = 1e9, []
    for cause, seconds in lengths:
        spans.append(Span("engine-0", cause, at, at + seconds))
        at += seconds
    timeline = make_timeline(spans, bins=7)
    assert timeline is not None
    shown = timeline.rows[0].shares.sum(axis=0) * timeline.edges[-1] / 7
    told = np.array([timeline.seconds["engine"].get(cause, 0.0) for cause in CAUSES])
    assert shown == pytest.approx(told, abs=1e-4)


def test_the_pause_between_a_kill_and_the_next_start_is_cut_out() -> None:
    spans = [Span("engine-0", Cause.DECODE, 0.0, 10.0), Span("engine-0", Cause.DECODE, 4000.0, 4010.0)]
    timeline = make_timeline(spans, bins=2)
    assert timeline is not None
    assert timeline.edges[-1] == pytest.approx(20.0)
    assert timeline.cuts == [(pytest.approx(10.0), pytest.approx(3990.0))]
    assert timeline.rows[0].shares[:, CAUSES.index(Cause.DECODE)] == pytest.approx([1.0, 1.0])
    figure = utilisation(timeline)
    assert len(figure.layout["shapes"]) == 1
    assert "66 min" in figure.note or "1 h 6 min" in figure.note


def test_many_lanes_share_a_row() -> None:
    spans = [Span(f"engine-0.{lane}", Cause.DECODE if lane % 2 else Cause.IDLE, 0.0, 1.0) for lane in range(64)]
    timeline = make_timeline([*spans, Span("learner-0", Cause.TRAIN, 0.0, 1.0)], bins=1)
    assert timeline is not None
    names = [row.name for row in timeline.rows]
    assert names == ["engine (mean of 64)", "engine-0.0", "engine-0.1", "engine-0.2", "engine-0.3", "learner-0"]
    assert timeline.rows[0].shares[0, CAUSES.index(Cause.DECODE)] == pytest.approx(0.5)
    assert role_of("engine-0.12") == "engine"


def test_the_picture_fills_a_row_in_proportion() -> None:
    spans = [Span("engine-0", Cause.DECODE, 0.0, 3.0), Span("engine-0", Cause.IDLE, 3.0, 10.0)]
    timeline = make_timeline(spans, bins=1)
    assert timeline is not None
    figure = utilisation(timeline)
    column = [row[0] for row in figure.data[0]["z"]]
    decode, idle = CAUSES.index(Cause.DECODE), CAUSES.index(Cause.IDLE)
    assert column.count(decode) == round(0.3 * LEVELS)
    assert column.count(idle) == round(0.7 * LEVELS)
    assert "decode 30 %" in figure.alt


def test_no_spans_no_picture() -> None:
    assert make_timeline([]) is None
