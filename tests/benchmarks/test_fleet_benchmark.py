from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from benchmarks.cli import bench
from benchmarks.fleet.command import draw, show
from benchmarks.fleet.kills import KillPlan, report
from benchmarks.fleet.updates import Received, UpdateLoad, row, stalls_in_steps, usual_period_s
from rollout_workers.engines.protocol import FinishReason, TokenChunk


def result(versions: list[int], reason: FinishReason = FinishReason.LENGTH) -> TokenChunk:
    count = len(versions)
    return TokenChunk(
        request_id="r",
        tokens=np.zeros(count, np.int32),
        logprobs=np.zeros(count, np.float32),
        versions=np.asarray(versions, np.int32),
        finish_reason=reason,
    )


def test_a_stall_is_what_a_token_came_late_by_in_usual_steps() -> None:
    ends = [0.0, 1.0, 2.0, 3.0, 6.0, 7.0, 8.25, 9.25]
    steps = [(at, 4) for at in ends] + [(100.0, 0)]
    commits = [(3.5, 3.6), (7.1, 7.2), (50.0, 50.1)]  # the last one while nobody waits for a token
    assert usual_period_s(steps, commits) == 1.0
    assert stalls_in_steps(steps, commits, 1.0).tolist() == [2.0, 0.25]
    assert stalls_in_steps(steps, commits, 1.0, at_updates=False).tolist() == [0.0] * 5


def test_what_came_back_is_held_against_what_was_sampled() -> None:
    received = Received()
    for versions, reason in (([0, 1], FinishReason.LENGTH), ([1, 0], FinishReason.LENGTH), ([3], FinishReason.ABORT)):
        received.take(result(versions, reason), newest=2)
    assert (received.requests, received.tokens, received.aborted, received.wrong_stamps) == (3, 5, 1, 2)
    steps = [(float(at), 2) for at in range(10)]
    figures = row(UpdateLoad(engines=1, updates=1), [(steps, [(4.5, 4.6)], 7)], received, [1], [0.02])
    assert figures["lost_tokens"] == 2
    assert figures["all_at_the_last_version"]
    assert figures["stall_steps"] == {"p50": 0.0, "p99": 0.0, "max": 0.0}


def kill(**figures: Any) -> dict[str, Any]:
    return {
        "noticed_s": 0.1,
        "rerouted_s": 0.2,
        "requests_moved": 3,
        "replaced_s": 4.0,
        "joined_version": 5,
        "newest_version": 5,
        "joined_current": True,
    } | figures


def test_lost_episodes_and_turns_generated_again_are_counted() -> None:
    summary = {
        "steps": 9,
        "episodes": {"ended": 40, "failed": 2},
        "ledger": {"dispatched": 12, "trained": 8, "dropped": {"stale": 1}, "live": 3},
    }
    turn = {"task": "train/0", "member": 0, "turn": 0}
    rows = [kill(), kill(rerouted_s=0.7, joined_current=False)]
    figures = report(KillPlan(), rows, summary, [turn, turn, turn | {"turn": 1}])
    assert figures["rerouted_s_max"] == 0.7
    assert figures["requests_moved"] == 6
    assert (figures["episodes_lost"], figures["groups_unaccounted"]) == (2, 0)
    assert (figures["turns"], figures["turns_generated_again"]) == (3, 1)
    assert figures["served_old_weights"] == 1


def test_the_runs_of_each_kind_are_configurations_that_are_sound(tmp_path: Path) -> None:
    from orchestrator.config import load, validate

    for kind in ("torch", "synthetic"):
        config, overrides = KillPlan(kind=kind).settings(tmp_path / "turns")
        validate(load([config], overrides))


def test_a_kind_that_does_not_exist_is_refused() -> None:
    done = CliRunner().invoke(bench, ["fleet", "--updates", "0", "--kinds", "tensor"])
    assert done.exit_code == 2
    assert "choose from torch, synthetic, vllm, sglang" in " ".join(done.output.split())


def test_updates_under_load_lose_nothing(tmp_path: Path) -> None:
    written = tmp_path / "fleet.json"
    arguments = ["--updates", "5", "--requests", "4", "--kv", "keep", "--kinds", ""]
    done = CliRunner().invoke(bench, ["fleet", *arguments, "--json", str(written)])
    assert done.exit_code == 0, done.output
    content = json.loads(written.read_text())
    rows = content["results"]["updates"]
    assert [(entry["engines"], entry["rolling"]) for entry in rows] == [(1, True), (2, True), (2, False)]
    for entry in rows:
        assert entry["requests"] > 4
        assert (entry["aborted"], entry["lost_tokens"], entry["wrong_stamps"]) == (0, 0, 0)
        assert entry["versions_seen"] == 6
        assert entry["all_at_the_last_version"]
        assert entry["stall_steps"]["p50"] < 50
    assert draw(content["results"] | {"kills": [{"kind": "torch", "kills": [kill()]}]}) is not None


@pytest.mark.parametrize("part", ["updates", "kills"])
def test_each_part_can_be_shown_alone(part: str) -> None:
    from rich.console import Console

    from benchmarks.output import document

    load = UpdateLoad(engines=1, updates=1)
    steps = [(float(at), 2) for at in range(10)]
    rows = {
        "updates": [row(load, [(steps, [(4.5, 4.6)], 18)], Received(), [1], [0.02])],
        "kills": [report(KillPlan(), [kill()], {"episodes": {}, "ledger": {}}, [])],
    }
    results = {"updates": [], "kills": []} | {part: rows[part]}
    console = Console(record=True, width=200)
    show(console, document("fleet", seeds=[0], settings={}, results=results))
    text = console.export_text()
    assert ("Updates under load" in text) == (part == "updates")
    assert ("killed with SIGKILL" in text) == (part == "kills")
