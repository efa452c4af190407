"""A whole run whose engines prefill or decode."""

from __future__ import annotations

import time
from collections import defaultdict
from pathlib import Path

from run_processes import MillraceProcess, assert_accounted, assert_balanced, closed, summary_of, training_lines

from experience.accounting import Cause, read_timeline
from orchestrator.fleet_log import read_fleet_events

SPLIT = [
    "rollout.groups_per_update=4",
    "rollout.group_size=4",
    "rollout.concurrency=24",
    "tasks.held_out=16",
    "tasks.environment=coin_environment:CoinEnvironment",
    "engines.prefill=1",
    "engines.decode=1",
    "engines.handoff.min_tokens=0",
    "engines.park_mb=8",
]

STEPS = 30


def test_a_run_with_prefill_and_decode_apart_trains_and_survives_the_loss_of_an_engine(
    tiny_model: Path, tmp_path: Path
) -> None:
    run, gates = tmp_path / "run", tmp_path / "gates"
    arguments = ["configs/smoke.yaml", f"model.path={tiny_model}", f"run.dir={run}", *SPLIT, f"run.steps={STEPS}"]
    process = MillraceProcess("train", *arguments, directory=run, gates=gates)
    process.wait_for_step(4)
    process.kill("engine")
    with closed(gates, "training"):  # the other engine does all the work that the staleness bound allows, then waits
        process.wait_until(lambda: served(run) == 3, "engine in the killed one's place", 90)
    both_again = time.time()
    assert process.wait(180) == 0, process.output[-3000:]
    summary = summary_of(run)
    assert (summary["status"], summary["actors_replaced"]) == ("finished", 1)
    assert_balanced(summary)
    assert summary["ledger"]["trained"] == STEPS * 4
    assert len(training_lines(run)) == STEPS
    assert all(abs(line["kl/mismatch"]) < 1e-2 for line in training_lines(run) if line["lag/max"] == 0)
    assert_accounted(run)
    prefill, decode = seconds(run, "engine-0.prefill", both_again), seconds(run, "engine-1.decode", both_again)
    assert prefill[Cause.PREFILL] > prefill[Cause.DECODE]
    assert decode[Cause.DECODE] > decode[Cause.PREFILL]
    assert "other_phase" in summary["accounting"]["engine-0.prefill"]
    assert summary["kv"]["handoffs"] > 0
    assert summary["kv"]["kv_received_mb"] > 0
    assert training_lines(run)[-1]["kv/handoffs"] > 0
    log = "".join(path.read_text() for path in (run / "logs").glob("engine-*.log"))
    assert "Traceback" not in log


def served(run: Path) -> int:
    """How many engines have begun to serve so far."""
    return sum(event.event == "serving" for event in read_fleet_events(run / "fleet.jsonl"))


def seconds(run: Path, lane: str, since: float) -> dict[Cause, float]:
    """What an engine spent on each cause in the spans that began after ``since`` (Unix seconds)."""
    told: dict[Cause, float] = defaultdict(float)
    for span in read_timeline(run / "timeline"):
        if span.lane == lane and span.began_at >= since:
            told[span.cause] += span.ended_at - span.began_at
    return told
