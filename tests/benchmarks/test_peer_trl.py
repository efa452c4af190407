from __future__ import annotations

import statistics
from pathlib import Path

import pytest
from rich.console import Console
from tokenizers import Tokenizer

from benchmarks.output import save_figure
from benchmarks.peer_trl import (
    MILLRACE,
    PYTHON,
    Comparison,
    Measured,
    PeerError,
    check_python,
    check_tokens,
    draw,
    report,
    run,
    summarise,
)
from benchmarks.peers.trl_ceiling import engine_alone, learner_alone
from benchmarks.peers.trl_model import save_model
from benchmarks.peers.trl_task import PROMPT_LENGTH, PROMPTS, VOWELS, prompt, vowel_share
from orchestrator.config import load


def measured(rate: float, cpu_ms: float = 100.0) -> Measured:
    return Measured(rate, rate * 2048, cpu_ms, 0.5, cpu_by_role={"LearnerActor": cpu_ms})


def test_prompts_are_as_many_tokens_as_characters_and_the_vowels_are_the_tokenizers(tmp_path: Path) -> None:
    parameters = save_model(tmp_path, seed=0)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert parameters == 115_264
    assert tokenizer.get_vocab_size() == 259
    assert {len(tokenizer.encode(prompt(index)).ids) for index in range(PROMPTS)} == {PROMPT_LENGTH}
    assert {tokenizer.encode(letter).ids[0] for letter in "aeiou"} == VOWELS
    assert vowel_share(tokenizer.encode("banana!?").ids) == 3 / 8
    assert vowel_share([]) == 0


def test_the_ratio_is_to_the_better_trl_and_the_ceiling_to_the_slower_part() -> None:
    runs = {
        "TRL, 1 thread": [measured(6.0), measured(5.0), measured(7.0)],
        "TRL, 2 threads": [measured(8.0), measured(7.0), measured(9.0)],
        MILLRACE: [measured(12.0, 50.0), measured(14.0, 60.0), measured(13.0, 40.0)],
    }
    result = summarise(Comparison(), runs, engine_steps=40.0, learner_steps=20.0)
    assert result["best_trl"] == "TRL, 2 threads"
    assert result["ratio"] == pytest.approx(13 / 8, abs=1e-3)
    assert result["ratio_by_repeat"] == [1.5, 2.0, 1.444]
    assert result["ceiling"]["pipeline_steps_per_s"] == 20.0
    ours = result["systems"][-1]
    assert (ours["cpu_ms_per_step"], ours["cpu_ms_by_role"]) == (50.0, {"LearnerActor": 50.0})
    assert ours["steps_per_s_range"] == [12.0, 14.0]


def test_a_step_of_other_tokens_is_refused() -> None:
    comparison = Comparison(warm_up=1)
    check_tokens("TRL", [2048, 2048], comparison)
    with pytest.raises(PeerError, match=r"\[2040\].*should hold 2048"):
        check_tokens("TRL", [2048, 2040, 2048], comparison)
    with pytest.raises(PeerError, match="1 steps"):
        check_tokens("TRL", [2048], comparison)


def test_a_missing_environment_names_the_command_that_makes_it(tmp_path: Path) -> None:
    with pytest.raises(PeerError, match="make peers"):
        check_python(tmp_path / "python")


def test_millraces_side_is_a_configuration_that_loads(tmp_path: Path) -> None:
    from benchmarks.peer_trl import overrides

    config = load([], overrides(Comparison(), tmp_path, tmp_path / "run"))
    assert config.rollout.groups_per_update * config.rollout.group_size * config.rollout.max_tokens == 2048
    assert config.rewards == []


def test_each_part_alone_has_a_rate(tmp_path: Path) -> None:
    save_model(tmp_path, seed=0)
    assert engine_alone(tmp_path, rows=4, new_tokens=4, requests=16) > 0
    assert learner_alone(tmp_path, groups=2, size=2, new_tokens=4, learning_rate=1e-3, steps=2) > 0


@pytest.mark.skipif(not PYTHON.exists(), reason="TRL's environment is not there: `make peers` makes it")
def test_both_sides_train_the_same_tokens(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny = Comparison(
        prompts=2,
        completions=4,
        tokens=8,
        trl_steps=5,
        millrace_steps=8,
        warm_up=2,
        trl_threads=(1,),
        in_flight=16,
        repeats=1,
    )
    result = run(tiny, PYTHON, tmp_path)
    rows = {row["system"]: row for row in result["results"]["systems"]}
    assert rows.keys() == {"TRL, 1 thread", MILLRACE}
    assert min(row["steps_per_s"] for row in rows.values()) > 0
    assert rows[MILLRACE]["tokens_per_s"] / rows[MILLRACE]["steps_per_s"] == pytest.approx(tiny.step_tokens, rel=0.01)
    assert statistics.fmean(result["results"]["ratio_by_repeat"]) == pytest.approx(result["results"]["ratio"], abs=1e-3)
    report(result, Console())
    assert "times TRL, 1 thread" in capsys.readouterr().out
    save_figure(tmp_path / "peer.svg", draw(result))
    assert (tmp_path / "peer.svg").stat().st_size > 0
