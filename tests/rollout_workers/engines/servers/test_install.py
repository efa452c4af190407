"""The recipes of the environments: what they change must be there, and what is complete is left alone."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from rollout_workers.engines import install as install_module
from rollout_workers.engines.install import (
    READY,
    RECIPES,
    Edit,
    InstallError,
    Recipe,
    apply_edit,
    install,
    is_ready,
    main,
    write_files,
)

LOCAL = Recipe(
    packages=(), files=(("extra/__init__.py", "answer = 42\n"),), try_out="import extra; assert extra.answer == 42"
)
"""An environment that needs no package index."""


@pytest.fixture
def recipes(monkeypatch: pytest.MonkeyPatch) -> dict[str, Recipe]:
    made = {"local": LOCAL}
    monkeypatch.setattr(install_module, "RECIPES", made)
    monkeypatch.setattr(install_module, "_run", without_pip(install_module._run))
    return made


def without_pip(run: object) -> object:
    """`pip install` without packages is an error; everything else is really run."""
    return lambda command: "" if "install" in command else run(command)  # type: ignore[operator]


def test_an_environment_is_made_once_and_again_when_its_recipe_changes(
    tmp_path: Path, recipes: dict[str, Recipe]
) -> None:
    directory = tmp_path / ".venv-local"
    assert install("local", directory, sys.executable)
    record = json.loads((directory / READY).read_text())
    assert record["recipe"] == LOCAL.fingerprint
    assert not install("local", directory, sys.executable)
    recipes["local"] = replace(LOCAL, try_out="assert False, 'does not work'")
    assert not is_ready(directory, recipes["local"])
    with pytest.raises(InstallError, match="does not work"):
        install("local", directory, sys.executable)
    assert not (directory / READY).exists()


def test_a_damaged_record_is_no_environment(tmp_path: Path) -> None:
    (tmp_path / READY).write_text("{")
    assert not is_ready(tmp_path, LOCAL)


def test_an_edit_changes_every_occurrence(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text('x = "VRAM"\ny = "VRAM"\n')
    apply_edit(tmp_path, Edit("a.py", (('"VRAM"', '"DRAM"'),)))
    assert (tmp_path / "a.py").read_text() == 'x = "DRAM"\ny = "DRAM"\n'


def test_an_edit_of_a_text_that_is_not_there_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("x = 1\n")
    with pytest.raises(InstallError, match="does not hold 'y = 2'"):
        apply_edit(tmp_path, Edit("a.py", (("x = 1", "x = 3"), ("y = 2", "y = 4"))))
    assert (tmp_path / "a.py").read_text() == "x = 1\n"
    with pytest.raises(InstallError, match="is not there"):
        apply_edit(tmp_path, Edit("b.py", ()))


def test_the_written_files_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_files(tmp_path, RECIPES["sglang"])
    monkeypatch.syspath_prepend(str(tmp_path))
    import sgl_kernel  # type: ignore[import-not-found]

    with pytest.raises(NotImplementedError, match=r"sgl_kernel\.rmsnorm needs a GPU"):
        sgl_kernel.rmsnorm(1)


def test_every_change_of_a_recipe_changes_its_fingerprint() -> None:
    changed = [replace(LOCAL, packages=("x",)), replace(LOCAL, remove=("x",)), replace(LOCAL, edits=(Edit("a", ()),))]
    assert len({recipe.fingerprint for recipe in [LOCAL, *changed]}) == 4


def test_an_unknown_engine_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["tensorrt"])
    assert "choose from" in capsys.readouterr().err
