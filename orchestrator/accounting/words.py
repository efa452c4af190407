"""Where the idle time went, in words: for the report, and for whoever reads a summary."""

from __future__ import annotations

from collections.abc import Mapping

LITTLE = 0.01
"""Shares below this are not worth a sentence."""

SENTENCES = {
    "environment": "the episodes were in their environments; more of them at once (rollout.concurrency) would fill the gap",
    "reward": "the episodes waited for their rewards; a faster branch or more of them at once would help",
    "queue_full": "finished episodes waited to be delivered or the queue was full (queue.budget_mb); the learner is behind",
    "queue_empty": "the learner had no finished group while the engines were generating: generation is the bottleneck, so "
    "more of the accelerators should roll out",
    "weight_stall": "new weights were on their way or being swapped in",
    "straggler": "all that may start had started and a few slow episodes were awaited; a higher staleness.target_lag or more "
    "groups in flight hides them",
    "pacing": "no further group may start before the learner's next version: the learner is the bottleneck, so more of the "
    "accelerators should train, or staleness.target_lag may rise",
    "other_phase": "engines of one phase had nothing to do while requests were in the other: more of them belong there "
    "(engines.prefill, engines.decode; engines.roles=auto finds the division)",
    "startup": "processes were starting",
    "save": "checkpoints were being written",
    "failure": "actors had died and were being replaced",
    "idle": "nothing in particular was waited for: the control plane's own time, or too few episodes at once for so many "
    "accelerators",
}
"""What a cause means, and what one would do about it."""


def idle_in_words(idle: Mapping[str, float], mode: str = "", starved_s: float = 0.0) -> list[str]:
    """One sentence for the whole, and one for each cause that matters, the largest first.

    ``idle``: share of the accelerator-seconds by cause, as in ``summary.json``.

    >>> for line in idle_in_words({"environment": 0.12, "save": 0.001}): print(line)
    Engines and learner did useful work in 87.9 % of their accelerator-seconds.
    12.0 %: the episodes were in their environments; more of them at once (rollout.concurrency) would fill the gap.
    """
    if not idle:
        return ["The run did not train for long enough to say where its time went."]
    lines = [
        f"Engines and learner did useful work in {_percent(1.0 - sum(idle.values()))} of their accelerator-seconds"
        f"{f' (mode {mode})' if mode else ''}."
    ]
    for cause, share in sorted(idle.items(), key=lambda item: -item[1]):
        if share >= LITTLE:
            lines.append(f"{_percent(share)}: {SENTENCES.get(cause, cause)}.")
    if starved_s >= 1.0:
        lines.append(
            f"For {starved_s:.1f} s the learner waited although nothing kept the next group from starting: dispatching was "
            "too slow."
        )
    return lines


def _percent(share: float) -> str:
    return f"{100.0 * max(0.0, share):.1f} %"
