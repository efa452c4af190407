"""The recipe shop_small: vocabulary, chat template, what build writes."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import pytest

from env_pool.shop.clerk import ClumsyClerk
from env_pool.shop.environment import ShopEnvironment
from orchestrator.recipes import make_model, recipe_key
from orchestrator.recipes.shop_small.demonstrations import conversation, demonstrate
from orchestrator.recipes.shop_small.vocabulary import END_OF_TURN, UNKNOWN, save_tokenizer, words
from rollout_workers.chat import ChatTokenizer


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("shop_small")
    save_tokenizer(path)
    return path


def test_the_vocabulary_holds_every_word_of_the_terse_shop(directory: Path) -> None:
    chat = ChatTokenizer.load(directory)
    assert len(words()) == len(set(words())) < 300
    rng = random.Random(0)
    for index in range(400):
        task = ShopEnvironment.make_task(index, 1, "held_out", {})
        for text, _ in conversation(task, ClumsyClerk().act(task, rng)):
            assert UNKNOWN not in [words()[token] for token in chat.encode(text)], text
    assert UNKNOWN not in chat.decode(chat.encode("> error . done none ;"))


def test_each_rendering_begins_with_the_tokens_of_history_and_sample(directory: Path) -> None:
    chat = ChatTokenizer.load(directory)
    rng = random.Random(1)
    for index in range(100):
        task = ShopEnvironment.make_task(index, 2, "train", {})
        messages = [{"role": "user", "content": task.payload["request"]}]
        history = list(chat.encode(chat.render(messages, None, True)))
        shop = ShopEnvironment()
        shop.reset(task)
        for action in ClumsyClerk().act(task, rng):
            sampled = chat.encode(f"{action} {END_OF_TURN}")
            text = chat.render(messages, None, True) + chat.decode(sampled, after=history)
            content = chat.decode(sampled, after=history).removesuffix(END_OF_TURN)
            reply = shop.step(content)
            messages += [{"role": "assistant", "content": content}, *reply.messages]  # type: ignore[union-attr]
            rendered = chat.render(messages, None, True)
            assert rendered.startswith(text)
            history += [*sampled, *chat.encode(rendered[len(text) :])]
            assert history == list(chat.encode(rendered))
            assert chat.decode(history) == rendered
        shop.close()


def test_odd_turns_stay_prefixes_too(directory: Path) -> None:
    chat = ChatTokenizer.load(directory)
    messages = [{"role": "user", "content": "anna say order"}]
    start = chat.encode(chat.render(messages, None, True))
    for sampled in (";", "find_user anna", "note note note", "ask / > .", "4 8 2 ;", f"{UNKNOWN} ;"):
        spoken = chat.decode(chat.encode(sampled), after=start)
        text = chat.render(messages, None, True) + spoken
        content = spoken.removesuffix(END_OF_TURN)
        rest = [{"role": "assistant", "content": content}, {"role": "tool", "content": "error"}]
        assert chat.render(messages + rest, None, True).startswith(text), sampled


def test_transformers_reads_the_same_tokenizer_and_template(directory: Path) -> None:
    from transformers import AutoTokenizer

    theirs, ours = AutoTokenizer.from_pretrained(directory), ChatTokenizer.load(directory)
    messages = [
        {"role": "user", "content": "order 482 say status"},
        {"role": "assistant", "content": " find_order 4 8 2 "},
        {"role": "tool", "content": "anna lamp late"},
    ]
    text = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == ours.render(messages, None, True)
    assert text == "ask order 482 say status / find_order 4 8 2 ; > anna lamp late ."
    assert tuple(theirs(text)["input_ids"]) == ours.encode(text)
    assert theirs.eos_token_id == words().index(END_OF_TURN)
    assert len(theirs) == len(words())


def test_demonstrations_train_the_models_own_tokens_alone(directory: Path) -> None:
    chat = ChatTokenizer.load(directory)
    for tokens, trained in demonstrate(chat.tokenizer, ClumsyClerk(), 20, seed=3):
        text = [words()[token] for token in tokens]
        assert text[0] == "ask"
        assert text[-1] == END_OF_TURN
        own = False
        for word, is_trained in zip(text, trained, strict=True):
            if word in ("ask", ">"):
                own = False
            assert is_trained == own
            own = own or word in ("/", ".")


def test_build_writes_a_model_that_transformers_loads_and_the_seed_decides(tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from learner.warm_up import WarmUpSettings
    from orchestrator.recipes.shop_small.build import build

    short = WarmUpSettings(steps=6, batch_size=8)
    paths = [build(tmp_path / name, seed, settings=short) for name, seed in (("a", 0), ("b", 0), ("c", 1))]
    models = [AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in paths]
    flat = [torch.cat([weight.flatten() for weight in model.parameters()]) for model in models]
    assert torch.equal(flat[0], flat[1])
    assert not torch.equal(flat[0], flat[2])
    assert flat[0].numel() < 350_000
    assert models[0].config.tie_word_embeddings
    assert models[0].generation_config.eos_token_id == words().index(END_OF_TURN)
    expected = {"chat_template.jinja", "config.json", "generation_config.json", "model.safetensors"}
    assert {file.name for file in paths[0].iterdir()} == expected | {"tokenizer.json", "tokenizer_config.json"}


def test_an_unknown_recipe_is_an_error_that_names_the_nearest(tmp_path: Path) -> None:
    said = r"no recipe 'shop_smal'; there are shop_small, shop_untrained, synthetic\. Did you mean 'shop_small'\?"
    with pytest.raises(ValueError, match=said):
        make_model("shop_smal", tmp_path, seed=0)
    assert recipe_key("shop_small", 3).endswith("-seed3")


def test_the_command_refuses_an_unknown_recipe_in_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "orchestrator.recipes", "shop_smal", str(tmp_path / "model"), "0"]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert finished.returncode == 1
    assert finished.stderr.startswith("Error: model.recipe: no recipe 'shop_smal'")
    assert not (tmp_path / "model").exists()
