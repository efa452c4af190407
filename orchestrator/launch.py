"""From a configuration to a running controller: checks, run directory, model, Ray, the view."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import deque
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from env_pool.environment import Environment
from env_pool.registry import TaskSource, defines, load_environment, load_object
from orchestrator.announce import Announcer
from orchestrator.config import Config, ConfigError, secret_values, validate
from orchestrator.model_files import check_model, check_synthetic
from orchestrator.recipes import RECIPES
from orchestrator.run_directory import RunDirectory
from orchestrator.snapshot import Snapshot
from orchestrator.view import LiveView
from rollout_workers.engines.config import SERVERS
from rollout_workers.errors import EngineFault
from rollout_workers.loops import BUNDLED as LOOPS
from rollout_workers.loops import load_loop

logger = logging.getLogger(__name__)

OWN_CODE = [Path(__file__).parents[1] / package for package in ("env_pool", "rollout_workers")]
"""Where ValueErrors come from that name the key and the remedy themselves."""

MADE = "recipe.done"
"""Written beside a recipe's model when it is whole."""

REPORT_MARK = "warm-up "
"""What the recipe's progress lines begin with, after the time."""


TEMPORARY = "millrace-"
"""Prefix of a local cluster's temporary directory; the process id of its owner follows."""


class LaunchError(Exception):
    """A run that cannot start, or ended; the message is for a person."""


class Interrupted(LaunchError):
    """A person ended the run with Ctrl-C."""


@dataclass(frozen=True)
class Start:
    """Where a run begins: from a model directory at version 0, or from a checkpoint."""

    model_path: Path
    checkpoint: Path | None = None
    version: int = 0
    dispatched: int = 0


def check(config: Config) -> None:
    """All that can be found wrong before anything starts. Raises ConfigError."""
    validate(config)
    _try_user_code("rollout.loop", config.rollout.loop, lambda: load_loop(config.rollout.loop))
    name = config.tasks.environment
    _try_user_code("tasks.environment", name, lambda: load_environment(name))
    tasks = TaskSource.from_config(config.tasks, "train", config.seed)
    _try_user_code("tasks.environment", f"{name} (make_task)", lambda: tasks.task(0))
    _check_environment(config, load_environment(name))
    for kind in (reward.kind for reward in config.rewards if reward.kind != "rule"):
        _try_user_code("rewards", kind, partial(load_object, kind, "rewards"))
    if config.model.path is not None:
        check_model(Path(config.model.path), config.rollout.loop, config.engines.max_len)
        if config.engines.kind == "synthetic":
            check_synthetic(Path(config.model.path))
    elif config.model.recipe not in RECIPES:
        raise ConfigError(
            f"model.recipe: there is no recipe {config.model.recipe!r}; there are {', '.join(RECIPES)}, or give model.path"
        )
    if config.engines.kind in SERVERS and config.cluster.address == "local":  # else the engines are on other machines
        _check_servers(config)


def _check_environment(config: Config, kind: type[Environment]) -> None:
    """That the environment has the methods that this run will call: a loop of the user's own may need no ``step``."""
    acts = config.rollout.loop in LOOPS
    needed = {
        "reset(task)": acts,
        "step(action)": acts,
        "restore(task, state)": defines(kind, "snapshot"),
        "verify(task, outcome)": any(reward.kind == "rule" for reward in config.rewards),
    }
    missing = [method for method, asked in needed.items() if asked and not defines(kind, method.partition("(")[0])]
    if missing:
        raise ConfigError(
            f"tasks.environment: {config.tasks.environment!r} does not define {', '.join(missing)}, which "
            f"rollout.loop={config.rollout.loop} or rewards of kind 'rule' call; add that to {kind.__name__}"
        )


def _check_servers(config: Config) -> None:
    from rollout_workers.engines.servers.preflight import look_at_servers

    try:
        asyncio.run(look_at_servers(config.engines))
    except EngineFault as error:
        raise ConfigError(str(error)) from error


def _try_user_code(key: str, name: str, attempt: Callable[[], Any]) -> None:
    """Run what imports or calls the user's code; what comes out of it becomes a ConfigError with the line it is from."""
    try:
        attempt()
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        if isinstance(error, ValueError) and any(Path(place.filename).is_relative_to(own) for own in OWN_CODE):
            raise ConfigError(str(error)) from error
        where = f"{place.filename}:{place.lineno} in {place.name}"
        if isinstance(error, SyntaxError):
            where = f"{error.filename}:{error.lineno}"
        raise ConfigError(f"{key}: {name} raised {type(error).__name__}: {error} ({where})") from error


