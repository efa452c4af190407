"""``millrace report RUN``."""

from __future__ import annotations

from pathlib import Path

import click

from experience.accounting import read_timeline
from orchestrator.accounting.words import idle_in_words
from orchestrator.report.embedded import embed
from orchestrator.report.facts import Facts, gather
from orchestrator.report.journals import survey
from orchestrator.report.page import Content, render
from orchestrator.report.timeline import make_timeline
from orchestrator.run_directory import RunDirectory, RunDirectoryError

REPORT = "report.html"


def make_report(run: RunDirectory, *, seed: int = 0) -> str:
    """The report on ``run`` as an HTML page; the run may still be going on, or have been killed.

    ``seed`` decides which episodes are drawn at random for the trajectory browser.
    """
    facts = gather(run)
    found = survey(run, seed=seed)
    content = Content(
        facts=facts,
        survey=found,
        timeline=make_timeline(read_timeline(run.path / "timeline")),
        embedded=embed(run, found.picked, facts.max_lag),
        idle_words=_idle_words(facts),
    )
    return render(content)


def _idle_words(facts: Facts) -> list[str]:
    """Where the idle time of engines and learner went; nothing when the run kept no accounts."""
    starved_s = (facts.summary or {}).get("learner_starved_s")
    mode = str(facts.config.get("mode", ""))
    told = float(starved_s) if isinstance(starved_s, int | float) else 0.0
    return idle_in_words(facts.idle, mode, told) if facts.idle else []


@click.command("report")
@click.argument("run", type=click.Path())
@click.option(
    "--out", type=click.Path(dir_okay=False, path_type=Path), help=f"Where to write it (default: RUN/{REPORT})."
)
@click.option("--seed", type=int, default=0, show_default=True, help="Which episodes are drawn at random.")
def report_command(run: str, out: Path | None, seed: int) -> None:
    """Write what happened in RUN as one HTML page that needs no network."""
    try:
        directory = RunDirectory.open(run)
    except RunDirectoryError as error:
        raise click.ClickException(str(error)) from error
    page = make_report(directory, seed=seed)
    path = out if out is not None else directory.path / REPORT
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise click.ClickException(
            f"{path} cannot be written: {error.strerror or error}; choose another --out"
        ) from error
    click.echo(f"{path} ({path.stat().st_size / 1e6:.1f} MB)")
