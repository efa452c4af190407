"""Every episode of a run can be listed and read back token by token, also from a damaged journal."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from rich.console import Console, RenderableType
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from experience.config import QueueConfig, StalenessConfig
from experience.entries import make_entry
from experience.journal import Journal
from experience.queue import ExperienceQueue
from experience.records import GroupHeader, Status, Task, Trajectory, Turn
from experience.staleness import make_policy
from experience.wire import encode_trajectory
from orchestrator.config import load, to_yaml
from orchestrator.episodes import Selection, load_trajectories, read_episodes, select
from orchestrator.run_directory import RunDirectory
from orchestrator.show import (
    MASKED_STYLE,
    VERSION_STYLES,
    find_tokenizer,
    is_masked,
    render_episode,
    render_list,
    render_trajectory,
    show_command,
    token_texts,
    turns_of,
)

WORDS = ["<unk>", "ask", "hi", "refund", "find_user", "anna", ";", ">", "user", "7", ".", "done"]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    words = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return words


def trajectory(group: str, member: int, reward: float | None, versions: tuple[int, int] = (3, 4)) -> Trajectory:
    """Prompt ``ask hi refund``, model ``find_user anna ;``, observation ``> user 7 .``, model ``done ;``."""
    text = ["ask", "hi", "refund", "find_user", "anna", ";", ">", "user", "7", ".", "done", ";"]
    sampled = np.array([0, 0, 0, 1, 1, 1, 0, 0, 0, 0, 1, 1], dtype=np.bool_)
    when = np.array([0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 1])
    return Trajectory(
        trajectory_id=f"{group}-{member}/0",
        episode_id=f"{group}-{member}",
        group_id=group,
        task_id="task-7",
        tokens=np.array([WORDS.index(word) for word in text], dtype=np.int32),
        trainable=sampled,
        logprobs=np.where(sampled, -0.25, 0.0).astype(np.float32),
        versions=np.where(sampled, np.array(versions)[when], -1).astype(np.int32),
        reward=reward,
        reward_parts={"rule": reward} if reward is not None else {},
        domain="refund_order",
        difficulty=2,
        turns=[
            Turn(start=0, end=3, role="prompt"),
            Turn(start=3, end=6, role="model", began_at=1.0, ended_at=1.25),
            Turn(start=6, end=10, role="observation", began_at=1.25, ended_at=1.253),
            Turn(start=10, end=12, role="model"),
        ],
        timings={"total": 1.5},
    )


@pytest.fixture
def run(tmp_path: Path, tokenizer: Tokenizer) -> RunDirectory:
    """Three groups: one trained at 5, one waiting, one dropped; and one evaluation."""
    run = RunDirectory.create(tmp_path / "run", to_yaml(load(["quickstart"])))
    run.model.mkdir()
    tokenizer.save(str(run.model / "tokenizer.json"))
    journal = Journal(run.journal)
    queue = ExperienceQueue(QueueConfig(min_size=1), make_policy(StalenessConfig(), 1), journal=journal)
    for index in range(3):
        task = Task(task_id=f"task-{index}", environment="shop", payload={}, domain="refund_order", difficulty=2)
        header = GroupHeader(group_id=f"g{index}", index=index, task=task, size=2, version_floor=3, seed=0)
        queue.open(header, 0.0)
    queue.add(make_entry([trajectory("g0", 0, 1.0)]), 1.0)
    queue.add(make_entry([trajectory("g0", 1, 0.0)]), 1.0)
    leased = queue.lease("learner", 1, 5, 2.0)
    queue.ack([leased[0].group_id], step=5, trained_tokens=leased[0].tokens, masked_tokens=0)
    queue.add(make_entry([trajectory("g1", 0, 0.5)]), 1.0)
    queue.fail("g1", "g1-1", "environment", 1.0)
    queue.add(make_entry([trajectory("g2", 0, 0.0)]), 1.0)
    queue.drop("g2", "stale")
    journal.close()
    evaluation = Journal(run.evaluation_journal(50) / "worker-0")
    evaluation.append("trajectory", encode_trajectory(trajectory("e000050-0000", 0, 1.0, (50, 50))))
    evaluation.close()
    return run


def text(part: RenderableType, *, styles: bool = False, width: int = 100) -> str:
    console = Console(width=width, file=io.StringIO(), record=True, force_terminal=True, color_system="standard")
    console.print(part)
    return console.export_text(styles=styles)


def shown(run: RunDirectory, *arguments: str, ok: bool = True) -> str:
    result = CliRunner().invoke(show_command, [str(run.path), *arguments])
    assert (result.exit_code == 0) is ok, result.output
    return result.output


def test_episodes_carry_their_fate(run: RunDirectory) -> None:
    episodes = {episode.episode_id: episode for episode in read_episodes(run).episodes}
    assert episodes["g0-0"].trained_at == 5
    assert episodes["g0-0"].success
    assert episodes["g0-0"].lag == 2
    assert episodes["g0-0"].domain == "refund_order"
    assert not episodes["g0-1"].success
    assert episodes["g1-0"].trained_at is None
    assert episodes["g1-1"].dropped == "environment"
    assert episodes["g1-1"].status is Status.SYSTEM_ERROR
    assert episodes["g2-0"].dropped == "stale"
    assert episodes["e000050-0000-0"].source == "eval 50"


def test_selection_and_order(run: RunDirectory) -> None:
    episodes = read_episodes(run).episodes

    def ids(selection: Selection, **options: object) -> list[str]:
        return [episode.episode_id for episode in select(episodes, selection, **options)]  # type: ignore[arg-type]

    assert ids(Selection(group="g0")) == ["g0-0", "g0-1"]
    assert ids(Selection(step=5)) == ["g0-0", "g0-1"]
    assert ids(Selection(step=50)) == ["e000050-0000-0"]
    assert ids(Selection(success=True, evaluations=False)) == ["g0-0"]
    assert ids(Selection(evaluations=True)) == ["e000050-0000-0"]
    assert ids(Selection(evaluations=False), last=2) == ["g1-1", "g2-0"]
    assert ids(Selection(evaluations=False), sort="reward")[:2] == ["g0-0", "g1-0"]
    assert ids(Selection(evaluations=False), sort="reward")[-1] == "g1-1"
    assert ids(Selection(), sort="lag", last=1) == ["g0-0"]
    with pytest.raises(ValueError, match="sort must be one of"):
        ids(Selection(), sort="beauty")


def test_an_ack_undone_by_a_resumed_run_is_undone_here(run: RunDirectory) -> None:
    journal = Journal(run.journal)
    queue = ExperienceQueue.recover(QueueConfig(min_size=1), make_policy(StalenessConfig(), 1), journal, 4, 9.0)
    assert queue.ready_groups >= 1
    journal.close()
    assert {e.episode_id: e.trained_at for e in read_episodes(run).episodes}["g0-0"] is None


def test_trajectories_come_back_whole(run: RunDirectory) -> None:
    for episode in read_episodes(run).episodes:
        loaded = load_trajectories(episode)
        assert [t.episode_id for t in loaded] == ([episode.episode_id] if episode.positions else [])


def test_list_shows_reward_versions_and_fate(run: RunDirectory) -> None:
    found = read_episodes(run)
    listed = text(render_list(found, found.episodes))
    for words in (["g0-0", "step 5", "1.00", "v3-4", "2"], ["g1-1", "environment", "none"], ["e000050", "eval 50"]):
        assert any(all(word in line for word in words) for line in listed.splitlines()), listed
    assert "6 of 6 episodes" in listed


def test_in_a_narrow_terminal_ids_and_numbers_stay_whole(run: RunDirectory) -> None:
    found = read_episodes(run)
    line = next(line for line in text(render_list(found, found.episodes), width=66).splitlines() if "g0-0" in line)
    assert line.split()[0] == "g0-0"
    assert "…" in line
    assert line.split()[-4:] == ["1.00", "5", "v3-4", "2"]


def test_a_trajectory_shows_turns_versions_rewards_and_times(run: RunDirectory) -> None:
    episode = next(e for e in read_episodes(run).episodes if e.episode_id == "g0-0")
    (part,) = render_episode(run, episode, logprobs=True)
    whole = text(part)
    for words in (
        "reward 1.00 (rule 1)  status finished",
        "task task-7  refund_order, difficulty 2",
        "12 tokens, 5 sampled at T=1",
        "trained at version 5, lag up to 2",
        "total 1.500 s",
        "── prompt",
        "ask hi refund",
        "── model v3-4  0.250 s",
        "find_user(-0.25) anna(-0.25)⟨v4⟩ ;(-0.25)",
        "── observation  0.003 s",
        "> user 7 .",
        "sampled by v4",
    ):
        assert words in whole, words


def test_versions_have_their_own_colours_and_masked_tokens_are_struck(run: RunDirectory, tokenizer: Tokenizer) -> None:
    episode = next(e for e in read_episodes(run).episodes if e.episode_id == "g0-0")
    (loaded,) = load_trajectories(episode)
    assert len(set(VERSION_STYLES)) == len(VERSION_STYLES)
    styled = text(render_trajectory(loaded, tokenizer, episode, max_lag=4), styles=True)
    assert "\x1b[92m ;" in styled  # v4, the newest: bright green
    assert "\x1b[93mfind_user" in styled  # v3: bright yellow
    strict = text(render_trajectory(loaded, tokenizer, episode, max_lag=1), styles=True)
    assert "\x1b[2;9mfind_user" in strict
    assert "sampled by v3 masked" in strict
    assert MASKED_STYLE == "strike dim"


def test_masked_means_older_than_the_bound_when_trained(run: RunDirectory) -> None:
    trained = next(e for e in read_episodes(run).episodes if e.episode_id == "g0-0")
    waiting = next(e for e in read_episodes(run).episodes if e.episode_id == "g1-0")
    assert is_masked(3, trained, 1)
    assert not is_masked(3, trained, 2)
    assert not is_masked(3, trained, None)
    assert not is_masked(3, waiting, 0)


def test_without_a_tokenizer_ids_are_shown(run: RunDirectory) -> None:
    (run.model / "tokenizer.json").unlink()
    assert find_tokenizer(run) is None
    assert "4 5" in text(render_trajectory(trajectory("g0", 0, 1.0), None))


def test_the_tokenizer_of_a_checkpoint_serves_too(run: RunDirectory) -> None:
    (run.checkpoints / "step-000100").mkdir()
    (run.model / "tokenizer.json").rename(run.checkpoints / "step-000100" / "tokenizer.json")
    assert find_tokenizer(run) is not None


def test_characters_over_several_tokens_are_put_together() -> None:
    vocabulary = {token: index for index, token in enumerate(pre_tokenizers.ByteLevel.alphabet())}
    spelled = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    spelled.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    spelled.decoder = decoders.ByteLevel()
    pieces = token_texts(spelled.encode("aé→b").ids, spelled)
    assert "".join(pieces) == "aé→b"
    assert pieces == ["a", "", "é", "", "", "→", "b"]


def test_turns_are_found_where_none_were_recorded() -> None:
    bare = trajectory("g0", 0, 1.0)
    bare.turns = []
    assert [(turn.start, turn.end, turn.role) for turn in turns_of(bare)] == [
        (0, 3, "prompt"),
        (3, 6, "model"),
        (6, 10, "observation"),
        (10, 12, "model"),
    ]


def test_damage_is_named_and_the_rest_is_shown(run: RunDirectory) -> None:
    segment = run.journal / "000000.journal"
    data = bytearray(segment.read_bytes())
    second = data.index(b"g0-1")
    data[second] ^= 0xFF
    segment.write_bytes(data)
    found = read_episodes(run)
    assert [episode.episode_id for episode in found.episodes] == ["g0-0", "e000050-0000-0"]
    assert "000000.journal is damaged at offset" in found.problems[0]
    listed = " ".join(shown(run).split())
    assert "is damaged at offset" in listed
    assert "g0-0" in listed


def test_an_unfinished_last_record_is_said(run: RunDirectory) -> None:
    segment = run.journal / "000000.journal"
    segment.write_bytes(segment.read_bytes()[:-3])
    found = read_episodes(run)
    assert len(found.episodes) == 6
    assert "unfinished record" in found.problems[0]


def test_command_lists_and_shows(run: RunDirectory) -> None:
    assert "g2-0" in shown(run)
    assert "g2-0" not in shown(run, "--success")
    assert "g0-0" not in shown(run, "--failed", "--train")
    assert "find_user anna" in shown(run, "--episode", "g0-0")


def test_command_says_why_there_is_nothing(run: RunDirectory, tmp_path: Path) -> None:
    assert "no such episode among 6; for example: --episode e000050-0000-0" in shown(run, "--episode", "x", ok=False)
    assert "leave a condition out" in shown(run, "--step", "77", ok=False)
    assert "was given up (environment)" in shown(run, "--episode", "g1-1", ok=False)
    empty = RunDirectory.create(tmp_path / "empty", "seed: 0\n")
    assert "no episodes yet" in shown(empty, ok=False)
    result = CliRunner().invoke(show_command, [str(tmp_path)])
    assert "is not the directory of a run" in result.output
    assert result.exit_code == 1


def test_damaged_config_is_named(run: RunDirectory) -> None:
    run.config.write_text("a: [")
    assert "config.yaml cannot be read" in shown(run, "--episode", "g0-0", ok=False)