def prepare_model(config: Config, run: RunDirectory, announcer: Announcer) -> Path:
    """The model directory of the run: the one configured, or one that the recipe makes (in a process of its own)."""
    if config.model.path is not None:
        return Path(config.model.path).resolve()
    recipe = config.model.recipe
    assert recipe is not None, "validated: a path or a recipe"
    if (run.model / MADE).exists():
        return run.model
    began_at = time.monotonic()
    with announcer.doing(f"making the model by recipe {recipe} (seed {config.seed})") as update:
        _make_model(recipe, run.model, config.seed, update)
    announcer.say(f"model ready after {time.monotonic() - began_at:.0f} s: {run.model}")
    return run.model


def _make_model(recipe: str, directory: Path, seed: int, update: Callable[[str], None]) -> None:
    """Run the recipe, passing on what it reports. Raises LaunchError with its last lines."""
    command = [sys.executable, "-m", "orchestrator.recipes", recipe, str(directory), str(seed)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(os.cpu_count() or 1), "OMP_WAIT_POLICY": "PASSIVE"}
    tail: deque[str] = deque(maxlen=5)
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            tail.append(line.rstrip())
            if REPORT_MARK in line:
                update(f"making the model by recipe {recipe}: {line.partition(REPORT_MARK)[2].strip()}")
    if process.returncode != 0:
        raise LaunchError(f"recipe {recipe} failed:\n" + "\n".join(tail))
    (directory / MADE).touch()


def remove_leftovers() -> None:
    """Delete the temporary directories of runs that were killed before they could."""
    for path in Path(tempfile.gettempdir()).glob(f"{TEMPORARY}[0-9]*-*"):
        owner = int(path.name[len(TEMPORARY) :].partition("-")[0])
        if not psutil.pid_exists(owner):
            shutil.rmtree(path, ignore_errors=True)


