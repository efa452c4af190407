"""``millrace show``: the episodes of a run as a table, or one of them token by token in colour."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click
import numpy as np
from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from experience.journal import JournalError
from experience.records import NOT_SAMPLED, Status, Trajectory, Turn
from experience.wire import WireFormatError
from orchestrator.episodes import SORT_KEYS, Episode, Found, Selection, load_trajectories, read_episodes, select
from orchestrator.run_directory import RunDirectory, RunDirectoryError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

VERSION_STYLES = ("bright_green", "bright_yellow", "bright_magenta", "bright_cyan", "bright_red", "bright_blue")
"""Colours of sampled tokens: the newest version of the trajectory first, older ones after it (and round again)."""

ROLE_STYLES = {"prompt": "white", "observation": "cyan", "model": "bright_green"}
MASKED_STYLE = "strike dim"
PIPE_WIDTH = 160


class ShowError(RuntimeError):
    """Nothing to show, for a reason that the message gives with its remedy."""


# --- the list ---------------------------------------------------------------------------------------------------------


def render_list(found: Found, shown: Sequence[Episode]) -> RenderableType:
    """A table with a line for each episode of ``shown``, and what could not be read."""
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="dim")
    for name in ("episode", "from", "task", "status", "reward", "tokens", "versions", "lag"):
        # In a narrow terminal rich makes the columns that may wrap narrower: those whose text can be cut.
        justify: Literal["left", "right"] = "right" if name in ("reward", "tokens", "lag") else "left"
        table.add_column(name, no_wrap=name not in ("task", "status"), justify=justify)
    for episode in shown:
        table.add_row(
            episode.episode_id,
            _place(episode),
            _cut(f"{episode.domain or episode.task_id} {episode.difficulty or ''}".strip()),
            _status(episode),
            _reward(episode.reward),
            str(episode.tokens) if episode.positions else "-",
            _versions(episode.oldest_version, episode.newest_version),
            "-" if episode.lag is None else str(episode.lag),
        )
    foot = Text(f"{len(shown)} of {len(found.episodes)} episodes; one of them: --episode ID", style="dim")
    return Group(table, foot, *_problems(found))


def _place(episode: Episode) -> str:
    if episode.source != "train":
        return episode.source
    if episode.trained_at is not None:
        return f"step {episode.trained_at}"
    return "dropped" if episode.dropped else "queued"


def _status(episode: Episode) -> Text:
    if episode.dropped:
        return _cut(episode.dropped, "yellow")
    return _cut(str(episode.status), "" if episode.status is Status.FINISHED else "yellow")


def _cut(text: str, style: str = "") -> Text:
    """Text that is cut with an ellipsis where there is no room."""
    return Text(text, style=style, no_wrap=True, overflow="ellipsis")


def _reward(reward: float | None) -> Text:
    if reward is None:
        return Text("none", style="yellow")
    return Text(f"{reward:.2f}", style="green" if reward >= 1.0 - 1e-6 else "red" if reward <= 0 else "")


def _versions(oldest: int | None, newest: int | None) -> str:
    if oldest is None or newest is None:
        return "-"
    return f"v{oldest}" if oldest == newest else f"v{oldest}-{newest}"


def _problems(found: Found) -> list[Text]:
    return [Text(f"warning: {problem}", style="yellow") for problem in found.problems]


# --- one trajectory ---------------------------------------------------------------------------------------------------


def render_trajectory(
    trajectory: Trajectory,
    tokenizer: Tokenizer | None,
    episode: Episode | None = None,
    *,
    logprobs: bool = False,
    max_lag: int | None = None,
) -> RenderableType:
    """One trajectory with every token in the colour of what it is.

    Args:
        trajectory: What to show.
        tokenizer: Turns ids into text; None shows the ids.
        episode: Adds when it was trained, and with ``max_lag`` strikes out the tokens that were masked.
        logprobs: Adds the log-probability of each sampled token behind it.
        max_lag: The run's ``staleness.max_lag``.
    """
    pieces = token_texts(trajectory.tokens.tolist(), tokenizer)
    body: list[RenderableType] = []
    for turn in turns_of(trajectory):
        body += [_turn_head(trajectory, turn), _turn_text(trajectory, turn, pieces, episode, logprobs, max_lag)]
    title = Text.assemble((f" {trajectory.trajectory_id} ", "bold"))
    return Panel(
        Group(_head(trajectory, episode), Text(), *body, Text(), _legend(trajectory, episode, max_lag)),
        title=title,
        title_align="left",
        padding=(0, 1),
    )


def token_texts(tokens: Sequence[int], tokenizer: Tokenizer | None) -> list[str]:
    """The text that each token adds to what stands before it; together they are the decoded whole.

    A character spread over several tokens goes to the last of them.
    """
    if tokenizer is None:
        return [f"{token} " for token in tokens]
    from tokenizers.decoders import DecodeStream

    stream = DecodeStream(skip_special_tokens=False)
    return [stream.step(tokenizer, token) or "" for token in tokens]


def turns_of(trajectory: Trajectory) -> list[Turn]:
    """The recorded turns, or stretches of sampled and other tokens where none were recorded."""
    if trajectory.turns:
        return trajectory.turns
    changes = np.flatnonzero(np.diff(trajectory.trainable.astype(np.int8))) + 1
    edges = [0, *changes.tolist(), len(trajectory)]
    turns = []
    for start, end in pairwise(edges):
        role = "prompt" if start == 0 else "observation"
        if end > start:
            turns.append(Turn(start=start, end=end, role="model" if trajectory.trainable[start] else role))
    return turns


def _head(trajectory: Trajectory, episode: Episode | None) -> Text:
    status = str(trajectory.status) + (f": {trajectory.error}" if trajectory.error else "")
    parts = ", ".join(f"{name} {value:.3g}" for name, value in trajectory.reward_parts.items())
    text = Text.assemble(("reward ", "dim"), _reward(trajectory.reward), (f" ({parts})" if parts else "", "dim"))
    text.append("  status ", style="dim").append(status)
    kind = f"  {trajectory.domain}, difficulty {trajectory.difficulty}" if trajectory.domain else ""
    text.append(f"\ntask {trajectory.task_id}{kind}  group {trajectory.group_id}")
    text.append(f"\n{len(trajectory)} tokens, {trajectory.sampled_tokens} sampled at T={trajectory.temperature:g}")
    if episode is not None:
        text.append(f"  {_trained(episode)}")
    if trajectory.parent:
        text.append(f"\nforked from {trajectory.parent}")
    if trajectory.timings:
        times = ", ".join(f"{name} {seconds:.3f} s" for name, seconds in trajectory.timings.items())
        text.append(f"\n{times}", style="dim")
    return text


def _trained(episode: Episode) -> str:
    if episode.source != "train":
        return episode.source.replace("eval", "evaluation at step")
    if episode.dropped:
        return f"dropped: {episode.dropped}"
    if episode.trained_at is None:
        return "not trained yet"
    return f"trained at version {episode.trained_at}" + (
        f", lag up to {episode.lag}" if episode.lag is not None else ""
    )


def _turn_head(trajectory: Trajectory, turn: Turn) -> Text:
    label = f"{turn.role}"
    if turn.role == "model":
        versions = sampled_versions(trajectory, turn.start, turn.end)
        label += f" {_versions(min(versions), max(versions))}" if versions else ""
    seconds = f"  {turn.ended_at - turn.began_at:.3f} s" if turn.ended_at > turn.began_at else ""
    return Text(f"── {label}{seconds}", style="dim")


def sampled_versions(trajectory: Trajectory, start: int, end: int) -> list[int]:
    """The distinct versions that sampled tokens ``start:end``, oldest first."""
    versions = np.unique(trajectory.versions[start:end])
    return [int(version) for version in versions if version != NOT_SAMPLED]


def _turn_text(
    trajectory: Trajectory, turn: Turn, pieces: list[str], episode: Episode | None, logprobs: bool, max_lag: int | None
) -> Text:
    text = Text()
    previous: int | None = None
    for index in range(turn.start, turn.end):
        version = int(trajectory.versions[index])
        piece = pieces[index].lstrip(" ") if index == turn.start else pieces[index]
        if version == NOT_SAMPLED:
            text.append(piece, style=ROLE_STYLES.get(turn.role, ""))
            continue
        if previous not in (None, version):
            # The switch is also written out: colours alone are lost in a log or a plain terminal.
            text.append(f"⟨v{version}⟩", style="dim")
        previous = version
        text.append(piece, style=_token_style(trajectory, version, episode, max_lag))
        if logprobs:
            text.append(f"({trajectory.logprobs[index]:.2f})", style="dim")
    return text


def _token_style(trajectory: Trajectory, version: int, episode: Episode | None, max_lag: int | None) -> str:
    if is_masked(version, episode, max_lag):
        return MASKED_STYLE
    newest = int(trajectory.versions.max())
    return VERSION_STYLES[(newest - version) % len(VERSION_STYLES)]


def is_masked(version: int, episode: Episode | None, max_lag: int | None) -> bool:
    """Whether a token of ``version`` was too old to carry loss when its episode was trained."""
    if episode is None or episode.trained_at is None or max_lag is None:
        return False
    return episode.trained_at - version > max_lag


def _legend(trajectory: Trajectory, episode: Episode | None, max_lag: int | None) -> Text:
    text = Text.assemble(("prompt ", ROLE_STYLES["prompt"]), ("observation ", ROLE_STYLES["observation"]))
    for version in reversed(sampled_versions(trajectory, 0, len(trajectory))):
        masked = " masked" if is_masked(version, episode, max_lag) else ""
        text.append(f"sampled by v{version}{masked} ", style=_token_style(trajectory, version, episode, max_lag))
    return text


# --- the command ------------------------------------------------------------------------------------------------------


def find_tokenizer(run: RunDirectory) -> Tokenizer | None:
    """The tokenizer of the run's model, from its checkpoints, its recipe or ``model.path``; None when there is none."""
    from tokenizers import Tokenizer

    checkpoints = sorted(run.checkpoints.glob("step-*"), reverse=True)
    path = run_setting(run, "model", "path")
    for directory in (run.model, *checkpoints, *([Path(path)] if isinstance(path, str) else [])):
        file = directory / "tokenizer.json"
        if file.is_file():
            return Tokenizer.from_file(str(file))
    return None


