"""`millrace scale RUN engines=+1`: more or fewer engines for a run that is under way."""

from __future__ import annotations

from typing import Any

import click


@click.command("scale")
@click.argument("run")
@click.argument("change")
def scale_command(run: str, change: str) -> None:
    """Give RUN, which is under way, more or fewer engines: CHANGE is engines=+1, engines=-1 or engines=3.

    New engines start, load the current weights and serve. An engine that is taken out gets no new requests; those it has
    end there, or after fleet.drain_s go on elsewhere from their last token. The other engines and the workers go on.
    """
    from orchestrator.control import give_command
    from orchestrator.run_directory import RunDirectory, RunDirectoryError
    from orchestrator.scaling import ScaleError, parse_change

    try:
        parse_change(change)
        result = give_command(RunDirectory.open(run), "scale", change, click.echo)
    except (RunDirectoryError, ScaleError) as error:
        raise click.ClickException(str(error)) from None
    click.echo(f"{result['after']} engines now ({result['before']} before):")
    for member in result["members"]:
        click.echo(f"  {_described(member)}")


def _described(member: dict[str, Any]) -> str:
    version = "" if member["version"] is None else f" version {member['version']}"
    return f"{member['engine']} {member['state']}{version}"
