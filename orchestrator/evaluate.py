"""Evaluating a checkpoint after the fact: a run of no steps in a directory of its own below the run's."""

from __future__ import annotations

import copy
import time
from typing import Any

from rich.console import Console

from orchestrator import launch
from orchestrator.config import Config, to_yaml
from orchestrator.run_directory import RunDirectory
from orchestrator.view import LiveView


def evaluate_checkpoint(config: Config, directory: RunDirectory, step: int | None, console: Console) -> dict[str, Any]:
    """The evaluation's result (see `orchestrator.evaluation.Evaluation.result`). Raises LaunchError, CheckpointError."""
    from learner.adapter_files import base_of
    from learner.checkpoint import all_checkpoints, checkpoint_path, latest, read_checkpoint
    from learner.errors import ModelError

    found = latest(directory.checkpoints) if step is None else checkpoint_path(directory.checkpoints, step)
    if found is None or not found.is_dir():
        wanted = "yet: nothing to evaluate" if found is None else f"of step {step}"
        choice = launch.there_are(all_checkpoints(directory.checkpoints))
        raise launch.LaunchError(f"{directory.path} has no checkpoint {wanted}; {choice}")
    version = read_checkpoint(found).version
    own = copy.deepcopy(config)
    own.run.dir = str(directory.path / f"eval-{found.name}")
    own.run.steps = version
    own.run.checkpoint_every = 0
    own.queue.journal = False
    run = RunDirectory.create(own.run.dir, to_yaml(own), overwrite=True)
    try:
        model = base_of(found)
    except ModelError as error:
        raise launch.LaunchError(str(error)) from error
    start = launch.Start(model, found, version, version * own.rollout.groups_per_update)
    launch.run(own, run, start, time.time(), LiveView(console))
    return run.read_json(run.evaluation_file(version))
