"""The report as one HTML file: everything inlined, nothing fetched, every text of the run escaped."""

from __future__ import annotations

import base64
import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from experience.accounting import Cause
from orchestrator.report import figures
from orchestrator.report.embedded import Embedded
from orchestrator.report.facts import Facts
from orchestrator.report.journals import Survey
from orchestrator.report.picks import Picked
from orchestrator.report.timeline import Timeline
from orchestrator.report.utilisation import COLOURS, cause_table, utilisation
from orchestrator.report.words import duration, moment, number, percent, verdict

MAX_DOMAINS = 12
MAX_PROBLEMS = 30
MAX_FLEET_EVENTS = 60
STARTING = ("starting", "loading", "serving")
"""What happens to every engine."""
SECTIONS = (
    ("verdict", "Verdict"),
    ("time", "Time"),
    ("learning", "Learning"),
    ("staleness", "Staleness and waste"),
    ("slowest", "Slowest episodes"),
    ("trajectories", "Trajectories"),
    ("logs", "Log warnings"),
    ("run", "Configuration"),
)
TONES = {"good": "good", "plain": "note", "warn": "warning", "bad": "problem"}


@dataclass(frozen=True)
class Content:
    """All that the page tells."""

    facts: Facts
    survey: Survey
    timeline: Timeline | None
    embedded: Embedded
    idle_words: Sequence[str]
    """Where the idle time went, a paragraph each."""


def render(content: Content) -> str:
    """The whole page."""
    facts, survey = content.facts, content.survey
    picture = None if content.timeline is None else utilisation(content.timeline)
    curves = figures.curves(facts)
    candidates = (
        figures.lag_histogram(survey, facts.max_lag),
        figures.lag_by_step(facts),
        figures.lengths(survey),
        figures.ledger(survey),
    )
    data_figures = [figure for figure in candidates if figure is not None]
    shown = [figure for figure in (picture, *curves, *data_figures) if figure is not None]
    plotly, script = _plotly(), _asset("report.js")
    data = {
        "figures": {figure.name: {"data": figure.data, "layout": figure.layout} for figure in shown},
        "trajectories": content.embedded.items,
        "max_lag": facts.max_lag,
    }
    page: str = _template().render(
        policy=content_policy(plotly, script),
        style=Markup(_asset("report.css")),
        plotly=Markup(plotly),
        script=Markup(script),
        data=Markup(json_for_html(data)),
        facts=facts,
        badges=_badges(facts),
        sections=SECTIONS,
        verdict=verdict(facts, survey),
        tones=TONES,
        tiles=_tiles(facts, survey),
        problems=_problems(content),
        utilisation=picture,
        legend=_legend(content.timeline),
        causes=cause_table(content.timeline, facts.accounts),
        idle_words=content.idle_words,
        fleet=_fleet(facts.fleet),
        stalls=_stalls((facts.summary or {}).get("stalls") or []),
        curves=curves,
        data_figures=data_figures,
        evaluations=facts.evaluations[-8:],
        domains=_domains(facts.evaluations[-8:]),
        ledger=_ledger(survey),
        slowest=[_slow_row(picked) for picked in survey.slowest],
        browser=content.embedded,
        browser_note=_browser_note(content),
        attempts=[
            {
                "number": attempt.get("attempt", position),
                "at": moment(attempt.get("started_at")),
                "command": attempt.get("command", ""),
            }
            for position, attempt in enumerate(facts.attempts)
        ],
        tables=_tables(facts),
        version=version("millrace"),
        made_at=moment(time.time()),
    )
    return page


# --- safety -----------------------------------------------------------------------------------------------------------


