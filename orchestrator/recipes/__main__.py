"""`python -m orchestrator.recipes RECIPE DIRECTORY SEED`: make a model in a process of its own."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

from orchestrator.recipes import make_model


def main() -> None:
    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    recipe, directory, seed = sys.argv[1:4]
    make_model(recipe, Path(directory), int(seed), threads=os.cpu_count())


if __name__ == "__main__":
    main()
