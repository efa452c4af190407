from __future__ import annotations

import subprocess
import sys

import pytest

from benchmarks.process_cpu import OTHER, CpuWatch


def test_seconds_are_those_of_the_time_asked_for() -> None:
    watch = CpuWatch()
    watch._samples = [
        (10.0, {"LearnerActor": 1.0}),
        (12.0, {"LearnerActor": 2.0, "EngineActor": 0.5}),
        (14.0, {"LearnerActor": 4.0, "EngineActor": 1.5}),
        (16.0, {"EngineActor": 0.0}),
    ]
    assert watch.between(11.0, 15.0) == {"LearnerActor": pytest.approx(4.0), "EngineActor": pytest.approx(2.0)}
    assert watch.between(12.5, 13.0) == {}


def test_a_child_that_computes_is_seen() -> None:
    busy = "import time; end = time.process_time() + 1.0\nwhile time.process_time() < end: pass"
    with CpuWatch() as watch:
        subprocess.run([sys.executable, "-c", busy], check=True, timeout=60)
    assert max(seconds.get(OTHER, 0.0) for _, seconds in watch._samples) > 0
