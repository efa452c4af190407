"""The figures of the report as plain data for plotly: traces and layout. The page's script adds the colours of the theme.

Texts that come from the run (domains, reasons, names of lanes) pass through `label`: plotly reads a little HTML.
"""

from __future__ import annotations

import html
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from orchestrator.report.facts import Facts
from orchestrator.report.journals import Survey
from orchestrator.report.words import number, percent

BLUE, GREEN, ORANGE, GREY, RED, PURPLE = "#2f74d0", "#2f9e63", "#e8973a", "#8d98a3", "#d8434e", "#8567d6"
POINTS = 500
"""Longest curve that is drawn; of a longer one the means of stretches."""


@dataclass(frozen=True)
class Figure:
    """``alt`` is the figure in a sentence; ``height`` in pixels."""

    name: str
    title: str
    alt: str
    data: list[dict[str, Any]]
    layout: dict[str, Any]
    height: int = 300
    note: str = ""


def label(text: object) -> str:
    """Text as plotly shows it unchanged."""
    return html.escape(str(text), quote=False)


def vertical(at: float, dash: str = "solid") -> dict[str, Any]:
    line = {"dash": dash, "width": 1.5, "color": RED}
    return {"type": "line", "x0": at, "x1": at, "y0": 0, "y1": 1, "yref": "paper", "line": line}


# --- lag and lengths --------------------------------------------------------------------------------------------------


