from __future__ import annotations

import math
from pathlib import Path

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from experience.vitals import RATIO, Histogram, Vitals, read_vitals


@given(st.lists(st.floats(1e-4, 1e4), min_size=1), st.floats(0.01, 1.0))
def test_quantiles_are_right_within_a_bucket(delays: list[float], share: float) -> None:
    histogram = Histogram()
    for delay in delays:
        histogram.add(delay)
    exact = sorted(delays)[max(0, math.ceil(share * len(delays) - 1e-9) - 1)]
    assert exact / (1 + 1e-9) <= histogram.quantile(share) <= exact * RATIO * (1 + 1e-9)
    assert histogram.count == len(delays)


def test_delays_below_the_least_count_as_it() -> None:
    histogram = Histogram()
    histogram.add(-1.0)
    histogram.add(0.0)
    assert histogram.counts == {0: 2}
    assert math.isnan(Histogram().quantile(0.5))


def test_a_window_of_the_file_is_added_up(tmp_path: Path) -> None:
    vitals, lines = Vitals(0.0), []
    for second in range(4):
        vitals.observe("submit", 0.001)
        vitals.count("turns", second)
        lines.append(msgspec.json.encode(vitals.take(second + 1.0)))
    (tmp_path / "worker-0.jsonl").write_bytes(b"\n".join(lines) + b'\n{"torn')
    whole, part = read_vitals(tmp_path)["worker-0"], read_vitals(tmp_path, 1.0, 3.0)["worker-0"]
    assert (whole.seconds, whole.counters["turns"], whole.delays["submit"].count) == (4.0, 6, 4)
    assert (part.seconds, part.counters["turns"], part.delays["submit"].count) == (2.0, 3, 2)
