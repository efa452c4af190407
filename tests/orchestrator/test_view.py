"""The terminal view fits 80 columns, shows what matters, and gives way to plain lines where there is no terminal."""

from __future__ import annotations

import io
import json
import math
from typing import Any

import pytest
from rich.console import Console

from orchestrator.snapshot import Snapshot
from orchestrator.view import LiveView, count, duration, new_events, plain_line, render, size, sparkline


def engine(index: int) -> dict[str, Any]:
    return {
        "name": f"engine-{index}",
        "state": "serving",
        "version": 123 - index,
        "running": 96,
        "waiting": 12,
        "kv_used": 0.5,
        "tokens_per_s": 18234.0,
    }


def example(**changes: Any) -> Snapshot:
    values: dict[str, Any] = {
        "run_dir": "runs/quickstart",
        "phase": "training",
        "step": 123,
        "steps": 400,
        "version": 123,
        "wall_s": 75.0,
        "eta_s": 151.0,
        "reward_mean": 0.512,
        "success_rate": 0.61,
        "reward_history": [0.3 + 0.002 * step for step in range(123)],
        "success_history": [0.3 + 0.002 * step for step in range(123)],
        "lag_mean": 1.02,
        "lag_max": 2,
        "max_lag": 4,
        "tokens_per_s": 18234.0,
        "step_s": 0.391,
        "engines": [engine(0)],
        "workers": [{"name": "worker-0", "state": "running", "episodes": 128, "finished": 15744, "failed": 2}],
        "environments": [{"name": "environment-0", "state": "restarting", "leases": 127}],
        "rewards": [{"name": "reward-0", "state": "serving", "pending": 3, "scored": 15744}],
        "queue": {"in_flight": 29, "ready": 3, "leased": 2, "bytes": 12300000, "dropped": 4},
        "learner": {"phase": "training", "groups": 9, "groups_per_update": 16, "masked": 0.003, "busy": 0.71},
        "evals": [{"step": 0, "success": 0.36}, {"step": 100, "success": 0.63}],
        "events": ["environment-0 died (exit by signal 9); replaced"],
    }
    return Snapshot(**{**values, **changes})


def text(snapshot: Snapshot, width: int = 80) -> str:
    console = Console(width=width, file=io.StringIO(), record=True, force_terminal=True)
    console.print(render(snapshot))
    return console.export_text()


def test_everything_that_matters_is_there_in_80_columns() -> None:
    shown = text(example())
    for word in (
        "step 123/400",
        "1:15, 2:31 left",
        "v123",
        "0.512",
        "0.610",
        "1.02  max 2 of 4",
        "18.2k  0.39 s a step",
        "96 running, 12 waiting  KV 50%  18.2k tok/s",
        "128 episodes, 15.7k done, 2 failed",
        "restarting",
        "127 leases",
        "3 pending",
        "11.7 MiB",
        "29 groups in flight, 3 ready, 2 leased  4 dropped",
        "9/16 groups  0.3% masked  71% busy",
        "0:0.36  100:0.63",
        "environment-0 died (exit by signal 9); replaced",
    ):
        assert word in shown


@pytest.mark.parametrize("width", [60, 80, 120, 200])
def test_no_line_is_wider_than_the_terminal(width: int) -> None:
    snapshot = example(events=["a very long event " * 30], error="the first cause " * 30)
    assert max(len(line) for line in text(snapshot, width).splitlines()) <= width


def test_a_run_that_has_only_begun_is_shown() -> None:
    shown = text(Snapshot(steps=400))
    assert "starting" in shown
    assert "step 0/400" in shown


def test_many_replicas_share_a_line_with_their_totals() -> None:
    shown = text(example(engines=[engine(index) for index in range(8)]), 120)
    assert "engine x8" in shown
    assert "768 running, 96 waiting  KV 50%  145.9k tok/s" in shown
    assert "v116" in shown
    assert "engine-3" not in shown


