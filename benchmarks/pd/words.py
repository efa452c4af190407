"""Where the split helps and where it hurts, in sentences made from the figures. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.pd.measure import PdRow

NOTABLE = 0.05
"""Differences below this share are not worth a word."""
QUEUES = 0.25
"""Share of its time from which on an engine is busy enough for a queue."""


@dataclass(frozen=True)
class Verdict:
    """A layout against the one whose engines do both."""

    case: str
    layout: str
    step: float
    """Change of the step time: -0.1 is 10 % shorter."""
    helps: list[str]
    hurts: list[str]
    because: list[str]
    """What the figures say about why."""


def best_split(rows: Sequence[PdRow]) -> PdRow | None:
    """The static split with the shortest step."""
    return min((row for row in rows if row.split and not row.layout.startswith("auto")), key=_step_s, default=None)


def verdict_of(mixed: PdRow, split: PdRow) -> Verdict:
    """Compare a split with the mixed layout of the same case."""
    helps: list[str] = []
    hurts: list[str] = []
    for name, before, after, text in _measures(mixed, split):
        change = after / before - 1 if before else 0.0
        if abs(change) >= NOTABLE:
            (helps if change < 0 else hurts).append(f"{name} {change:+.0%} ({text})")
    return Verdict(
        mixed.case, split.layout, split.step_s / mixed.step_s - 1, helps, hurts, _reasons(mixed, split, helps, hurts)
    )


def sentences(rows: Sequence[PdRow]) -> list[str]:
    """The verdicts on one case: the best static split, what else was tried, and roles by load."""
    mixed = next((row for row in rows if row.split is None), None)
    best = best_split(rows)
    if mixed is None or best is None:
        return []
    verdict = verdict_of(mixed, best)
    lines = [f"{verdict.case}: the best static split is {best.layout}, a step {_change(verdict.step)} mixed"]
    lines += [f"  helps: {'; '.join(verdict.helps)}"] if verdict.helps else []
    lines += [f"  hurts: {'; '.join(verdict.hurts)}"] if verdict.hurts else []
    lines += [f"  because {reason}" for reason in verdict.because]
    worst = max((row for row in rows if row.split and not row.layout.startswith("auto")), key=_step_s)
    if worst is not best:
        lines.append(f"  the worst, {worst.layout}: {_change(worst.step_s / mixed.step_s - 1)} mixed")
    for row in rows:
        if row.split and row.layout.startswith("auto"):
            lines.append(
                f"  roles by load ({row.layout}): {row.split.flips} flips, at the end {row.split.roles}, "
                f"{_change(row.step_s / best.step_s - 1)} the best static split"
            )
    return lines


def summary(verdicts: Sequence[Verdict]) -> list[str]:
    """One sentence each on where the split shortens steps, where it lengthens them, and where it does neither."""
    shorter = [f"{one.case} {one.step:+.0%} ({one.layout})" for one in verdicts if one.step <= -NOTABLE]
    longer = [f"{one.case} {one.step:+.0%} ({one.layout})" for one in verdicts if one.step >= NOTABLE]
    same = [f"{one.case} {one.step:+.1%} ({one.layout})" for one in verdicts if abs(one.step) < NOTABLE]
    return [
        f"{what}: {', '.join(names)}"
        for what, names in (
            ("Shorter steps with the best split", shorter),
            ("Longer steps even with the best split", longer),
            ("No notable difference in step time", same),
        )
        if names
    ]


def _step_s(row: PdRow) -> float:
    return row.step_s


def _change(change: float) -> str:
    if abs(change) < 0.005:
        return "as long as"
    return f"{abs(change):.1%} {'shorter' if change < 0 else 'longer'} than"


def _measures(mixed: PdRow, split: PdRow) -> list[tuple[str, float, float, str]]:
    """What is better when smaller: name, mixed, split, both in words."""
    return [
        ("step", mixed.step_s, split.step_s, f"{mixed.step_s:.0f} to {split.step_s:.0f} s"),
        *(
            (f"first token {name}", before, after, f"{before:.2f} to {after:.2f} s")
            for name, before, after in (
                ("p50", mixed.first_token_p50_s, split.first_token_p50_s),
                ("p99", mixed.first_token_p99_s, split.first_token_p99_s),
            )
        ),
        *(
            (f"between tokens {name}", before, after, f"{before:.1f} to {after:.1f} ms")
            for name, before, after in (
                ("p50", mixed.inter_token_p50_ms, split.inter_token_p50_ms),
                ("p99", mixed.inter_token_p99_ms, split.inter_token_p99_ms),
            )
        ),
    ]


def _reasons(mixed: PdRow, split: PdRow, helps: Sequence[str], hurts: Sequence[str]) -> list[str]:
    """What the figures say about why tokens come faster or slower, prompts wait or not, and KV goes round."""
    assert split.split is not None
    prefill, decode = (int(count) for count in split.layout.split(":"))
    engines, reasons = prefill + decode, []
    if any("between tokens" in one for one in helps) and mixed.prompt_share >= NOTABLE:
        reasons.append(
            f"mixed engines spend {mixed.prompt_share:.0%} of their work on prompts, in the steps of the sequences that "
            f"decode, so their slowest tokens take {mixed.inter_token_p99_ms / mixed.inter_token_p50_ms:.1f} times the median; "
            f"an engine that only decodes has {split.inter_token_p99_ms / split.inter_token_p50_ms:.1f} times"
        )
    idle = prefill * (1 - split.split.prefill_busy)
    if any(one.startswith(("step", "between tokens p50")) for one in hurts) and idle / engines >= NOTABLE:
        reasons.append(
            f"its {prefill} prefill engines work {split.split.prefill_busy:.0%} of their time: {idle / engines:.0%} of all "
            "engine time is idle that mixed engines would decode in"
        )
    if any("between tokens p50" in one for one in hurts) and split.decoding > mixed.decoding * (1 + NOTABLE):
        reasons.append(
            f"{decode} engines decode what {engines} decoded: {split.decoding:.0f} sequences each instead of {mixed.decoding:.0f}"
        )
    if any(one.startswith("first token") for one in hurts):
        reasons.append(_why_first_tokens_wait(prefill, engines, split.split.prefill_busy))
    if any(one.startswith("first token") for one in helps):
        reasons.append(
            "a prompt is computed by an engine that decodes nothing beside it, instead of sharing steps with "
            f"{mixed.decoding:.0f} sequences"
        )
    if split.evicted_per_sampled > mixed.evicted_per_sampled + NOTABLE:
        reasons.append(
            f"{decode} engines have {decode / engines:.0%} of the KV: {split.evicted_per_sampled:.1f} tokens of suspended "
            f"sessions are evicted for each sampled token (mixed {mixed.evicted_per_sampled:.1f}), and "
            f"{split.computed_per_sampled:.1f} prompt tokens are computed for each (mixed {mixed.computed_per_sampled:.1f})"
        )
    elif split.computed_per_sampled > mixed.computed_per_sampled * (1 + NOTABLE) + NOTABLE:
        reasons.append(
            f"prefill engines compute answers again that decode engines made: {split.computed_per_sampled:.2f} prompt tokens for "
            f"each sampled one (mixed {mixed.computed_per_sampled:.2f})"
        )
    return reasons


def _why_first_tokens_wait(prefill: int, engines: int, busy: float) -> str:
    if busy >= QUEUES:
        return f"prompts queue at {prefill} prefill engines that are busy {busy:.0%} of the time, where {engines} took them before"
    return (
        f"all prompts go to {prefill} prefill engines; busy {busy:.0%} of the time, so they do not wait for one another but for "
        "an engine that switches weights, as new episodes begin when a version arrives"
    )
