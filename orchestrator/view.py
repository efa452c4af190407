"""The live terminal view of a run: :func:`render` is a pure function of a snapshot, :class:`LiveView` shows it.

Where standard output is not a terminal (a file, a CI log), one plain line every few seconds takes its place.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.live import Live
from rich.measure import Measurement
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from orchestrator.snapshot import Snapshot

BARS = "▁▂▃▄▅▆▇█"
MOST_ROWS = 4
"""Replicas of one role that get a line each; more are added up in one line."""
EVENTS_SHOWN = 4
EVALUATIONS_SHOWN = 9
HEALTHY_STATES = ("", "serving", "running", "idle", "alive")


def render(snapshot: Snapshot) -> RenderableType:
    """Everything known of the run at this moment, for a terminal of 80 columns or more."""
    parts: list[RenderableType] = [_progress(snapshot), Text(), _numbers(snapshot), Text(), _roles(snapshot)]
    if snapshot.evals:
        parts += [Rule(style="dim"), _evaluations(snapshot)]
    if snapshot.events:
        parts += [Rule(style="dim"), *(_event(event) for event in snapshot.events[-EVENTS_SHOWN:])]
    if snapshot.error:
        parts += [Rule(style="red"), Text(snapshot.error, style="bold red")]
    colour = {"failed": "red", "finished": "green"}.get(snapshot.phase, "cyan")
    title = Text.assemble((" millrace ", "bold"), (f"{snapshot.run_dir} ", ""), (f"{snapshot.mode} ", "dim"))
    return Panel(Group(*parts), title=title, title_align="left", border_style=colour, padding=(0, 1))


def plain_line(snapshot: Snapshot) -> str:
    """The run in one line of text, for logs."""
    fields = [
        f"{snapshot.phase:<10} step {snapshot.step}/{snapshot.steps}",
        f"v{snapshot.version}",
        f"{duration(snapshot.wall_s)} elapsed",
    ]
    if snapshot.eta_s is not None:
        fields.append(f"{duration(snapshot.eta_s)} left")
    if snapshot.reward_mean is not None:
        fields.append(f"reward {snapshot.reward_mean:.3f}")
    if snapshot.success_rate is not None:
        fields.append(f"success {snapshot.success_rate:.3f}")
    if snapshot.lag_mean is not None:
        fields.append(f"lag {snapshot.lag_mean:.2f} (max {snapshot.lag_max} of {snapshot.max_lag})")
    if snapshot.tokens_per_s is not None:
        fields.append(f"{count(snapshot.tokens_per_s)} tokens/s")
    if snapshot.evals:
        last = snapshot.evals[-1]
        fields.append(f"eval {_share(last.get('success'), 3)} at step {last.get('step')}")
    return ", ".join(fields)


class LiveView:
    """Shows snapshots on a console. Start, update as often as wanted, stop; stopping twice is harmless."""

    def __init__(self, console: Console | None = None, *, plain_every_s: float = 10.0) -> None:
        self._console = console or Console(file=sys.stdout)
        self._plain_every_s = plain_every_s
        self._live: Live | None = None
        self._plain_at: float | None = None
        self._plain_key: tuple[str, int] | None = None
        self._last_events: list[str] = []

    @property
    def console(self) -> Console:
        return self._console

    def start(self) -> None:
        """Take the terminal, if there is one."""
        if self._console.is_terminal and not self._console.is_dumb_terminal:
            self._live = Live(
                console=self._console, auto_refresh=False, vertical_overflow="crop", redirect_stdout=False
            )
            self._live.start()

    def update(self, snapshot: Snapshot, now: float) -> None:
        """Show ``snapshot``. ``now``: seconds of any clock that only goes forward."""
        if self._live is not None:
            self._live.update(render(snapshot), refresh=True)
            return
        for event in new_events(self._last_events, snapshot.events):
            self._plain(event)
        self._last_events = list(snapshot.events)
        key = (snapshot.phase, len(snapshot.evals))
        if self._plain_at is None or now - self._plain_at >= self._plain_every_s or key != self._plain_key:
            self._plain_at, self._plain_key = now, key
            self._plain(plain_line(snapshot))

    def stop(self) -> None:
        """Give the terminal back; the last snapshot stays on it."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _plain(self, line: str) -> None:
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def __enter__(self) -> LiveView:
        self.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        self.stop()


def new_events(before: Sequence[str], after: Sequence[str]) -> list[str]:
    """The events of ``after`` that follow what ``before`` ended with (both are windows on one growing list)."""
    for kept in range(min(len(before), len(after)), 0, -1):
        if list(before[-kept:]) == list(after[:kept]):
            return list(after[kept:])
    return list(after)


