"""Warm-up: what carries loss, what is learned, what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from learner.warm_up import Demonstration, WarmUpSettings, warm_up


def small_model(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=16,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        initializer_range=0.06,
        tie_word_embeddings=True,
    )
    return Qwen3ForCausalLM(config)


def predicted(model: Any, tokens: list[int]) -> list[int]:
    with torch.no_grad():
        return [int(token) for token in model(input_ids=torch.tensor([tokens])).logits[0].argmax(-1)]


TWO = [
    Demonstration([1, 2, 3, 4, 5], [False, False, True, True, True]),
    Demonstration([1, 6, 7, 8], [False, False, True, True]),
]


def test_trained_tokens_are_learned_and_the_others_are_not() -> None:
    model = small_model()
    losses = warm_up(model, TWO, WarmUpSettings(steps=80, batch_size=2, rise_steps=5))
    assert losses[0] > 1.5
    assert losses[-1] < 0.1
    assert predicted(model, [1, 2, 3, 4])[1:] == [3, 4, 5]
    assert predicted(model, [1, 6, 7])[1:] == [7, 8]
    assert predicted(model, [1])[0] not in (2, 6), "a token without loss must not be learned"


def test_the_loss_is_the_mean_over_trained_tokens_of_plain_unpadded_forwards() -> None:
    model = small_model()
    terms = []
    with torch.no_grad():
        for tokens, trained in TWO:
            logprobs = model(input_ids=torch.tensor([tokens])).logits[0].log_softmax(-1)
            terms += [-logprobs[at - 1, tokens[at]] for at in range(1, len(tokens)) if trained[at]]
    expected = float(torch.stack(terms).mean())
    assert warm_up(model, TWO, WarmUpSettings(steps=1, batch_size=2))[0] == pytest.approx(expected, abs=1e-5)


def test_the_same_seed_gives_the_same_weights() -> None:
    weights = []
    for _ in range(2):
        model = small_model()
        warm_up(model, TWO * 5, WarmUpSettings(steps=8, batch_size=3, seed=4))
        weights.append(torch.cat([weight.flatten() for weight in model.parameters()]))
    assert torch.equal(weights[0], weights[1])


def test_progress_is_told_of_every_step() -> None:
    told: list[tuple[int, int, float]] = []
    losses = warm_up(small_model(), TWO, WarmUpSettings(steps=3, batch_size=2), lambda *step: told.append(step))
    assert told == [(1, 3, losses[0]), (2, 3, losses[1]), (3, 3, losses[2])]


def test_rates_rise_and_fall_linearly() -> None:
    settings = WarmUpSettings(steps=101, rise_steps=10, final_share=0.1)
    assert settings.share_at(0) == pytest.approx(0.1)
    assert settings.share_at(9) == settings.share_at(10) == 1.0
    assert settings.share_at(55) == pytest.approx(0.55)
    assert settings.share_at(100) == pytest.approx(0.1)


def test_nothing_to_train_on_and_a_diverged_loss_are_errors() -> None:
    with pytest.raises(ValueError, match="at least one trained token"):
        warm_up(small_model(), [Demonstration([1, 2], [True, False])], WarmUpSettings(steps=1))
    model = small_model()
    with torch.no_grad():
        model.base_model.embed_tokens.weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="warm-up step 0: the loss is nan"):
        warm_up(model, TWO, WarmUpSettings(steps=1))
