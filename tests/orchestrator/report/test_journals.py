"""The survey of a run's journals: the queue's own numbers, whatever was cut, in bounded memory."""

from __future__ import annotations

import json
import random
import tracemalloc
from collections import Counter

import numpy as np
import pytest

from experience.entries import make_entry
from experience.journal import Journal
from experience.queue_records import RevertRecord
from experience.records import Status, Trajectory
from experience.wire import encode
from orchestrator.episodes import Episode
from orchestrator.report import journals
from orchestrator.report.embedded import CONTEXT, MASKED, TRAINED, UNTRAINED, embed, token_kinds
from orchestrator.report.journals import survey
from orchestrator.report.picks import AT_RANDOM, EACH, Picked, Picks
from orchestrator.run_directory import RunDirectory


def test_the_numbers_are_those_of_the_queues_ledger(run: RunDirectory) -> None:
    found, summary = survey(run), json.loads(run.summary.read_text())
    ledger, tokens = summary["ledger"], summary["tokens"]
    assert found.problems == []
    assert (found.dispatched, found.trained, found.live) == (ledger["dispatched"], ledger["trained"], ledger["live"])
    assert found.dropped == ledger["dropped"] == {"stale": 1}
    assert found.generated_tokens == tokens["generated"]
    assert found.trained_tokens == tokens["trained"]
    assert found.masked_tokens == tokens["masked"] > 0
    assert found.wasted_tokens.total() == tokens["wasted"]
    assert set(found.wasted_tokens) == {"stale", "late"}
    assert found.length_distance == pytest.approx(summary["lengths_ks"])


def test_lags_are_counted_token_by_token(run: RunDirectory) -> None:
    found = survey(run)
    assert found.lags.total() == found.trained_tokens + found.masked_tokens
    masked = sum(tokens for lag, tokens in found.lags.items() if lag > 2)
    assert masked == found.masked_tokens


def test_a_revert_takes_back_what_was_trained_after_the_checkpoint(run: RunDirectory) -> None:
    before = survey(run)
    journal = Journal(run.journal)
    journal.append("revert", encode(RevertRecord(committed_step=9)))
    journal.close()
    after = survey(run)
    assert after.trained == before.trained - 2
    assert after.live == before.live + 2
    assert after.trained_tokens < before.trained_tokens
    assert max(picked.episode.trained_at or 0 for picked in after.picked) == 9


def test_a_torn_tail_is_told_and_the_rest_is_read(run: RunDirectory) -> None:
    segment = sorted(run.journal.glob("*.journal"))[-1]
    whole = survey(run)
    segment.write_bytes(segment.read_bytes()[:-7])
    found = survey(run)
    assert len(found.problems) == 1
    assert "unfinished record" in found.problems[0]
    assert found.episodes == whole.episodes - 1