# --- parts of the view ------------------------------------------------------------------------------------------------


def _progress(snapshot: Snapshot) -> RenderableType:
    grid = Table.grid(padding=(0, 2), expand=True)
    grid.add_column(no_wrap=True)
    grid.add_column(ratio=1)
    grid.add_column(justify="right", no_wrap=True)
    left = Text.assemble((snapshot.phase, "bold"), f"  step {snapshot.step}/{snapshot.steps}")
    eta = f", {duration(snapshot.eta_s)} left" if snapshot.eta_s is not None else ""
    bar = ProgressBar(total=max(snapshot.steps, 1), completed=snapshot.step)
    grid.add_row(left, bar, f"{duration(snapshot.wall_s)}{eta}  v{snapshot.version}")
    return grid


def _numbers(snapshot: Snapshot) -> RenderableType:
    grid = Table.grid(padding=(0, 2), expand=True)
    for options in ({}, {"justify": "right", "min_width": 6}, {"ratio": 1}, {}, {"justify": "right"}):
        grid.add_column(no_wrap=True, **options)  # type: ignore[arg-type]
    grid.add_row(
        Text("reward", style="dim"),
        _number(snapshot.reward_mean, "{:.3f}"),
        Sparkline(snapshot.reward_history, "yellow"),
        Text("lag", style="dim"),
        _lag(snapshot),
    )
    grid.add_row(
        Text("success", style="dim"),
        _number(snapshot.success_rate, "{:.3f}"),
        Sparkline(snapshot.success_history, "green", low=0.0, high=1.0),
        Text("tokens/s", style="dim"),
        Text.assemble(
            (count(snapshot.tokens_per_s) if snapshot.tokens_per_s is not None else "-", "bold"),
            f"  {snapshot.step_s:.2f} s a step" if snapshot.step_s is not None else "",
        ),
    )
    return grid


def _lag(snapshot: Snapshot) -> Text:
    if snapshot.lag_mean is None or snapshot.lag_max is None:
        return Text("-")
    style = "bold red" if snapshot.lag_max > snapshot.max_lag else "bold"
    return Text.assemble(f"{snapshot.lag_mean:.2f}  max ", (str(snapshot.lag_max), style), f" of {snapshot.max_lag}")


def _roles(snapshot: Snapshot) -> RenderableType:
    table = Table.grid(padding=(0, 2), expand=True)
    table.add_column(no_wrap=True, style="cyan")
    table.add_column(no_wrap=True, max_width=12)
    table.add_column(ratio=1, no_wrap=True, overflow="ellipsis")
    _add_actors(table, "engine", snapshot.engines, _engine_line)
    _add_actors(table, "worker", snapshot.workers, _worker_line)
    _add_actors(table, "environment", snapshot.environments, lambda item: _counts(item, "leases"))
    _add_actors(table, "reward", snapshot.rewards, lambda item: _counts(item, "pending", "scored"))
    if snapshot.queue:
        held = size(snapshot.queue["bytes"]) if "bytes" in snapshot.queue else ""
        table.add_row("queue", held, _queue_line(snapshot.queue))
    if snapshot.learner:
        table.add_row("learner", _learner_state(snapshot.learner), _learner_line(snapshot.learner))
    return table


def _add_actors(
    table: Table, role: str, items: Sequence[dict[str, Any]], line: Callable[[dict[str, Any]], str]
) -> None:
    """A row for each actor of a role, or one row with the totals when there are many."""
    if len(items) <= MOST_ROWS:
        for item in items:
            table.add_row(str(item.get("name", role)), _state(str(item.get("state", ""))), line(item))
        return
    states = sorted({str(item.get("state", "")) for item in items})
    summary = ", ".join(f"{sum(item.get('state', '') == state for item in items)} {state}" for state in states if state)
    table.add_row(f"{role} x{len(items)}", _state(states[0] if len(states) == 1 else summary), line(_total(items)))