def start_ray(config: Config) -> str | None:
    """Start a local cluster or join one. Returns the temporary directory of a local one."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # pools that spin while they wait starve the other processes
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"
    os.environ["PYTHONPATH"] = os.pathsep.join(path for path in (os.getcwd(), os.environ.get("PYTHONPATH", "")) if path)
    import ray

    cluster = config.cluster
    if cluster.address != "local":
        ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.ERROR)
        return None
    remove_leftovers()
    directory = tempfile.mkdtemp(prefix=f"{TEMPORARY}{os.getpid()}-")
    ray.init(
        address="local",
        num_cpus=cluster.num_cpus or 16,
        object_store_memory=cluster.object_store_mb << 20,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        _temp_dir=directory,
    )
    return directory


def run(config: Config, directory: RunDirectory, start: Start, started_at: float, view: LiveView) -> dict[str, Any]:
    """Run to the end, showing it. Returns the summary; raises LaunchError with the first cause.

    Ray prints messages of its own to standard output; they go to ``logs/ray.log``, and the view keeps the terminal.
    """
    run_attempt = directory.start_attempt(" ".join(sys.argv[1:]) or "train", started_at)
    ray_log = (directory.logs / "ray.log").open(
        "a", encoding="utf-8", buffering=1
    )  # Ray writes to it until the very end
    with Announcer(view.console).doing("starting Ray"), redirect_stdout(ray_log):
        temporary = start_ray(config)
    import ray

    with redirect_stdout(ray_log):
        try:
            controller, result = _start_controller(config, directory, start, started_at, run_attempt)
            return _follow(controller, result, config.run.view_every_s, view)
        finally:
            ray.shutdown()
            if temporary is not None:
                shutil.rmtree(temporary, ignore_errors=True)


def _start_controller(
    config: Config, directory: RunDirectory, start: Start, started_at: float, run_attempt: int
) -> tuple[Any, Any]:
    """The controller actor, and the reference of its `run` call."""
    import ray

    from orchestrator.controller import Controller
    from orchestrator.resources import share_resources
    from orchestrator.run_plan import RunPlan

    gpus = int(ray.cluster_resources().get("GPU", 0))
    plan = RunPlan(
        config=config,
        run_directory=str(directory.path),
        model_path=str(start.model_path),
        checkpoint=None if start.checkpoint is None else str(start.checkpoint),
        served=str(_served(config, directory, start)),
        version=start.version,
        resources=share_resources(config, os.cpu_count() or 1, gpus),
        run_attempt=run_attempt,
        started_at=started_at,
        secrets=list(secret_values(config).values()),
        dispatched=start.dispatched,
    )
    controller = ray.remote(Controller).options(num_cpus=0, max_concurrency=1000).remote(plan)
    return controller, controller.run.remote(controller)


def _served(config: Config, directory: RunDirectory, start: Start) -> Path:
    """What engines begin with: a model directory, a checkpoint, or (of an adapter) the model that it makes."""
    from learner.adapter_files import adapter_settings

    if start.checkpoint is None:
        return start.model_path
    if adapter_settings(start.checkpoint) is None:
        return start.checkpoint
    from learner.export import export_served

    export_served(start.checkpoint, start.model_path, directory.served, config.model.dtype)
    return directory.served


def _follow(controller: Any, result: Any, every_s: float, view: LiveView) -> dict[str, Any]:
    """Show snapshots until the run ends. The first Ctrl-C ends it in good order, the second at once."""
    import ray

    from orchestrator.run_plan import RunInterrupted

    asked = False

    def interrupted(*_: object) -> None:
        nonlocal asked
        asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    previous = signal.signal(signal.SIGINT, interrupted)
    try:
        with view:
            told = False
            while True:
                if asked and not told:
                    controller.interrupt.remote()
                    told = True
                done, _ = ray.wait([result], timeout=every_s)
                if done:
                    break
                _show(controller, view)
            summary: dict[str, Any] = ray.get(result)
            return summary
    except ray.exceptions.RayTaskError as error:
        cause = getattr(error, "cause", None) or error
        raise (Interrupted if isinstance(cause, RunInterrupted) else LaunchError)(str(cause)) from None
    except ray.exceptions.RayError as error:
        raise LaunchError(
            f"the controller died ({error}); `millrace resume` continues from the last checkpoint"
        ) from None
    finally:
        signal.signal(signal.SIGINT, previous)


def _show(controller: Any, view: LiveView) -> None:
    import ray

    try:
        snapshot = ray.get(controller.snapshot.remote(), timeout=10)
    except ray.exceptions.RayError as error:
        logger.debug("no snapshot: %s", error)
        return
    view.update(Snapshot.from_dict(snapshot), time.monotonic())


def find_start(directory: RunDirectory, model_path: Path, name: str | None = None) -> Start:
    """Where a resumed run goes on: the checkpoint ``name``, or the newest one, or the beginning.

    Raises CheckpointError if that is missing or damaged.
    """
    from learner.checkpoint import all_checkpoints, latest, read_checkpoint

    chosen = latest(directory.checkpoints)
    if name is not None:
        chosen = directory.checkpoints / name
        if not chosen.is_dir():
            raise LaunchError(
                f"{directory.path} has no checkpoint {name!r}; {there_are(all_checkpoints(directory.checkpoints))}"
            )
    if chosen is None:
        return Start(model_path)
    state = read_checkpoint(chosen)
    return Start(model_path, chosen, state.version, int(state.extra.get("dispatched", 0)))


def there_are(checkpoints: list[Path]) -> str:
    """Names of checkpoints, in words."""
    return f"there are {', '.join(path.name for path in checkpoints)}" if checkpoints else "there are none yet"


def describe(summary: dict[str, Any]) -> str:
    """The end of a run in a few lines."""
    before, after = summary.get("success_before"), summary.get("success_after")
    lines = [f"{summary['status']}: {summary['steps']} steps in {summary['wall_s']:.0f} s"]
    if before is not None and after is not None:
        lines.append(
            f"success on {summary['eval_tasks']} held-out tasks: {before:.3f} before, {after:.3f} after ({after - before:+.3f})"
        )
    lines.append(
        f"lag: mean {summary['lag_mean']:.2f}, max {summary['lag_max']} (bound {summary['max_lag']}); "
        f"first token after {summary['startup_s']} s; learner idle for lack of dispatch: {summary['learner_starved_s']} s"
    )
    if scale := summary.get("scale"):
        lines.append(
            f"modelled: {scale['rollout_accelerators']} accelerators roll out, {scale['learner_accelerators']} train; a wall "
            f"second is {scale['time_scale']:g} modelled ones, a token {scale['token_scale']:g}"
        )
    if idle := summary.get("idle"):
        largest = sorted(idle.items(), key=lambda item: -item[1])[:4]
        lines.append(
            f"engines and learner worked {1 - sum(idle.values()):.1%} of their time; idle: "
            + ", ".join(f"{cause} {share:.1%}" for cause, share in largest)
        )
    for stall in summary.get("stalls", []):
        lines.append(f"stalled for {stall['seconds']:.0f} s: {stall['stage']} ({stall['actor']}): {stall['detail']}")
    lines.append(f"groups: {json.dumps(summary['ledger'])}")
    lines.append(f"tokens: {json.dumps(summary['tokens'])}")
    return "\n".join(lines)
