"""The `millrace` command. Other packages add subcommands through the entry point group `millrace.commands`."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, TypeVar

import click
from rich.console import Console

from orchestrator.accounting.command import trace_command
from orchestrator.announce import Announcer
from orchestrator.composition import packaged_names
from orchestrator.config import Config, ConfigError, load, to_yaml
from orchestrator.export_command import export_command
from orchestrator.model_files import check_model
from orchestrator.report.command import report_command
from orchestrator.run_directory import RunDirectory, RunDirectoryError
from orchestrator.scale_command import scale_command
from orchestrator.show import show_command

F = TypeVar("F", bound=Callable[..., Any])


class MillraceGroup(click.Group):
    """Finds subcommands of installed packages when they are asked for, so that `train` does not import `bench`."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted({*super().list_commands(ctx), *(point.name for point in _plugins())})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        found = super().get_command(ctx, cmd_name)
        if found is not None:
            return found
        for point in _plugins():
            if point.name == cmd_name:
                command: click.Command = point.load()
                return command
        return None


def _plugins() -> list[Any]:
    return list(entry_points(group="millrace.commands"))


@click.group(cls=MillraceGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="millrace")
def main() -> None:
    """Train long-horizon language-model agents with asynchronous reinforcement learning."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # before transformers is imported, here and in actors
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())


def _split(arguments: tuple[str, ...]) -> tuple[list[str], list[str]]:
    """Configuration files come first; whatever holds '=' is an override."""
    return [a for a in arguments if "=" not in a], [a for a in arguments if "=" in a]


def _load(arguments: tuple[str, ...]) -> Config:
    if not arguments:
        raise ConfigError(f"name a config file or one of {', '.join(packaged_names())}; then key.path=value overrides")
    paths, overrides = _split(arguments)
    return load(paths, overrides)


def _guarded(command: F) -> F:
    """Errors that are for a person end the command with their message and status 1, without a traceback."""
    from functools import wraps

    @wraps(command)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        from learner.errors import CheckpointError
        from orchestrator.launch import Interrupted, LaunchError

        try:
            return command(*args, **kwargs)
        except Interrupted as error:
            click.echo(str(error), err=True)
            sys.exit(130)
        except (ConfigError, RunDirectoryError, LaunchError, CheckpointError, FileNotFoundError) as error:
            click.echo(f"Error: {error}", err=True)
            sys.exit(1)

    return guarded  # type: ignore[return-value]


def _started_at() -> float:
    """When this process was started (Unix time), imports included."""
    import psutil

    return min(time.time(), psutil.Process().create_time())


@main.command()
@click.argument("config", nargs=-1)
@click.option("--dry-run", is_flag=True, help="Check everything, write the resolved config, and stop.")
@click.option("--print-config", is_flag=True, help="Print the resolved config and stop.")
@_guarded
def train(config: tuple[str, ...], dry_run: bool, print_config: bool) -> None:
    """Train: CONFIG is one YAML file or more, then key.path=value overrides."""
    from orchestrator import launch
    from orchestrator.view import LiveView

    settings = _load(config)
    if print_config:
        click.echo(to_yaml(settings, mask_secrets=True), nl=False)
        return
    launch.check(settings)
    run = RunDirectory.create(settings.run.dir, to_yaml(settings), overwrite=settings.run.overwrite)
    if dry_run:
        click.echo(
            f"the configuration is sound; it is in {run.config} and runs with: millrace train {run.config} run.overwrite=true"
        )
        return
    console = Console(file=sys.stdout)
    model = launch.prepare_model(settings, run, Announcer(console))
    check_model(model, settings.rollout.loop, settings.engines.max_len)
    began_at = _started_at() if settings.model.path is not None else time.time()
    summary = launch.run(settings, run, launch.Start(model), began_at, LiveView(console))
    click.echo(launch.describe(summary))
    click.echo(f"run directory: {run.path}")


@main.command()
@click.argument("run")
@click.argument("overrides", nargs=-1)
@click.option("--from", "checkpoint", default=None, help="Checkpoint to go back to, such as step-000050.")
@_guarded
def resume(run: str, overrides: tuple[str, ...], checkpoint: str | None) -> None:
    """Continue RUN (a run directory) from its newest checkpoint, or from the one named by --from."""
    from orchestrator import launch, telemetry
    from orchestrator.view import LiveView

    directory = RunDirectory.open(run)
    settings = load([str(directory.config)], [f"run.dir={directory.path}", *overrides])
    launch.check(settings)
    console = Console(file=sys.stdout)
    model = launch.prepare_model(settings, directory, Announcer(console))
    check_model(model, settings.rollout.loop, settings.engines.max_len)
    start = launch.find_start(directory, model, checkpoint)
    if start.version >= settings.run.steps:
        raise launch.LaunchError(
            f"{directory.path} is at step {start.version} of run.steps={settings.run.steps}: it is finished; give more steps "
            f"(`millrace resume {run} run.steps={start.version * 2}`)"
        )
    telemetry.cut_metrics(directory, start.version)
    for name in directory.set_aside(start.version):
        Announcer(console).say(f"{name} belongs to what is done again: it is kept as {name}.abandoned")
    where = "the beginning" if start.checkpoint is None else f"checkpoint {start.checkpoint.name}"
    console.print(f"continuing from {where}")
    summary = launch.run(settings, directory, start, _started_at(), LiveView(console))
    click.echo(launch.describe(summary))


@main.command("plan")
@click.argument("config", nargs=-1)
@click.option(
    "--from", "run", type=click.Path(file_okay=False, path_type=Path), help="A finished run to calibrate from."
)
@_guarded
def plan_command(config: tuple[str, ...], run: Path | None) -> None:
    """Say what a run will need, how fast it will be, what limits it and where its lag will settle, before it is started.

    CONFIG may be left out with --from: it is then the run's own.
    """
    from orchestrator import plan

    if run is not None and not [argument for argument in config if "=" not in argument]:
        config = (str(RunDirectory.open(str(run)).config), *config)
    settings = _load(config)
    Console().print(plan.render(plan.make_plan(settings, run)))


@main.command("simulate")
@click.argument("config", nargs=-1)
@click.option("--modes", default="", help="Comma-separated: sync,one_step,async (default: the configuration's).")
@click.option("--mean-field", is_flag=True, help="Aggregate accelerators and turns, for tens of thousands of episodes.")
@click.option(
    "--skip", type=int, default=None, help="Steps left out at the beginning (default: until the pipeline is full)."
)
@click.option(
    "--engine-restart", default=60.0, show_default=True, help="Suite fault: modelled seconds to replace an engine."
)
@click.option(
    "--published", is_flag=True, help="The published systems that the simulator is compared with; takes no CONFIG."
)
@click.option(
    "--json", "json_path", type=click.Path(dir_okay=False, path_type=Path), help="Write the results to a file."
)
@_guarded
def simulate_command(
    config: tuple[str, ...],
    modes: str,
    mean_field: bool,
    skip: int | None,
    engine_restart: float,
    published: bool,
    json_path: Path | None,
) -> None:
    """Simulate a run of a modelled cluster (a `synthetic` configuration) in seconds, with the run's own decisions."""
    from orchestrator.simulator import command

    if published:
        if config:
            raise ConfigError("--published takes no CONFIG: the systems' settings are its own")
        command.run_published(json_path)
        return
    settings = _load(config)
    options = command.default_options(settings, mean_field, engine_restart)
    command.run_simulation(settings, command.modes_of(modes, settings), options, skip, json_path)


@main.command("eval")
@click.argument("run")
@click.option("--step", type=int, default=None, help="Checkpoint to evaluate (default: the newest).")
@click.option("--tasks", type=int, default=None, help="How many held-out tasks (default: as configured).")
@_guarded
def evaluate(run: str, step: int | None, tasks: int | None) -> None:
    """Evaluate a checkpoint of RUN on held-out tasks."""
    from orchestrator import launch
    from orchestrator.evaluate import evaluate_checkpoint

    directory = RunDirectory.open(run)
    settings = load([str(directory.config)], [f"run.dir={directory.path}"])
    if tasks is not None:
        settings.tasks.held_out = tasks
    launch.check(settings)
    result = evaluate_checkpoint(settings, directory, step, Console(file=sys.stdout))
    click.echo(f"step {result['step']}: success {result['success']:.3f} on {result['tasks']} held-out tasks")
    for name, part in result["by_difficulty"].items():
        click.echo(f"  difficulty {name}: {part['success']:.3f} of {part['n']}")


main.add_command(export_command)
main.add_command(scale_command)
main.add_command(show_command)
main.add_command(trace_command)
main.add_command(report_command)


if __name__ == "__main__":
    main()
