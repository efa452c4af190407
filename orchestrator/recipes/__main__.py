"""``python -m orchestrator.recipes RECIPE DIRECTORY SEED``: make a model in a process of its own, as ``train`` does."""

from __future__ import annotations

import logging
from pathlib import Path

import click

from orchestrator.recipes import make_model

logger = logging.getLogger("orchestrator.recipes")

REPORT_EVERY = 50


def report(step: int, steps: int, loss: float) -> None:
    """Log one line every ``REPORT_EVERY`` steps."""
    if step % REPORT_EVERY == 0 or step == steps:
        logger.info("warm-up %d/%d: loss %.3f", step, steps, loss)


@click.command()
@click.argument("recipe")
@click.argument("directory", type=click.Path(path_type=Path))
@click.argument("seed", type=int)
@click.option("--threads", default=1, show_default=True, help="Torch threads.")
def main(recipe: str, directory: Path, seed: int, threads: int) -> None:
    """Make the model of RECIPE in DIRECTORY; SEED decides its weights."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    try:
        make_model(recipe, directory, seed, threads, report)
    except ValueError as error:
        raise click.ClickException(str(error)) from error


if __name__ == "__main__":
    main()
