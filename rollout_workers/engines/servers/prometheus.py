"""Reading the metrics page of a server (Prometheus text format)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from rollout_workers.engines.servers.adapter import ServerAnswerError

_SAMPLE = re.compile(r"^([a-zA-Z_:][a-zA-Z0-9_:]*)(?:\{(.*)\})?\s+(\S+)(?:\s+-?\d+)?$")


def samples(body: bytes) -> dict[str, float]:
    """The value of each metric, summed over its labels (histograms by their ``_sum`` and ``_count``).

    Raises ServerAnswerError for a page that is no metrics page.
    """
    try:
        text = body.decode()
    except UnicodeDecodeError as error:
        raise ServerAnswerError(f"the metrics page is no text: {error}") from None
    values: dict[str, float] = {}
    for line in text.splitlines():
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        match = _SAMPLE.match(line)
        if match is None:
            raise ServerAnswerError(f"no line of a metrics page: {line[:120]!r}")
        name, _, value = match.groups()
        try:
            values[name] = values.get(name, 0.0) + float(value)
        except ValueError:
            raise ServerAnswerError(f"metric {name} has no number: {value[:40]!r}") from None
    return values


def first(values: Mapping[str, float], names: Iterable[str]) -> float:
    """The first of these metrics that the page has, else 0 (servers rename them)."""
    return next((values[name] for name in names if name in values), 0.0)