def json_for_html(value: Any) -> str:
    """JSON that may stand inside a ``script`` element: no text in it can end the element or open a comment."""
    text = json.dumps(value, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text.encode("utf-8", "replace").decode("utf-8")


def content_policy(*scripts: str) -> str:
    """A content security policy that runs these scripts only and lets the page fetch nothing."""
    hashes = " ".join(
        f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'" for script in scripts
    )
    return f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data: blob:; font-src data:; base-uri 'none'; form-action 'none'"


def _plotly() -> str:
    from plotly.offline import get_plotlyjs

    return str(get_plotlyjs()).replace("</script", "<\\/script").replace("\r\n", "\n").replace("\r", "\n")


def _asset(name: str) -> str:
    return files("orchestrator.report").joinpath("templates", name).read_text(encoding="utf-8")


def _template() -> Any:
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    return environment.from_string(_asset("report.html.j2"))


# --- parts of the page ------------------------------------------------------------------------------------------------


def _badges(facts: Facts) -> list[str]:
    found = {
        "mode": facts.config.get("mode"),
        "seed": facts.config.get("seed"),
        "environment": facts.setting("tasks", "environment"),
        "engines": facts.setting("engines", "kind"),
        "steps": facts.steps_done,
    }
    scales = [f"{name.replace('_', ' ')} {number(scale)}" for name, scale in facts.scales.items()]
    return [f"{name} {value}" for name, value in found.items() if value is not None] + scales


def _tiles(facts: Facts, survey: Survey) -> list[dict[str, str]]:
    """The numbers of `summary.json` where it is there, else those of the journal and the metrics."""
    summary: Mapping[str, Any] = facts.summary or {}
    tokens: Mapping[str, Any] = summary.get("tokens") or {
        "generated": survey.generated_tokens,
        "trained": survey.trained_tokens,
        "masked": survey.masked_tokens,
        "wasted": survey.wasted_tokens.total(),
    }
    tiles = [
        _tile("steps", number(facts.steps_done), f"of {facts.steps_planned}" if facts.steps_planned else ""),
        _tile("wall-clock", duration(facts.wall_s), "of the last attempt" if len(facts.attempts) > 1 else ""),
    ]
    if facts.evaluations:
        before, after = facts.evaluations[0], facts.evaluations[-1]
        note = f"{before['success']:.3f} at step {before['step']}" if after is not before else ""
        tiles.append(_tile("held-out success", f"{after['success']:.3f}", note))
    lag_mean, lag_max = summary.get("lag_mean"), summary.get("lag_max")
    young = {lag: count for lag, count in survey.lags.items() if facts.max_lag is None or lag <= facts.max_lag}
    if lag_mean is None and young:  # as the summary counts it: tokens that carried loss
        lag_mean = sum(lag * count for lag, count in young.items()) / sum(young.values())
        lag_max = max(young)
    if lag_mean is not None:
        tiles.append(_tile("lag, mean", f"{lag_mean:.2f}", f"largest {lag_max}, bound {facts.max_lag}"))
    tiles += [
        _tile("tokens generated", number(tokens.get("generated", 0))),
        _tile("tokens trained", number(tokens.get("trained", 0))),
        _tile("masked", percent(tokens.get("masked", 0), tokens.get("generated", 0))),
        _tile("wasted", percent(tokens.get("wasted", 0), tokens.get("generated", 0))),
    ]
    rates = [line["throughput/tokens_per_s"] for line in facts.metrics if line.get("throughput/tokens_per_s")]
    if rates:
        tiles.append(_tile("tokens/s, median", number(round(sorted(rates)[len(rates) // 2]))))
    return tiles


def _tile(name: str, value: str, note: str = "") -> dict[str, str]:
    return {
        "name": name,
        "value": value,
        "note": note,
        "id": "tile-" + "".join(c if c.isalnum() else "-" for c in name),
    }


def _problems(content: Content) -> list[str]:
    facts, survey = content.facts, content.survey
    found = [*facts.problems, *survey.problems, *content.embedded.problems, *_disagreements(facts, survey)]
    more = len(found) - MAX_PROBLEMS
    return found if more <= 0 else [*found[:MAX_PROBLEMS], f"and {more} more"]


def _disagreements(facts: Facts, survey: Survey) -> list[str]:
    """Where the summary and the journal count differently, which should never be."""
    if facts.summary is None or not survey.dispatched or survey.problems:
        return []
    ledger = facts.summary.get("ledger") or {}
    counted = {"dispatched": survey.dispatched, "trained": survey.trained}
    return [
        f"summary.json counts {ledger[name]} groups {name}, the journal {count}"
        for name, count in counted.items()
        if name in ledger and ledger[name] != count
    ]


def _legend(timeline: Timeline | None) -> list[tuple[str, str]]:
    if timeline is None:
        return []
    used = {cause for seconds in timeline.seconds.values() for cause in seconds}
    return [(cause.value.replace("_", " "), COLOURS[cause]) for cause in Cause if cause in used]


def _stalls(stalls: Sequence[Any]) -> dict[str, Any]:
    """A table of whatever a stall says of itself; empty without stalls."""
    rows = [stall if isinstance(stall, dict) else {"stall": stall} for stall in stalls]
    columns = list(dict.fromkeys(str(name) for row in rows for name in row))
    cells = [
        [moment(row[name]) if name.endswith("_at") and row.get(name) else _cell(row.get(name, "")) for name in columns]
        for row in rows
    ]
    return {"columns": [name.replace("_", " ") for name in columns], "rows": cells} if rows else {}


def _fleet(events: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A table of engines coming and going; empty when they only started."""
    if all(event.get("event") in STARTING for event in events):
        return {}
    rows = [
        [
            moment(event["at"] if isinstance(event.get("at"), int | float) else None),
            str(event.get("engine") or "all"),
            str(event.get("event", "")),
            "" if event.get("version") is None else _cell(event["version"]),
            str(event.get("detail", "")),
        ]
        for event in events
    ]
    return {"columns": ["at", "engine", "is", "version", "why"], "rows": rows[-MAX_FLEET_EVENTS:], "all": len(rows)}


def _cell(value: Any) -> str:
    return number(value) if isinstance(value, int | float) and not isinstance(value, bool) else str(value)


def _domains(evaluations: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[float | None]]]:
    """Success by domain at each evaluation: the domains that changed most first."""
    names = {name for result in evaluations for name in result.get("by_domain") or {}}
    rows = []
    for name in sorted(names):
        values = [((result.get("by_domain") or {}).get(name) or {}).get("success") for result in evaluations]
        known = [value for value in values if value is not None]
        rows.append((abs(known[-1] - known[0]) if known else 0.0, name, values))
    rows.sort(key=lambda row: (-row[0], row[1]))
    return [(name, values) for _, name, values in rows[:MAX_DOMAINS]]


def _ledger(survey: Survey) -> list[dict[str, str]]:
    if not survey.dispatched:
        return []

    def row(name: str, groups: int | None, tokens: int) -> dict[str, str]:
        share = percent(tokens, survey.generated_tokens)
        return {
            "name": name,
            "groups": "" if groups is None else number(groups),
            "tokens": number(tokens),
            "share": share,
        }

    reasons = sorted({*survey.dropped, *survey.wasted_tokens} - {"late"})
    rows = [
        row("dispatched", survey.dispatched, survey.generated_tokens),
        row("trained", survey.trained, survey.trained_tokens),
        row("masked", None, survey.masked_tokens),
        *(row(f"dropped: {reason}", survey.dropped[reason], survey.wasted_tokens[reason]) for reason in reasons),
    ]
    if survey.wasted_tokens["late"]:
        rows.append(row("late", None, survey.wasted_tokens["late"]))
    return [*rows, row("live", survey.live, survey.live_tokens)]


def _slow_row(picked: Picked) -> dict[str, str]:
    episode, timings = picked.episode, picked.timings
    known = timings.get("generate", 0.0) + timings.get("environment", 0.0)
    if episode.dropped is not None:
        fate = f"dropped: {episode.dropped}"
    else:
        fate = "not trained" if episode.trained_at is None else f"trained at version {episode.trained_at}"
    return {
        "episode": episode.episode_id,
        "task": episode.domain or episode.task_id,
        "seconds": f"{picked.seconds:.2f}",
        "generate": f"{timings.get('generate', 0.0):.2f}",
        "environment": f"{timings.get('environment', 0.0):.2f}",
        "other": f"{max(0.0, picked.seconds - known):.2f}",
        "turns": str(picked.turns),
        "tokens": number(episode.tokens),
        "lag": "-" if episode.lag is None else str(episode.lag),
        "fate": fate,
    }


def _browser_note(content: Content) -> str:
    embedded, survey = content.embedded, content.survey
    parts = [
        f"This page carries {len(embedded.items)} trajectories of {survey.episodes:,} finished training episodes and of the first and "
        "last evaluation: the best, worst, slowest, longest and stalest ones, dropped ones, the last ones trained, and some at random."
    ]
    if survey.looked_into < survey.episodes:
        parts.append(
            f"Lags, seconds and the choice come from every {round(survey.episodes / survey.looked_into)}th episode."
        )
    if embedded.left_out:
        parts.append(f"{embedded.left_out} more were chosen but found no room.")
    if embedded.shortened:
        parts.append(f"{embedded.shortened} are shortened in the middle.")
    if not embedded.decoded:
        parts.append("The run's tokenizer was not found: token ids are shown.")
    parts.append("`millrace show` lists them all.")
    return " ".join(parts)


def _tables(facts: Facts) -> list[tuple[str, list[tuple[str, str]]]]:
    tables = []
    machine = (facts.attempts[-1].get("machine") if facts.attempts else None) or (facts.summary or {}).get("machine")
    if isinstance(machine, dict):
        tables.append(("Machine", [(str(name).replace("_", " "), _cell(value)) for name, value in machine.items()]))
    versions = (facts.summary or {}).get("versions")
    if isinstance(versions, dict):
        tables.append(("Versions", [(str(name), str(value)) for name, value in versions.items()]))
    return tables
