"""Table and figure of ``millrace bench pd``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.table import Table

from benchmarks.pd.measure import PdRow

TABLE_WIDTH = 190
COLOURS = ("#4477aa", "#66ccee", "#228833", "#ccbb44", "#ee6677", "#aa3377", "#bbbbbb", "#222222")


def table_of(case: str, rows: Sequence[PdRow]) -> Table:
    """A line for each layout of the engines."""
    table = Table(title=case, title_justify="left", title_style="bold", box=None, padding=(0, 1, 0, 0))
    names = ("engines", "step s", "tokens/s", "first token s p50/p99", "between tokens ms p50/p99", "seq.", "prompts")
    more = ("idle", "prefix", "KV run/susp", "evicted", "prefill/decode busy", "flips")
    for name in names + more:
        table.add_column(name, justify="left" if name == "engines" else "right", no_wrap=True)
    for row in rows:
        split = row.split
        table.add_row(
            row.layout,
            f"{row.step_s:.1f}",
            f"{row.tokens_per_s:,.0f}",
            f"{row.first_token_p50_s:.2f} / {row.first_token_p99_s:.2f}",
            f"{row.inter_token_p50_ms:.1f} / {row.inter_token_p99_ms:.1f}",
            f"{row.decoding:.1f}",
            f"{row.prompt_share:.0%}",
            f"{row.idle:.0%}",
            f"{row.prefix_hit:.0%}",
            f"{row.kv_running:.0%} / {row.kv_suspended:.0%}",
            f"{row.evicted_per_sampled:.2f}",
            f"{split.prefill_busy:.0%} / {split.decode_busy:.0%}" if split else "",
            f"{split.flips} ({split.roles})" if split and row.layout.startswith("auto") else "",
        )
    return table


def figure_of(rows: Sequence[PdRow]) -> Any:
    """Step time over the mixed layout's, slowest tokens and first tokens, by case and layout."""
    from matplotlib.figure import Figure

    cases = list(dict.fromkeys(row.case for row in rows))
    layouts = list(dict.fromkeys(row.layout for row in rows))
    figure = Figure(figsize=(max(7.0, 1.6 * len(cases)), 8.5))
    panels = figure.subplots(3, 1, sharex=True)
    width = 0.8 / len(layouts)
    for place, layout in enumerate(layouts):
        found = {row.case: row for row in rows if row.layout == layout}
        at = [index + (place - (len(layouts) - 1) / 2) * width for index, case in enumerate(cases) if case in found]
        shown = [found[case] for case in cases if case in found]
        mixed = {row.case: row.step_s for row in rows if row.split is None}
        values = (
            [row.step_s / mixed.get(row.case, row.step_s) for row in shown],
            [row.inter_token_p99_ms for row in shown],
            [row.first_token_p99_s for row in shown],
        )
        for panel, heights in zip(panels, values, strict=True):
            panel.bar(at, heights, width, label=layout, color=COLOURS[place % len(COLOURS)])
    for panel, label in zip(panels, ("step, of mixed", "between tokens p99, ms", "first token p99, s"), strict=True):
        panel.set_ylabel(label)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].axhline(1.0, color="black", linewidth=0.8)
    for panel in panels[1:]:
        panel.set_yscale("log")
    panels[-1].set_xticks(range(len(cases)), [case.replace(", ", ",\n") for case in cases])
    panels[0].legend(frameon=False, fontsize=7, ncols=min(4, len(layouts)))
    figure.tight_layout()
    return figure