def run_setting(run: RunDirectory, section: str, name: str) -> object:
    """One value of the run's written config, or None."""
    import yaml

    try:
        config = yaml.safe_load(run.config.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise RunDirectoryError(f"{run.config} cannot be read: {error}") from error
    part = config.get(section) if isinstance(config, dict) else None
    return part.get(name) if isinstance(part, dict) else None


def render_episode(run: RunDirectory, episode: Episode, *, logprobs: bool = False) -> Iterator[RenderableType]:
    """All trajectories of one episode.

    Raises:
        ShowError: The episode was given up and left no trajectory, or its record is damaged.
    """
    try:
        trajectories = load_trajectories(episode)
    except (JournalError, WireFormatError) as error:
        raise ShowError(f"episode {episode.episode_id} cannot be read: {error}") from error
    if not trajectories:
        raise ShowError(f"episode {episode.episode_id} was given up ({episode.dropped}); it left no trajectory")
    max_lag = run_setting(run, "staleness", "max_lag")
    tokenizer = find_tokenizer(run)
    for trajectory in trajectories:
        yield render_trajectory(
            trajectory, tokenizer, episode, logprobs=logprobs, max_lag=max_lag if isinstance(max_lag, int) else None
        )


def show(
    path: str, selection: Selection, console: Console, *, sort: str = "newest", last: int = 20, logprobs: bool = False
) -> None:
    """Print the selected episodes of the run at ``path``: a table, or the whole episode when one is named.

    Raises:
        RunDirectoryError: ``path`` is not a run.
        ShowError: There is nothing to show.
    """
    run = RunDirectory.open(path)
    found = read_episodes(run)
    shown = select(found.episodes, selection, sort=sort, last=last)
    if not shown:
        raise ShowError(_nothing(found, selection))
    if selection.episode is None:
        console.print(render_list(found, shown))
        return
    for part in render_episode(run, shown[-1], logprobs=logprobs):
        console.print(part)
    for problem in _problems(found):
        console.print(problem)


def _nothing(found: Found, selection: Selection) -> str:
    problems = "".join(f"\nwarning: {problem}" for problem in found.problems)
    if not found.episodes:
        return f"the run has no episodes yet (or runs with queue.journal=false){problems}"
    example = found.episodes[-1]
    if selection.episode is not None or selection.group is not None:
        return f"no such episode among {len(found.episodes)}; for example: --episode {example.episode_id}{problems}"
    return f"none of the {len(found.episodes)} episodes matches; leave a condition out{problems}"


def _console() -> Console:
    """Standard output; wide where it is a file or a pipe, so that nothing is cut."""
    console = Console()
    return console if console.is_terminal else Console(width=max(console.width, PIPE_WIDTH))


@click.command("show")
@click.argument("run", type=click.Path())
@click.option("--episode", help="Show this episode token by token.")
@click.option("--group", help="Only the episodes of this group.")
@click.option("--step", type=int, help="Only those trained at this version, or evaluated at this step.")
@click.option("--success/--failed", default=None, help="Only successes, or only the others.")
@click.option("--domain", help="Only this kind of task.")
@click.option("--eval/--train", "evaluations", default=None, help="Only evaluation, or only training episodes.")
@click.option("--sort", type=click.Choice(SORT_KEYS), default="newest", show_default=True)
@click.option("--last", type=click.IntRange(min=1), default=20, show_default=True, help="How many to list.")
@click.option("--logprobs", is_flag=True, help="With --episode: the log-probability behind each sampled token.")
def show_command(
    run: str,
    episode: str | None,
    group: str | None,
    step: int | None,
    success: bool | None,
    domain: str | None,
    evaluations: bool | None,
    sort: str,
    last: int,
    logprobs: bool,
) -> None:
    """List the episodes of RUN, or show one of them in colour."""
    selection = Selection(episode, group, step, success, domain, evaluations)
    try:
        show(run, selection, _console(), sort=sort, last=last, logprobs=logprobs)
    except (RunDirectoryError, ShowError) as error:
        raise click.ClickException(str(error)) from error
