"""What a person gets to read when something is wrong before a run starts: the thing, and the remedy, within seconds."""

from __future__ import annotations

import json
import shutil
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from orchestrator.cli import main
from orchestrator.recipes.shop_small.vocabulary import words
from rollout_workers.engines.servers import environment, preflight
from rollout_workers.engines.servers.bring_up import ServerTimes

SMALL = ["smoke", "--dry-run", "tasks.environment=coin_environment:CoinEnvironment"]


def refused(*arguments: str) -> str:
    """The error of a command that must end with status 1, one message and no traceback."""
    result = CliRunner().invoke(main, list(arguments))
    assert result.exit_code == 1, result.output
    assert "Traceback" not in result.output
    assert result.output.startswith("Error: ")
    return result.output


@pytest.fixture
def refuse(tiny_model: Path, tmp_path: Path) -> Callable[..., str]:
    """The error of `millrace train` with some settings wrong; the run directory must not have been touched."""

    def train(*overrides: str) -> str:
        run = tmp_path / "run"
        text = refused("train", *SMALL, f"model.path={tiny_model}", f"run.dir={run}", *overrides)
        assert not run.exists()
        return text

    return train


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("rollot.workers=2", ["'rollot'", "did you mean 'rollout'"]),
        ("rollout.worker=2", ["'rollout.worker'", "did you mean 'rollout.workers'"]),
        ("rollout.workers=two", ["rollout.workers", "'two'", "Integer"]),
        ("learner.lr=fast", ["learner.lr", "'fast'", "Float"]),
        ("rewards=[{kidn: rule}]", ["rewards.0.kidn", "rewards.0.kind"]),
        ("rewards=[{kind: 'no_such_module:judge'}]", ["rewards", "no_such_module", "PYTHONPATH"]),
        ("rollout.loop=tool_agnet", ["rollout.loop", "did you mean 'tool_agent'"]),
        ("rollout.loop=no_such_module:f", ["rollout.loop", "no_such_module", "PYTHONPATH"]),
        ("rollout.loop=faulty_parts:nothing_here", ["faulty_parts", "nothing_here", "mostly_sound"]),
        ("tasks.environment=shoop", ["tasks.environment", "Did you mean 'shop'"]),
        ("mode=asink", ["mode", "did you mean 'async'"]),
        ("engines.max_len=100000", ["engines.max_len", "512", "max_position_embeddings"]),
    ],
)
def test_a_wrong_setting_is_named_with_what_would_be_right(
    override: str, words: list[str], refuse: Callable[..., str]
) -> None:
    text = refuse(override)
    for word in words:
        assert word in text


@pytest.mark.parametrize("kind", ["vllm", "sglang"])
def test_servers_that_cannot_be_had_are_named_before_anything_is_made(kind: str, refuse: Callable[..., str]) -> None:
    text = refuse(f"engines.kind={kind}", f"engines.{kind}.python=/there/is/none/bin/python")
    assert f"engines.{kind}.python=/there/is/none/bin/python: there is no such file" in text
    assert "make engines" in text
    text = refuse(f"engines.kind={kind}", f"engines.{kind}.python={sys.executable}")
    assert f"has no {kind}" in text
    assert "make engines" in text
    assert "did you mean" in refuse(f"engines.kind={kind}", f"engines.{kind}.pyhton=x")
    assert "must be a list" in refuse(f"engines.kind={kind}", f"engines.{kind}.urls=http://127.0.0.1:9")


def test_an_environment_that_was_never_made_is_named(
    refuse: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "ROOT", tmp_path)
    text = refuse("engines.kind=vllm")
    assert f"{tmp_path / '.venv-vllm' / 'bin' / 'python'} does not exist; run `make engines`" in text


def test_external_servers_that_are_not_there_are_named(
    refuse: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight, "PATIENCE", ServerTimes(startup_timeout_s=0.5, request_timeout_s=5.0))
    with socket.socket() as taken:  # and does not listen
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        text = refuse("engines.kind=sglang", f"engines.sglang.urls=[{url}]")
    assert f"sglang at {url} was not ready" in text
    assert "check engines.sglang.urls" in text


def test_methods_that_the_environment_lacks_are_named_if_the_run_calls_them(refuse: Callable[..., str]) -> None:
    unfinished = "tasks.environment=faulty_parts:UnfinishedEnvironment"
    assert "does not define reset(task), step(action), restore(task, state), verify(task, outcome)" in " ".join(
        refuse(unfinished).split()
    )
    own_loop = refuse(unfinished, "rollout.loop=faulty_parts:mostly_sound", "rewards=[]")
    assert "does not define restore(task, state), which" in " ".join(own_loop.split())


def test_a_missing_config_file_is_named_with_those_there_are() -> None:
    assert "did you mean 'smoke'" in refused("train", "smok")
    assert "did you mean" not in refused("train", "nonsense")
    assert "quickstart" in refused("train", "here/is/nothing.yaml")
    assert "quickstart" in refused("train")
    assert "did you mean 'smoke'" in refused("plan", "smok")