def test_damage_in_the_middle_is_told(run: RunDirectory) -> None:
    segment = sorted(run.journal.glob("*.journal"))[-1]
    data = bytearray(segment.read_bytes())
    data[len(data) // 2] ^= 0xFF
    segment.write_bytes(data)
    found = survey(run)
    assert any("damaged at offset" in problem for problem in found.problems)
    assert 0 < found.episodes < 27


def test_a_long_run_is_sampled(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = survey(run)
    monkeypatch.setattr(journals, "MAX_DECODED", 9)
    found = survey(run)
    assert found.looked_into == 9
    assert found.episodes == whole.episodes == 27
    assert found.finished_lengths == whole.finished_lengths
    assert 0 < found.lags.total() < whole.lags.total()


def test_memory_does_not_grow_with_the_journal(run: RunDirectory) -> None:
    """Thirty megabytes of trajectories in segments of two are read with a few megabytes."""
    journal = Journal(run.journal, segment_bytes=2 << 20)
    size, written = 100_000, 0
    for index in range(25):
        tokens = np.zeros(size, np.int32)
        big = Trajectory(
            trajectory_id=f"big-{index}/0",
            episode_id=f"big-{index}",
            group_id="big",
            task_id="big",
            tokens=tokens,
            trainable=np.ones(size, np.bool_),
            logprobs=np.zeros(size, np.float32),
            versions=tokens,
        )
        payload = encode(make_entry([big]))
        journal.append("late", payload)
        written += len(payload)
    journal.close()
    tracemalloc.start()
    found = survey(run)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found.episodes == 27 + 25
    assert written > 30e6
    assert peak < 12e6


# --- what is picked ---------------------------------------------------------------------------------------------------


def episode(index: int, **more: object) -> Picked:
    values: dict[str, object] = {
        "reward": index / 1000,
        "tokens": index,
        "trained_at": index // 10,
        "oldest_version": 0,
    }
    return Picked(Episode(f"g{index}-0", f"g{index}", positions=(index,), **{**values, **more}), {"total": index / 7})  # type: ignore[arg-type]


def test_extremes_and_a_random_sample_are_kept() -> None:
    picks = Picks(random.Random(0))
    for index in range(1000):
        picks.offer(episode(index, dropped="stale" if index == 500 else None))
    kept = {picked.episode.episode_id: picked.why.split(", ") for picked in picks.all()}
    assert "worst reward" in kept["g0-0"]
    assert {"best reward", "slowest", "longest", "oldest tokens", "trained last"} <= set(kept["g999-0"])
    assert kept["g500-0"] == ["dropped or failed"] or "at random" in kept["g500-0"]
    reasons = Counter(reason for why in kept.values() for reason in why)
    assert reasons["at random"] == AT_RANDOM
    assert reasons["best reward"] == EACH
    assert picks.slowest()[0].episode.episode_id == "g999-0"


def test_ties_do_not_all_go_to_the_first_episodes() -> None:
    picks = Picks(random.Random(0))
    for index in range(1000):
        picks.offer(episode(index, reward=1.0))
    best = [int(p.episode.group_id[1:]) for p in picks.all() if "best reward" in p.why]
    assert max(best) > 500


# --- what is embedded -------------------------------------------------------------------------------------------------


def test_tokens_are_told_apart_as_the_learner_did(run: RunDirectory) -> None:
    found = survey(run)
    items = {item["episode"]: item for item in embed(run, found.picked, 2).items}
    masked = next(item for item in items.values() if item["lag"] == 3)
    runs = [run for turn in masked["turns"] for run in turn["runs"]]
    assert {run[0] for run in runs} == {CONTEXT, MASKED, TRAINED}
    dropped = next(item for item in items.values() if item["dropped"] == "stale")
    assert {run[0] for turn in dropped["turns"] for run in turn["runs"]} == {CONTEXT, UNTRAINED}
    text = "".join(piece for turn in masked["turns"] for piece in turn["text"])
    assert "find_user" in text
    assert sum(len(turn["logprobs"]) for turn in masked["turns"]) == masked["sampled"]


def test_tokens_of_an_evaluation_are_not_called_trained(run: RunDirectory) -> None:
    sampled = np.array([False, True])
    record = Trajectory(
        trajectory_id="e/0",
        episode_id="e",
        group_id="e",
        task_id="t",
        tokens=np.zeros(2, np.int32),
        trainable=sampled,
        logprobs=np.zeros(2, np.float32),
        versions=np.array([-1, 5], np.int32),
        status=Status.TRUNCATED,
    )
    assert token_kinds(record, Episode("e", "e", source="eval 5"), 2).tolist() == [CONTEXT, UNTRAINED]


def test_numbers_that_json_cannot_say_do_not_cost_the_report(run: RunDirectory) -> None:
    journal = Journal(run.journal)
    nan, endless = float("nan"), float("-inf")
    odd = Trajectory(
        trajectory_id="odd-0/0",
        episode_id="odd-0",
        group_id="odd",
        task_id="t",
        tokens=np.zeros(2, np.int32),
        trainable=np.ones(2, np.bool_),
        logprobs=np.array([nan, endless], np.float32),
        versions=np.zeros(2, np.int32),
        reward=nan,
        timings={"total": 1e6},
    )
    journal.append("late", encode(make_entry([odd])))
    journal.close()
    items = {item["episode"]: item for item in embed(run, survey(run).picked, 2).items}
    assert items["odd-0"]["reward"] is None
    assert items["odd-0"]["turns"][0]["logprobs"] == [None, None]
    assert json.dumps(list(items.values()), allow_nan=False)


def test_the_page_has_room_for_so_many_tokens(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    from orchestrator.report import embedded

    found = survey(run)
    monkeypatch.setattr(embedded, "MAX_TOKENS", 60)
    monkeypatch.setattr(embedded, "MAX_TOKENS_EACH", 20)
    result = embed(run, found.picked, 2)
    shown = sum(len(turn["text"]) for item in result.items for turn in item["turns"])
    assert 0 < shown <= 60
    assert result.left_out > 0
    long = [item for item in result.items if item["cut"]]
    for item in long:
        assert sum(turn["cut"] for turn in item["turns"]) == item["cut"] == item["length"] - 20
