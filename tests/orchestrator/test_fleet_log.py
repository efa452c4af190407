from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.fleet_log import SUMMARISED, FleetEvent, FleetLog, read_fleet_events
from orchestrator.run_directory import RunDirectoryError


def test_events_are_written_told_and_read_back(tmp_path: Path) -> None:
    log, heard = FleetLog(tmp_path / "fleet.jsonl"), list[FleetEvent]()
    log.listeners.add(heard.append)
    written = [
        log.note("serving", "engine-0.0", 3),
        log.note("rerouted", "engine-0.0", None, "worker-0.0 has placed its 2 requests elsewhere", requests=2),
    ]
    assert heard == written == read_fleet_events(tmp_path / "fleet.jsonl")
    assert [event.text() for event in written] == [
        "engine-0.0 serving version 3",
        "engine-0.0 rerouted: worker-0.0 has placed its 2 requests elsewhere",
    ]
    assert log.summary()["counts"] == {"serving": 1, "rerouted": 1}
    assert log.summary()["publications"] == {"count": 0}


def test_the_summary_is_bounded_and_tells_how_long_versions_took(tmp_path: Path) -> None:
    log = FleetLog(tmp_path / "fleet.jsonl")
    for number in range(SUMMARISED + 5):
        log.note("serving", f"engine-{number}.0", 0)
        log.published(0.01)
    summary = log.summary()
    assert len(summary["events"]) == SUMMARISED
    assert summary["counts"] == {"serving": SUMMARISED + 5}
    assert summary["publications"]["count"] == SUMMARISED + 5
    assert summary["publications"]["p99_s"] == pytest.approx(0.01, rel=0.11)
    assert len(read_fleet_events(tmp_path / "fleet.jsonl")) == SUMMARISED + 5


def test_a_line_that_is_being_written_is_left_out_and_damage_is_named(tmp_path: Path) -> None:
    path = tmp_path / "fleet.jsonl"
    assert read_fleet_events(path) == []
    FleetLog(path).note("serving", "engine-0.0", 0)
    with path.open("a") as file:
        file.write('{"at": 1.0, "eve')
    assert len(read_fleet_events(path)) == 1
    with path.open("a") as file:
        file.write("\n")
    with pytest.raises(RunDirectoryError, match=r"fleet.jsonl line 2 is not a fleet event"):
        read_fleet_events(path)


def test_a_disk_that_is_full_does_not_end_the_run(tmp_path: Path) -> None:
    log = FleetLog(tmp_path / "nowhere" / "fleet.jsonl")
    log.note("serving", "engine-0.0", 0)
    assert log.summary()["counts"] == {"serving": 1}