def test_user_code_that_cannot_be_imported_is_named_by_its_line(
    refuse: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    (tmp_path / "with_bad_syntax.py").write_text("x = 1\ndef f(:\n")
    (tmp_path / "raising_on_import.py").write_text("x = 1\nraise RuntimeError('no licence')\n")
    assert "with_bad_syntax.py:2" in refuse("rollout.loop=with_bad_syntax:f")
    text = refuse("tasks.environment=raising_on_import:World")
    assert "raising_on_import.py:2" in text
    assert "RuntimeError: no licence" in text


def test_a_recipe_that_does_not_exist(tmp_path: Path) -> None:
    text = refused("train", "smoke", "--dry-run", f"run.dir={tmp_path / 'run'}", "model.recipe=shop_smal")
    assert "'shop_smal'" in text
    assert "shop_small" in text


def truncated(model: Path) -> str:
    (model / "model.safetensors").write_bytes((model / "model.safetensors").read_bytes()[:50_000])
    return "model.safetensors is damaged or truncated"


def garbage(model: Path) -> str:
    (model / "model.safetensors").write_bytes(b"\xff" * 4096)
    return "model.safetensors is damaged or truncated"


def without_weights(model: Path) -> str:
    (model / "model.safetensors").unlink()
    return "holds no weights"


def missing_shard(model: Path) -> str:
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "part-2.safetensors"}}))
    return "part-2.safetensors is missing"


def without_template(model: Path) -> str:
    (model / "chat_template.jinja").unlink()
    return "has no chat template, and rollout.loop=tool_agent exchanges chat messages; add a chat_template.jinja"


def broken_template(model: Path) -> str:
    (model / "chat_template.jinja").write_text("{% for message in %}")
    return "chat_template.jinja is not valid"


def without_tokenizer(model: Path) -> str:
    (model / "tokenizer.json").unlink()
    return "holds no tokenizer.json"


def broken_tokenizer(model: Path) -> str:
    (model / "tokenizer.json").write_text("{")
    return "tokenizer.json is damaged"


def another_tokenizer(model: Path) -> str:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "vocab_size": 10}))
    return f"tokenizer.json has token ids up to {len(words()) - 1}, but the model knows 10"


def not_causal(model: Path) -> str:
    (model / "config.json").write_text(json.dumps({"model_type": "bert", "architectures": ["BertModel"]}))
    return "config.json describes BertModel (model_type bert), which is not a causal language model"


def broken_config(model: Path) -> str:
    (model / "config.json").write_text('{"model_type": ')
    return "config.json cannot be read"


@pytest.mark.parametrize(
    "damage",
    [
        truncated, garbage, without_weights, missing_shard, without_template, broken_template, without_tokenizer,
        broken_tokenizer, another_tokenizer, not_causal, broken_config,
    ],
)  # fmt: skip
def test_a_model_directory_that_cannot_be_used_is_refused_by_the_file(
    damage: Callable[[Path], str], tiny_model: Path, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    expected = damage(model)
    text = refused("train", *SMALL, f"model.path={model}", f"run.dir={tmp_path / 'run'}")
    assert "model.path" in text
    assert str(model) in text
    assert expected in text
    assert not (tmp_path / "run").exists()


def test_a_sound_configuration_passes_the_same_checks(tiny_model: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    result = CliRunner().invoke(main, ["train", *SMALL, f"model.path={tiny_model}", f"run.dir={run}"])
    assert result.exit_code == 0, result.output
    assert (run / "config.yaml").exists()


def test_a_run_directory_that_cannot_be_used(tiny_model: Path, tmp_path: Path) -> None:
    settings = ["train", *SMALL, f"model.path={tiny_model}"]
    (tmp_path / "file").write_text("")
    assert "is a file" in refused(*settings, f"run.dir={tmp_path / 'file'}")
    assert "cannot be written" in refused(*settings, f"run.dir={tmp_path / 'file' / 'below'}")
    assert "cannot be written" in refused(*settings, "run.dir=/proc/no/such/place")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("do not delete")
    assert "not of a run" in refused(*settings, f"run.dir={tmp_path / 'full'}", "run.overwrite=true")
    assert (tmp_path / "full" / "thesis.tex").exists()


@pytest.mark.parametrize("command", ["resume", "eval"])
def test_commands_on_what_is_no_run(command: str, tmp_path: Path) -> None:
    assert "is not a directory" in refused(command, str(tmp_path / "nothing"))
    assert "has no config.yaml" in refused(command, str(tmp_path))


def test_a_run_without_checkpoints(tiny_model: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    CliRunner().invoke(main, ["train", *SMALL, f"model.path={tiny_model}", f"run.dir={run}"])
    assert "there are none yet" in refused("eval", str(run))
    assert "there are none yet" in refused("eval", str(run), "--step", "3")
    assert "has no checkpoint 'step-000050'; there are none yet" in refused("resume", str(run), "--from", "step-000050")


def test_weights_of_another_model_are_refused_by_learner_and_engine(tiny_model: Path, tmp_path: Path) -> None:
    """transformers alone would leave the weights that it does not find at random."""
    import torch
    from safetensors.torch import load_file, save_file

    from learner.backends.model import load_model as load_for_learner
    from rollout_workers.engines.torch_engine.loader import load_model as load_for_engine

    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    weights = load_file(model / "model.safetensors")
    norm = weights.pop("model.norm.weight")
    save_file({**weights, "other.norm.weight": norm}, model / "model.safetensors", metadata={"format": "pt"})
    expected = r"lack 1 of the tensors .*model\.norm\.weight.* belong to different models"
    with pytest.raises(ValueError, match=expected):
        load_for_learner(model, torch.device("cpu"))
    with pytest.raises(ValueError, match=expected):
        load_for_engine(str(model))
