"""The verdict on a run in sentences, and numbers as people read them. Pure."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from orchestrator.report.facts import Facts
from orchestrator.report.journals import Survey

SHORT_LEVEL = 0.1
"""A share of tokens wasted or masked above this is worth a warning."""


@dataclass(frozen=True)
class Sentence:
    """``tone`` is ``good``, ``plain``, ``warn`` or ``bad``."""

    tone: str
    text: str


def duration(seconds: float | None) -> str:
    """``3 min 23 s``."""
    if seconds is None:
        return "unknown"
    if seconds < 10:
        return f"{seconds:.2f} s"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min"


def moment(at: float | None) -> str:
    """``2026-01-31 13:05:00 UTC``."""
    return "unknown" if at is None else time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(at))


def percent(part: float, whole: float = 1.0) -> str:
    """``12.5 %``, also of nothing."""
    if not whole:
        return "0 %"
    share = 100.0 * part / whole
    return (
        f"{share:.0f} %" if share == round(share) or share >= 99.95 else f"{share:.1f} %" if share >= 0.1 else "< 0.1 %"
    )


def number(value: float | None) -> str:
    """``1,234`` or ``0.123``."""
    if value is None:
        return "-"
    if float(value).is_integer():
        return f"{int(value):,}"
    return f"{value:,.1f}" if abs(value) >= 100 else f"{value:.3g}"


def verdict(facts: Facts, survey: Survey) -> list[Sentence]:
    """What happened, most important first."""
    return [
        _outcome(facts),
        *_learning(facts),
        *_staleness(facts, survey),
        *_waste(survey),
        *_length_bias(facts, survey),
        *_trouble(facts, survey),
    ]


def _outcome(facts: Facts) -> Sentence:
    planned = facts.steps_planned
    steps = f"{facts.steps_done} of {planned} steps" if planned else f"{facts.steps_done} steps"
    took = duration(facts.wall_s)
    error = str((facts.summary or {}).get("error") or "")
    again = f"; `millrace resume {facts.path}` continues it" if planned and facts.steps_done < planned else ""
    if facts.status == "finished":
        return Sentence("good", f"The run finished: {steps} in {took}.")
    if facts.status == "running":
        return Sentence("plain", f"The run is still going: {steps} so far, {took} after its start.")
    if facts.status == "killed":
        last = moment(facts.last_sign_at)
        return Sentence(
            "bad", f"The run ended without a word after {steps}: it was killed (last sign of life {last}){again}."
        )
    return Sentence(
        "bad", f"The run ended as {facts.status} after {steps} in {took}{': ' + error if error else ''}{again}."
    )


def _learning(facts: Facts) -> list[Sentence]:
    scales = facts.scales
    if scales:
        told = " and ".join(f"{name.replace('_', ' ')} {number(scale)}" for name, scale in scales.items())
        text = f"Engines are modelled, with {told}: seconds here are those of the clock, and rewards say nothing of learning."
        return [Sentence("plain", text)]
    evaluations = facts.evaluations
    if len(evaluations) > 1:
        first, last = evaluations[0], evaluations[-1]
        change = last["success"] - first["success"]
        verb = "rose" if change > 0.02 else "fell" if change < -0.02 else "hardly moved,"
        text = (
            f"Success on held-out tasks {verb} from {first['success']:.3f} at step {first['step']} to {last['success']:.3f} at step "
            f"{last['step']} ({last.get('tasks', '?')} tasks)."
        )
        return [Sentence("good" if change > 0.02 else "bad" if change < -0.02 else "warn", text)]
    rewards = [float(line["reward/mean"]) for line in facts.metrics if line.get("reward/mean") is not None]
    if len(rewards) < 4:
        return []
    tenth = max(1, len(rewards) // 10)
    before, after = sum(rewards[:tenth]) / tenth, sum(rewards[-tenth:]) / tenth
    return [
        Sentence(
            "good" if after > before else "warn",
            f"Mean reward of training episodes went from {before:.3f} (first tenth of the steps) to {after:.3f} (last tenth).",
        )
    ]


def _staleness(facts: Facts, survey: Survey) -> list[Sentence]:
    bound = facts.max_lag
    if not survey.lags or bound is None:
        return []
    tokens = survey.lags.total()
    mean = sum(lag * count for lag, count in survey.lags.items()) / tokens
    oldest = max(survey.lags)
    masked = sum(count for lag, count in survey.lags.items() if lag > bound)
    text = f"Tokens were {mean:.2f} versions old on average when their group was trained, {oldest} at most; the bound is {bound}"
    if not masked:
        return [Sentence("good", f"{text}, so that none was masked.")]
    return [
        Sentence(
            "warn" if masked > SHORT_LEVEL * tokens else "plain",
            f"{text}. The {percent(masked, tokens)} beyond it served as context and carried no loss.",
        )
    ]


def _waste(survey: Survey) -> list[Sentence]:
    generated, wasted = survey.generated_tokens, survey.wasted_tokens.total()
    if not generated:
        return []
    if not wasted:
        return [Sentence("good", "No generated token was thrown away.")]
    reasons = ", ".join(
        f"{reason} {percent(tokens, generated)}" for reason, tokens in survey.wasted_tokens.most_common(4)
    )
    tone = "warn" if wasted > SHORT_LEVEL * generated else "plain"
    return [Sentence(tone, f"{percent(wasted, generated)} of the generated tokens were thrown away ({reasons}).")]


def _length_bias(facts: Facts, survey: Survey) -> list[Sentence]:
    if not survey.trained_lengths:
        return []
    distance = survey.length_distance
    tone = "good" if distance < 0.05 else "warn"
    bias = (
        "training saw the lengths that were generated"
        if distance < 0.05
        else "training saw other lengths than were generated"
    )
    return [
        Sentence(tone, f"The Kolmogorov-Smirnov distance of lengths generated and trained is {distance:.3f}: {bias}.")
    ]


def _trouble(facts: Facts, survey: Survey) -> list[Sentence]:
    sentences = []
    failed = survey.given_up.total()
    if failed:
        reasons = ", ".join(f"{reason} {count}" for reason, count in survey.given_up.most_common(4))
        sentences.append(Sentence("warn", f"{_many(failed, 'episode')} given up ({reasons})."))
    replaced = (facts.summary or {}).get("actors_replaced")
    if replaced:
        sentences.append(Sentence("warn", f"{_many(replaced, 'actor')} died or got stuck, replaced by new ones."))
    stalls: list[Any] = (facts.summary or {}).get("stalls") or []
    if stalls:
        sentences.append(Sentence("warn", f"The watchdog noticed {_many(len(stalls), 'stall')}; see below."))
    if len(facts.attempts) > 1:
        sentences.append(Sentence("plain", f"The run was started {len(facts.attempts)} times (resumed)."))
    return sentences


def _many(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count:,} {what}s"
