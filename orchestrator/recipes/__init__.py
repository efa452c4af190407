"""Recipes: models made on the spot, so that a first run needs no download."""

from __future__ import annotations

from collections.abc import Callable
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path

RECIPES = {
    "shop_small": "orchestrator.recipes.shop_small.build",
    "shop_untrained": "orchestrator.recipes.shop_untrained",
    "synthetic": "orchestrator.recipes.synthetic",
}
"""Name to module; the module has ``VERSION`` and ``build(directory, seed, threads, progress)``."""

Progress = Callable[[int, int, float], None]
"""Called with steps done, steps in all, and the present loss."""


def make_model(recipe: str, directory: Path, seed: int, threads: int = 1, progress: Progress | None = None) -> Path:
    """Build the recipe's model in ``directory`` (Hugging Face files) and return it.

    Trains for some tens of seconds with torch in this process. Raises ValueError for a recipe that does not exist.
    """
    path: Path = import_module(_module(recipe)).build(Path(directory), seed, threads, progress)
    return path


def recipe_key(recipe: str, seed: int) -> str:
    """What decides the recipe's weights, as a file name: models of one key may be shared between runs."""
    return f"{recipe}-v{import_module(_module(recipe)).VERSION}-seed{seed}"


def _module(recipe: str) -> str:
    if recipe not in RECIPES:
        near = get_close_matches(recipe, RECIPES, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"model.recipe: no recipe {recipe!r}; there are {', '.join(RECIPES)}.{hint}")
    return RECIPES[recipe]
