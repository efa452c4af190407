"""Reading the metrics page of a server (Prometheus text format)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from prometheus_client.parser import text_string_to_metric_families

from rollout_workers.engines.servers.adapter import ServerAnswerError
from rollout_workers.engines.servers.event_stream import shown


def samples(body: bytes) -> dict[str, float]:
    """The value of each metric, summed over its labels (histograms by their ``_sum`` and ``_count``).

    Raises ServerAnswerError for a page that is no metrics page.
    """
    values: dict[str, float] = {}
    try:
        for family in text_string_to_metric_families(body.decode()):
            for sample in family.samples:
                values[sample.name] = values.get(sample.name, 0.0) + sample.value
    except (ValueError, IndexError, KeyError) as error:  # what the library makes of pages that are none
        raise ServerAnswerError(f"no metrics page ({error}): {shown(body)}") from None
    return values


def first(values: Mapping[str, float], names: Iterable[str]) -> float:
    """The first of these metrics that the page has, else 0 (servers rename them)."""
    return next((values[name] for name in names if name in values), 0.0)