def test_worker_says_where_its_episodes_are() -> None:
    worker = {"name": "worker-0", "state": "serving", "generating": 96, "in_environment": 20, "in_reward": 5}
    assert "96 generating, 20 in tools, 5 judged, 15.7k done" in text(example(workers=[{**worker, "finished": 15744}]))


def test_failure_shows_its_first_cause() -> None:
    assert "all engines died" in text(example(phase="failed", error="all engines died"))


def test_lag_over_the_bound_is_red() -> None:
    console = Console(width=80, file=io.StringIO(), record=True, force_terminal=True, color_system="standard")
    console.print(render(example(lag_max=5)))
    assert "\x1b[1;31m5\x1b[0m" in console.export_text(styles=True)


def test_snapshot_crosses_processes_as_json() -> None:
    snapshot = example()
    values = json.loads(json.dumps(snapshot.to_dict()))
    assert Snapshot.from_dict({**values, "from_the_future": 1}) == snapshot


def test_plain_line_names_step_reward_lag_and_rate() -> None:
    line = plain_line(example())
    for word in (
        "step 123/400",
        "reward 0.512",
        "success 0.610",
        "lag 1.02 (max 2 of 4)",
        "18.2k tokens/s",
        "2:31 left",
    ):
        assert word in line
    assert "None" not in plain_line(Snapshot(evals=[{"step": 0, "success": None}]))


def test_without_a_terminal_lines_come_at_intervals_and_events_once() -> None:
    out = io.StringIO()
    with LiveView(Console(file=out, width=80), plain_every_s=10.0) as view:
        for now in range(25):
            view.update(example(step=now), float(now))
    lines = out.getvalue().splitlines()
    assert [line for line in lines if "died" in line] == ["environment-0 died (exit by signal 9); replaced"]
    assert [line.split("step ")[1].split("/")[0] for line in lines if "reward" in line] == ["0", "10", "20"]
    assert "\x1b" not in out.getvalue()


def test_without_a_terminal_a_new_phase_shows_at_once() -> None:
    out = io.StringIO()
    with LiveView(Console(file=out, width=80)) as view:
        view.update(example(), 0.0)
        view.update(example(phase="finished"), 0.1)
    assert "finished" in out.getvalue()


def test_on_a_terminal_the_view_is_redrawn_and_the_last_one_stays() -> None:
    out = io.StringIO()
    view = LiveView(Console(file=out, width=80, force_terminal=True, _environ={"TERM": "xterm"}))
    view.start()
    view.update(example(step=1), 0.0)
    view.update(example(step=2), 0.1)
    view.stop()
    view.stop()
    assert "step 1/400" in out.getvalue()
    assert "step 2/400" in out.getvalue()


@pytest.mark.parametrize(
    ("before", "after", "new"),
    [
        ([], ["a", "b"], ["a", "b"]),
        (["a", "b"], ["a", "b"], []),
        (["a", "b", "c"], ["b", "c", "d"], ["d"]),
        (["a"], ["x", "y"], ["x", "y"]),
        (["a", "b"], [], []),
    ],
)
def test_new_events_of_a_sliding_window(before: list[str], after: list[str], new: list[str]) -> None:
    assert new_events(before, after) == new


def test_sparkline_scales_and_averages() -> None:
    assert sparkline([], 10) == ""
    assert sparkline([0.0, 1.0], 10) == "▁█"
    assert sparkline([0.5, 0.5], 10) == "▁▁"
    assert sparkline([0.5], 10, low=0.0, high=1.0) == "▅"
    assert sparkline([2.0], 10, low=0.0, high=1.0) == "█"
    line = sparkline([math.floor(index / 10) for index in range(80)], 8)
    assert line == "▁▂▃▄▅▆▇█"


def test_numbers_as_people_read_them() -> None:
    assert [duration(s) for s in (0, 75, 4000)] == ["0:00", "1:15", "1:06:40"]
    assert [count(n) for n in (0, 999, 9999, 18234, 2.5e6)] == ["0", "999", "9999", "18.2k", "2.5M"]
    assert [size(n) for n in (12, 1536, 3 * 2**30)] == ["12 B", "1.5 KiB", "3.0 GiB"]