def lag_histogram(survey: Survey, max_lag: int | None) -> Figure | None:
    """Share of sampled tokens of trained groups by lag, the bound marked."""
    if not survey.lags:
        return None
    total = survey.lags.total()
    bound = math.inf if max_lag is None else max_lag
    largest = max(max(survey.lags), 0 if max_lag is None else max_lag)
    lags = list(range(min(0, *survey.lags), largest + 1))
    shares = [100 * survey.lags[lag] / total for lag in lags]
    young, old = [], []
    for lag, share in zip(lags, shares, strict=True):
        young.append(share if lag <= bound else 0.0)
        old.append(share if lag > bound else 0.0)
    data = [_bar("trained", lags, young, GREEN), *([_bar("masked", lags, old, GREY)] if any(old) else [])]
    layout: dict[str, Any] = {
        "barmode": "stack",
        "legend": {"traceorder": "normal"},
        "xaxis": {"title": {"text": "lag: versions between sampling and training"}, "dtick": max(1, len(lags) // 12)},
        "yaxis": {"title": {"text": "% of sampled tokens"}, "rangemode": "tozero"},
    }
    if max_lag is not None:
        data.append(_bound([max_lag + 0.5] * 2, [0, max(shares)], max_lag))
    common = survey.lags.most_common(1)[0][0]
    masked = sum(count for lag, count in survey.lags.items() if lag > bound)
    alt = (
        f"Lag of {total:,} tokens: most often {common}, at most {max(survey.lags)}"
        + ("" if max_lag is None else f", bound {max_lag}, {percent(masked, total)} masked")
        + "."
    )
    return Figure("lag", "Lag of tokens against the bound", alt, data, layout)


def _bound(x: list[float], y: list[float], max_lag: int) -> dict[str, Any]:
    line = {"dash": "dash", "width": 1.5, "color": RED}
    return {
        "type": "scatter",
        "mode": "lines",
        "name": f"bound {max_lag}",
        "x": x,
        "y": y,
        "line": line,
        "hoverinfo": "skip",
    }


def _bar(name: str, x: Sequence[Any], y: Sequence[float], colour: str) -> dict[str, Any]:
    hover = "lag %{x}: %{y:.2f} %<extra>" + name + "</extra>"
    values = [round(value, 4) for value in y]
    return {"type": "bar", "name": name, "x": list(x), "y": values, "marker": {"color": colour}, "hovertemplate": hover}


def lengths(survey: Survey) -> Figure | None:
    """Lengths of finished and trained episodes, as shares of each."""
    if not survey.finished_lengths:
        return None
    edges = _bins(survey.finished_lengths)
    middles = ((edges[:-1] + edges[1:]) / 2).tolist()
    data = []
    for name, histogram, colour in (
        ("generated", survey.finished_lengths, BLUE),
        ("trained", survey.trained_lengths, GREEN),
    ):
        if not histogram:
            continue
        values = np.fromiter(histogram, dtype=np.float64)
        weights = np.fromiter(histogram.values(), dtype=np.float64)
        shares = 100 * np.histogram(values, bins=edges, weights=weights)[0] / weights.sum()
        data.append(
            {
                "type": "scatter",
                "mode": "lines",
                "name": name,
                "x": [round(x, 2) for x in middles],
                "y": [round(float(share), 3) for share in shares],
                "line": {
                    "shape": "hvh",
                    "color": colour,
                    "width": 2,
                    "dash": "solid" if name == "generated" else "dot",
                },
                "fill": "tozeroy" if name == "generated" else "none",
                "hovertemplate": "%{x:.0f} tokens: %{y:.2f} %",
            }
        )
    layout: dict[str, Any] = {
        "xaxis": {"title": {"text": "sampled tokens of an episode"}},
        "yaxis": {"title": {"text": "% of episodes"}, "rangemode": "tozero"},
    }
    if edges[-1] > 40 * max(edges[0], 1.0):
        layout["xaxis"]["type"] = "log"
    alt = (
        f"Lengths: {survey.finished_lengths.total():,} episodes generated, {survey.trained_lengths.total():,} trained, median "
        f"{number(_median(survey.finished_lengths))} and {number(_median(survey.trained_lengths))} tokens, "
        f"Kolmogorov-Smirnov distance {survey.length_distance:.3f}."
    )
    return Figure("lengths", "Lengths generated and trained", alt, data, layout)


def _bins(histogram: Counter[int]) -> Any:
    low, high = min(histogram), max(histogram)
    if high - low <= 40:
        return np.arange(low - 0.5, high + 1.5)
    if high > 40 * max(low, 1):
        return np.unique(np.geomspace(max(low, 1) - 0.5, high + 0.5, 41))
    return np.linspace(low - 0.5, high + 0.5, 41)


def _median(histogram: Counter[int]) -> float | None:
    if not histogram:
        return None
    reached, half = 0, histogram.total() / 2
    for value in sorted(histogram):
        reached += histogram[value]
        if reached >= half:
            return float(value)
    return None


# --- curves -----------------------------------------------------------------------------------------------------------


def curves(facts: Facts) -> list[Figure]:
    """Numbers of each step: reward and success, entropy, importance weights, throughput."""
    found = [_reward(facts), _entropy(facts), _off_policy(facts), _throughput(facts)]
    return [figure for figure in found if figure is not None]


def series(facts: Facts, key: str) -> tuple[list[float], list[float]]:
    """Steps and values of a metric, thinned to ``POINTS`` by the means of stretches."""
    pairs = [(float(line["step"]), float(line[key])) for line in facts.metrics if _is_number(line.get(key))]
    if not pairs:
        return [], []
    parts = np.array_split(np.array(pairs), min(POINTS, len(pairs)))
    means = [part.mean(axis=0) for part in parts]
    return [round(float(mean[0]), 1) for mean in means], [float(f"{mean[1]:.5g}") for mean in means]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _line(facts: Facts, key: str, name: str, colour: str, **more: Any) -> list[dict[str, Any]]:
    x, y = series(facts, key)
    line = {"color": colour, "width": 2, **more.pop("line", {})}
    hover = f"%{{y:.4g}}<extra>{name}</extra>"
    trace = {"type": "scatter", "mode": "lines", "name": name, "x": x, "y": y, "line": line, "hovertemplate": hover}
    return [{**trace, **more}] if x else []


def _smooth(values: Sequence[float], weight: float = 0.85) -> list[float]:
    """Exponential moving average, its beginning corrected for the missing past."""
    smoothed, mean, norm = [], 0.0, 0.0
    for value in values:
        mean, norm = weight * mean + (1 - weight) * value, weight * norm + 1 - weight
        smoothed.append(float(f"{mean / norm:.5g}"))
    return smoothed


def _curve(
    name: str, title: str, data: list[dict[str, Any]], y_title: str, note: str = "", **axis: Any
) -> Figure | None:
    if not data:
        return None
    ends = "; ".join(
        f"{trace['name']} {number(trace['y'][0])} at first, {number(trace['y'][-1])} at last" for trace in data
    )
    layout: dict[str, Any] = {
        "xaxis": {"title": {"text": "learner step"}},
        "yaxis": {"title": {"text": y_title}, **axis},
        "hovermode": "x unified",
    }
    return Figure(name, title, f"{title} by learner step: {ends}.", data, layout, note=note)


def _reward(facts: Facts) -> Figure | None:
    data = _line(facts, "reward/mean", "reward, each step", BLUE, opacity=0.3, line={"width": 1})
    for trace in list(data):
        smooth = {**trace, "name": "reward, smoothed", "y": _smooth(trace["y"]), "opacity": 1.0}
        smooth |= {"line": {"color": BLUE, "width": 2.5}, "hovertemplate": "%{y:.4g}<extra>reward, smoothed</extra>"}
        data.append(smooth)
    if facts.evaluations:
        x = [result["step"] for result in facts.evaluations]
        y = [result["success"] for result in facts.evaluations]
        data.append(
            {
                "type": "scatter",
                "mode": "lines+markers",
                "name": "success on held-out tasks",
                "x": x,
                "y": y,
                "marker": {"size": 8, "color": ORANGE},
                "line": {"color": ORANGE, "width": 2, "dash": "dot"},
                "hovertemplate": "%{y:.3f}<extra>held-out success</extra>",
            }
        )
    return _curve("reward", "Reward and success", data, "reward, success")


def _entropy(facts: Facts) -> Figure | None:
    data = _line(facts, "entropy", "entropy", PURPLE)
    return _curve("entropy", "Entropy of the policy", data, "nats a token", rangemode="tozero")


def _off_policy(facts: Facts) -> Figure | None:
    data = _line(facts, "correction/ess", "effective sample size", GREEN)
    data += _line(facts, "ratio/clip_fraction", "clipped share", RED)
    return _curve("weights", "Importance weights", data, "share of tokens", rangemode="tozero")


def lag_by_step(facts: Facts) -> Figure | None:
    """Mean and largest lag of each step's trained tokens, and the bound."""
    data = _line(facts, "lag/mean", "mean lag", BLUE) + _line(facts, "lag/max", "largest lag trained", GREY)
    figure = _curve("lag-by-step", "Lag", data, "versions", rangemode="tozero")
    if figure is not None and facts.max_lag is not None:
        steps = figure.data[0]["x"]
        figure.data.append(_bound([steps[0], steps[-1]], [facts.max_lag] * 2, facts.max_lag))
    return figure


def _throughput(facts: Facts) -> Figure | None:
    data = _line(facts, "throughput/tokens_per_s", "sampled tokens/s", BLUE)
    seconds = _line(facts, "time/step_s", "seconds a step", ORANGE, yaxis="y2", line={"width": 1.5})
    figure = _curve("throughput", "Throughput", data + seconds, "tokens/s", rangemode="tozero")
    if figure is not None and seconds:
        second = {
            "title": {"text": "seconds a step"},
            "overlaying": "y",
            "side": "right",
            "rangemode": "tozero",
            "tickmode": "auto",
        }
        figure.layout["yaxis2"] = {**second, "showgrid": False}
    return figure


# --- ledger -----------------------------------------------------------------------------------------------------------


def ledger(survey: Survey) -> Figure | None:
    """Where the dispatched groups and the generated tokens went, as shares."""
    if not survey.dispatched:
        return None
    groups = {"trained": survey.trained, "masked": 0, **_dropped(survey.dropped), "live": survey.live}
    tokens = {
        "trained": survey.trained_tokens,
        "masked": survey.masked_tokens,
        **_dropped(survey.wasted_tokens),
        "live": survey.live_tokens,
    }
    names = [name for name in {**groups, **tokens} if name != "live"] + ["live"]
    data = []
    for position, name in enumerate(names):
        counts = [tokens.get(name, 0), groups.get(name, 0)]
        if not any(counts):
            continue
        wholes = [max(1, sum(tokens.values())), max(1, sum(groups.values()))]
        shares = [100 * count / whole for count, whole in zip(counts, wholes, strict=True)]
        data.append(
            {
                "type": "bar",
                "orientation": "h",
                "name": label(name),
                "y": ["tokens", "groups"],
                "x": [round(share, 3) for share in shares],
                "marker": {"color": _ledger_colour(name, position)},
                "text": [
                    percent(count, whole) if share >= 6 else ""
                    for count, whole, share in zip(counts, wholes, shares, strict=True)
                ],
                "textposition": "inside",
                "insidetextanchor": "middle",
                "customdata": counts,
                "hovertemplate": "%{customdata:,} %{y}, %{x:.2f} %<extra>" + label(name) + "</extra>",
            }
        )
    layout = {
        "barmode": "stack",
        "legend": {"traceorder": "normal"},
        "xaxis": {"title": {"text": "%"}, "range": [0, 100]},
        "yaxis": {"showgrid": False},
    }
    alt = (
        f"Ledger: {survey.dispatched:,} groups dispatched, {survey.trained:,} trained, {survey.dropped.total():,} dropped, "
        f"{survey.live:,} live; {survey.generated_tokens:,} tokens generated, {survey.trained_tokens:,} trained, "
        f"{survey.masked_tokens:,} masked, {survey.wasted_tokens.total():,} wasted."
    )
    return Figure("ledger", "Where groups and tokens went", alt, data, layout, 220)


def _dropped(reasons: Counter[str]) -> dict[str, int]:
    return {f"dropped: {reason}" if reason != "late" else "late": count for reason, count in reasons.items()}


def _ledger_colour(name: str, position: int) -> str:
    fixed = {"trained": GREEN, "masked": GREY, "live": BLUE}
    return fixed.get(name, (RED, ORANGE, PURPLE, "#7d1128", "#a08d6f")[position % 5])