def _total(items: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Counts added up; shares averaged; versions as the oldest."""
    total: dict[str, Any] = {}
    for key in {key for item in items for key in item}:
        values = [item[key] for item in items if isinstance(item.get(key), (int, float))]
        if values:
            total[key] = min(values) if key == "version" else sum(values)
            if key == "kv_used":
                total[key] /= len(values)
    return total


def _engine_line(item: dict[str, Any]) -> str:
    fields = [f"v{item['version']}"] if "version" in item else []
    fields.append(f"{item.get('running', 0)} running, {item.get('waiting', 0)} waiting")
    if "kv_used" in item:
        fields.append(f"KV {item['kv_used']:.0%}")
    if item.get("role", "mixed") != "mixed":
        failed = f" ({item['handoffs_failed']} failed)" if item.get("handoffs_failed") else ""
        fields.insert(0, f"{item['role']}, {count(item.get('handoffs', 0))} hand-offs{failed}")
    if item.get("parked_sessions"):
        fields.append(f"{item['parked_sessions']} parked")
    if item.get("tokens_per_s") is not None:
        fields.append(f"{count(item['tokens_per_s'])} tok/s")
    return "  ".join(fields)


def _worker_line(item: dict[str, Any]) -> str:
    if "generating" in item:
        doing = (("generating", "generating"), ("in_environment", "in tools"), ("in_reward", "judged"))
        line = ", ".join(f"{item.get(key, 0)} {words}" for key, words in doing)
    else:
        line = f"{item.get('episodes', 0)} episodes"
    line += f", {count(item.get('finished', 0))} done"
    return line + (f", {item['failed']} failed" if item.get("failed") else "")


def _queue_line(queue: dict[str, Any]) -> str:
    line = f"{queue.get('in_flight', 0)} groups in flight, {queue.get('ready', 0)} ready"
    if queue.get("leased"):
        line += f", {queue['leased']} leased"
    return line + (f"  {queue['dropped']} dropped" if queue.get("dropped") else "")


def _learner_line(learner: dict[str, Any]) -> str:
    fields = []
    if "groups" in learner:
        wanted = f"/{learner['groups_per_update']}" if "groups_per_update" in learner else ""
        fields.append(f"{learner['groups']}{wanted} groups")
    if learner.get("masked") is not None:
        fields.append(f"{learner['masked']:.1%} masked")
    if learner.get("busy") is not None:
        fields.append(f"{learner['busy']:.0%} busy")
    return "  ".join(fields)


def _learner_state(learner: dict[str, Any]) -> Text:
    """Its phase, unless something is wrong with the actor."""
    state = str(learner.get("state", ""))
    return _state(state) if state not in HEALTHY_STATES else Text(str(learner.get("phase", "")), style="green")


def _counts(item: dict[str, Any], *names: str) -> str:
    return ", ".join(f"{count(item[name])} {name}" for name in names if name in item)


def _state(state: str) -> Text:
    return Text(state, style="green" if state in HEALTHY_STATES else "yellow")


def _evaluations(snapshot: Snapshot) -> RenderableType:
    shown = snapshot.evals[-EVALUATIONS_SHOWN:]
    text = Text("held-out success  ", style="dim")
    for item in shown:
        text.append(f"{item.get('step', 0)}:", style="dim")
        text.append(f"{_share(item.get('success'), 2)}  ", style="bold green" if item is shown[-1] else "")
    return text


def _event(event: str) -> Text:
    return Text(f"! {event}", style="yellow", no_wrap=True, overflow="ellipsis")


class Sparkline:
    """A sparkline as wide as the place it gets, at most one column a value."""

    def __init__(self, values: Sequence[float], style: str, *, low: float | None = None, high: float | None = None):
        self._values, self._style, self._low, self._high = values, style, low, high

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Text(sparkline(self._values, options.max_width, low=self._low, high=self._high), style=self._style)

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(min(1, options.max_width), options.max_width)


# --- numbers as text --------------------------------------------------------------------------------------------------


def sparkline(values: Sequence[float], width: int, *, low: float | None = None, high: float | None = None) -> str:
    """``values`` as at most ``width`` bars, each the mean of an equal stretch of them; scaled to ``low``..``high``."""
    if not values:
        return ""
    columns = min(width, len(values))
    edges = [round(index * len(values) / columns) for index in range(columns + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    bottom = min(means) if low is None else low
    span = (max(means) if high is None else high) - bottom
    if span <= 0:
        return BARS[0] * columns
    return "".join(BARS[min(len(BARS) - 1, max(0, int((mean - bottom) / span * len(BARS))))] for mean in means)


def duration(seconds: float) -> str:
    """``75`` as ``1:15``, ``4000`` as ``1:06:40``."""
    whole = max(0, round(seconds))
    hours, rest = divmod(whole, 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"


def count(number: float) -> str:
    """``18234`` as ``18.2k``."""
    for bound, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(number) >= bound:
            return f"{number / (1e3 if unit == 'k' else bound):.1f}{unit}"
    return f"{number:.0f}"


def size(number_of_bytes: float) -> str:
    """Bytes with a binary unit: ``1536`` as ``1.5 KiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(number_of_bytes) < 1024:
            return f"{number_of_bytes:.0f} {unit}" if unit == "B" else f"{number_of_bytes:.1f} {unit}"
        number_of_bytes /= 1024
    return f"{number_of_bytes:.1f} TiB"


def _share(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _number(value: float | None, form: str) -> Text:
    return Text("-" if value is None else form.format(value), style="bold")
