"""Data beside the step's groups: demonstrations, groups of an earlier run; the entropy's coefficient; a distance in the reward."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from learner_fixtures import VOCABULARY, make_group, make_groups, make_learner, make_model_directory, train_step

from experience.entries import make_entry
from experience.journal import Journal
from experience.queue_records import GroupRecord
from experience.records import Group
from experience.wire import encode
from learner.batching import make_samples
from learner.config import LearnerConfig, ModelConfig
from learner.errors import LearnerError
from learner.learner import Learner
from learner.mixing import demonstration, tokenised
from learner.mixing_config import ReplayConfig, SftConfig
from learner.objectives.entropy import EntropyController
from learner.preparation import by_episode, penalised


def write_demonstrations(file: Path, count: int = 6) -> Path:
    rng = np.random.default_rng(3)
    lines = [
        json.dumps({"tokens": rng.integers(0, VOCABULARY, 12).tolist(), "trained": [False] * 6 + [True] * 6})
        for _ in range(count)
    ]
    file.write_text("\n".join(lines) + "\n")
    return file


def write_run(directory: Path, groups: list[Group]) -> Path:
    journal = Journal(directory / "journal")
    for group in groups:
        journal.append("open", encode(group.header))
        for trajectory in group.trajectories:
            journal.append("add", encode(make_entry([trajectory])))
        journal.append("ready", encode(GroupRecord(group.group_id)))
    journal.flush()
    journal.close()
    return directory


# Demonstrations


def test_demonstrations_become_likelier(model_directory: Path, tmp_path: Path) -> None:
    sft = SftConfig(dataset=str(write_demonstrations(tmp_path / "d.jsonl")), coef=1.0, batch_size=6)
    learner = make_learner(model_directory, lr=5e-3, sft=sft)
    losses = [train_step(learner, [])["sft/loss"] for _ in range(8)]
    assert losses[0] == pytest.approx(mean_loss(model_directory, tmp_path / "d.jsonl"), rel=1e-4)
    assert losses[-1] < 0.7 * losses[0]


def mean_loss(model: Path, file: Path) -> float:
    """Cross entropy of the trained tokens, by transformers itself."""
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(model)
    losses = []
    for line in file.read_text().splitlines():
        tokens = torch.tensor([json.loads(line)["tokens"]])
        logits = loaded(tokens).logits[0, 5:-1]
        losses.append(torch.nn.functional.cross_entropy(logits, tokens[0, 6:]).item())
    return float(np.mean(losses))


def test_the_mixed_gradient_is_the_sum_of_both(model_directory: Path, tmp_path: Path) -> None:
    """First update of Adam without clipping hides scales, so the norms are compared: g = g_rl + coef g_sft."""
    groups = make_groups(3)
    file = write_demonstrations(tmp_path / "d.jsonl")
    norms = {}
    for coef in (1e-9, 1.0, 2.0, 1e4):
        sft = SftConfig(dataset=str(file), coef=coef, batch_size=6)
        norms[coef] = train_step(make_learner(model_directory, sft=sft), groups)["grad_norm"]
    alone = train_step(make_learner(model_directory), groups)["grad_norm"]
    assert norms[1e-9] == pytest.approx(alone, rel=1e-5)
    sft_norm = norms[1e4] / 1e4
    # |a + 2b|^2 - 2 |a + b|^2 = 2 |b|^2 - |a|^2 whatever the angle between both.
    assert norms[2.0] ** 2 - 2 * norms[1.0] ** 2 == pytest.approx(2 * sft_norm**2 - alone**2, rel=2e-2)


def test_only_what_the_assistant_wrote_is_imitated(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    from orchestrator.recipes.shop_small.vocabulary import save_tokenizer

    save_tokenizer(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    messages = [
        {"role": "user", "content": "refund order 4 8 2"},
        {"role": "assistant", "content": "find_user anna"},
        {"role": "tool", "content": "order 4 8 2"},
        {"role": "assistant", "content": "done ok"},
    ]
    tokens, trained = tokenised(tokenizer, messages)
    assert tokenizer.decode(tokens).split() == tokenizer.apply_chat_template(messages, tokenize=False).split()
    kept = tokenizer.decode([token for token, mark in zip(tokens, trained, strict=True) if mark])
    assert [word for word in kept.split() if word.isalnum() or "_" in word][:2] == ["find_user", "anna"]
    assert "refund" not in kept
    assert "order" not in kept


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("nonsense", "line 2"),
        ('{"tokens": [1, 2], "trained": [true]}', "line 2: 2 tokens and 1 marks"),
        ('{"tokens": [1, 999], "trained": [false, true]}', "line 2: token 999 is none of the model's 64"),
        ('{"tokens": [1, 2], "trained": [true, false]}', "line 2: no token is trained"),
        ('{"text": "hello"}', "line 2: 'tokens'; a line is"),
    ],
)
def test_a_wrong_demonstration_is_named_by_its_line(
    model_directory: Path, tmp_path: Path, line: str, reason: str
) -> None:
    file = write_demonstrations(tmp_path / "d.jsonl", 1)
    file.write_text(file.read_text() + line + "\n")
    with pytest.raises(LearnerError, match=reason):
        make_learner(model_directory, sft=SftConfig(dataset=str(file)))


def test_a_dataset_that_is_missing_or_empty(model_directory: Path, tmp_path: Path) -> None:
    with pytest.raises(LearnerError, match="cannot be read"):
        make_learner(model_directory, sft=SftConfig(dataset=str(tmp_path / "none.jsonl")))
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(LearnerError, match="holds no demonstration"):
        make_learner(model_directory, sft=SftConfig(dataset=str(tmp_path / "empty.jsonl")))
    with pytest.raises(ValueError, match="no token is trained"):
        demonstration("d", [1, 2], [False, False], VOCABULARY)


# Replay


def test_recorded_groups_are_trained_on_beside_the_steps_own(model_directory: Path, tmp_path: Path) -> None:
    run = write_run(tmp_path / "earlier", make_groups(4, seed=5))
    replay = ReplayConfig(run=str(run), groups=3, correction="tis")
    learner = make_learner(model_directory, replay=replay)
    recorded = sum(group.sampled_tokens for group in make_groups(4, seed=5)[:3])
    groups = make_groups(3)
    metrics = train_step(learner, groups)
    assert metrics["replay/tokens"] == recorded
    assert metrics["tokens/trained"] + metrics["tokens/masked"] == sum(group.sampled_tokens for group in groups)
    assert metrics["grad_norm"] != train_step(make_learner(model_directory), groups)["grad_norm"]


def test_replay_of_the_steps_own_groups_changes_nothing(model_directory: Path, tmp_path: Path) -> None:
    """The same groups twice, divided by twice the tokens."""
    groups = make_groups(3)
    run = write_run(tmp_path / "earlier", groups)
    ours = make_learner(model_directory, replay=ReplayConfig(run=str(run), groups=2, correction="tis"))
    theirs = make_learner(model_directory)
    assert train_step(ours, groups)["grad_norm"] == pytest.approx(train_step(theirs, groups)["grad_norm"], rel=1e-4)


def test_a_run_that_cannot_be_replayed_is_named(model_directory: Path, tmp_path: Path) -> None:
    equal = write_run(tmp_path / "equal", [make_group(0, [1.0, 1.0], np.random.default_rng(0))])
    strange = make_groups(3)
    strange[0].trajectories[0].tokens[0] = VOCABULARY
    other = write_run(tmp_path / "other", strange)
    for run, reason in (
        (equal, "holds no finished group whose rewards differ"),
        (tmp_path / "missing", "holds no finished group|cannot be read"),
        (other, "has token 64, and the model knows 64"),
    ):
        with pytest.raises(LearnerError, match=reason):
            make_learner(model_directory, replay=ReplayConfig(run=str(run)))
    with pytest.raises(ValueError, match=r"those of learner\.advantage=riskpo are taken over a step"):
        LearnerConfig(advantage="riskpo", replay=ReplayConfig(run="x")).validate()


# Entropy


def test_the_coefficient_rises_below_the_target_and_rests_above_it() -> None:
    controller = EntropyController(target=0.5, rate=0.01, largest=0.025)
    seen = []
    for entropy in (0.4, 0.4, 0.4, 0.4, 0.6, 0.6, 0.4):
        controller.observe(entropy)
        seen.append(round(controller.coefficient, 6))
    assert seen == [0.01, 0.02, 0.025, 0.025, 0.0, 0.0, 0.015]


def test_the_learner_moves_the_coefficient_and_a_checkpoint_keeps_it(model_directory: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"entropy_target": 100.0, "entropy_rate": 0.01}
    learner = make_learner(model_directory, deterministic=True, **settings)
    used = [train_step(learner, make_groups(3, version=step))["entropy/coefficient"] for step in range(3)]
    assert used == pytest.approx([0.0, 0.01, 0.02])
    path = learner.save(tmp_path)
    config = LearnerConfig(warm_up_steps=0, device="cpu", **settings)
    copy = Learner(config, ModelConfig(), max_lag=4, deterministic=True, seed=3)
    copy.restore(path)
    assert train_step(copy, make_groups(3, version=3))["entropy/coefficient"] == pytest.approx(0.03)


# A distance to the reference in the reward


def test_the_estimate_is_taken_off_the_rewards_of_its_episode() -> None:
    made = make_samples(make_group(0, [1.0, 0.0, 0.5], np.random.default_rng(0)), 0, 4, "rloo")
    kl = {
        sample.trajectory_id: np.full(len(sample.targets), 0.1 * i, np.float32) for i, sample in enumerate(made.samples)
    }
    counts = [len(sample.targets) for sample in made.samples]
    rewards = penalised(made, kl, 0.5)
    expected = [1.0, -0.05 * counts[1], 0.5 - 0.1 * counts[2]]
    assert list(rewards.values()) == pytest.approx(expected)
    others = [(expected[1] + expected[2]) / 2, (expected[0] + expected[2]) / 2, (expected[0] + expected[1]) / 2]
    assert list(by_episode(rewards, "rloo").values()) == pytest.approx(
        [reward - other for reward, other in zip(expected, others, strict=True)]
    )


@pytest.mark.parametrize("advantage", ["rloo", "reinforce_pp", "gae"])
def test_equal_rewards_still_teach_where_the_reference_disagrees(
    model_directory: Path, tmp_path: Path, advantage: str
) -> None:
    reference = make_model_directory(tmp_path / "reference", seed=5)
    groups = [make_group(0, [1.0, 1.0, 1.0], np.random.default_rng(0))]
    settings: dict[str, Any] = {"kl_coef": 0.1, "kl_kind": "k1", "kl_place": "reward", "reference": str(reference)}
    learner = make_learner(model_directory, advantage=advantage, **settings)
    assert train_step(learner, groups)["grad_norm"] > 0


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"kl_place": "reward"}, "learner.kl_place=reward can have no effect with learner.kl_coef=0"),
        ({"kl_coef": 0.1, "kl_kind": "k1"}, "or kl_place=reward"),
        ({"kl_coef": 0.1, "kl_place": "reward", "reference_reset_every": 5}, "needs learner.kl_place=loss"),
        ({"entropy_target": 0.3, "entropy_coef": 0.1}, "learner.entropy_coef can have no effect with"),
        ({"sft": SftConfig(coef=0.0)}, "learner.sft.coef=0.0 must be greater than 0"),
        ({"sft": SftConfig(batch_size=0)}, "learner.sft.batch_size=0"),
        ({"replay": ReplayConfig(correction="decoupled")}, "learner.replay.correction='decoupled' is unknown"),
        ({"replay": ReplayConfig(groups=0)}, "learner.replay.groups=0"),
    ],
)
def test_what_can_have_no_effect_is_refused(settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        LearnerConfig(**settings).validate()
