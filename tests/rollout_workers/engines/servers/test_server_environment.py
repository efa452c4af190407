"""The environment of a server: found, and of the expected version."""

from __future__ import annotations

import importlib.metadata
import sys
from pathlib import Path

import pytest
from tiny_adapter import TinyAdapter

from rollout_workers.engines.servers import environment
from rollout_workers.engines.servers.environment import (
    check_environment,
    interpreter_of,
    judge_version,
    same_release,
)
from rollout_workers.engines.servers.errors import EnvironmentUnfit


def adapter(version: str = "1.0", *distributions: str) -> TinyAdapter:
    made = TinyAdapter()
    made.expected_version = version
    made.distributions = distributions or ("msgspec",)
    return made


async def test_the_expected_version_is_found() -> None:
    installed = importlib.metadata.version("msgspec")
    assert await check_environment(Path(sys.executable), adapter(installed, "no-such-thing", "msgspec")) == installed


async def test_another_version_is_named_with_the_remedy() -> None:
    installed = importlib.metadata.version("msgspec")
    with pytest.raises(EnvironmentUnfit) as caught:
        await check_environment(Path(sys.executable), adapter("99.1"))
    assert f"has msgspec {installed}, and Millrace drives tiny 99.1; run `make engines`" in str(caught.value)


async def test_an_environment_without_the_engine_is_named() -> None:
    with pytest.raises(EnvironmentUnfit, match="has no no-such-thing or nor-this; run `make engines`"):
        await check_environment(Path(sys.executable), adapter("1.0", "no-such-thing", "nor-this"))


async def test_what_is_no_python_is_named(tmp_path: Path) -> None:
    fake = tmp_path / "python"
    fake.write_text("#!/bin/sh\necho broken >&2\nexit 3\n")
    fake.chmod(0o755)
    with pytest.raises(EnvironmentUnfit, match="is not a Python that can run tiny: broken"):
        await check_environment(fake, adapter())
    fake.chmod(0o644)
    with pytest.raises(EnvironmentUnfit, match=r"cannot be run: .*Permission denied"):
        await check_environment(fake, adapter())


def test_a_missing_environment_says_how_to_make_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "ROOT", tmp_path)
    with pytest.raises(EnvironmentUnfit, match=r"\.venv-vllm/bin/python does not exist; run `make engines`"):
        interpreter_of("vllm", None)
    with pytest.raises(EnvironmentUnfit, match=r"engines\.vllm\.python=/no/such: there is no such file"):
        interpreter_of("vllm", "/no/such")
    assert interpreter_of("vllm", sys.executable) == Path(sys.executable)


@pytest.mark.parametrize(
    ("version", "expected", "same"),
    [
        ("0.32.0", "0.32.0", True),
        ("0.32.0+cpu", "0.32.0", True),
        ("0.32.0.post1", "0.32.0", True),
        ("v0.5.23", "0.5.23", True),
        ("0.32.0rc1", "0.32.0", False),
        ("0.32.1", "0.32.0", False),
        ("0.32", "0.32.0", False),
        ("unknown", "0.32.0", False),
    ],
)
def test_versions_agree_up_to_local_parts(version: str, expected: str, same: bool) -> None:
    assert same_release(version, expected) is same


def test_any_of_the_distributions_will_do() -> None:
    assert judge_version(adapter("2.0"), {"a": "1.0", "b": "2.0+cpu"}, "x") == "2.0+cpu"
