"""A rollout loop around another one that writes down every turn when it is complete: none may be generated again."""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from pathlib import Path
from typing import Any

from rollout_workers import Episode
from rollout_workers.loops import load_loop

LOOP = "benchmarks.fleet.loop:recorded"
"""What `rollout.loop` must be; `rollout.args` are the arguments of `recorded`."""


async def recorded(episode: Episode, loop: str, directory: str) -> None:
    """Run ``loop``; each turn that came back is a line in ``directory``."""
    generate = episode.generate
    path = Path(directory) / f"turns-{os.getpid()}.jsonl"
    turns = 0

    async def noted(*arguments: Any, **settings: Any) -> Any:
        nonlocal turns
        generation = await generate(*arguments, **settings)
        line = {
            "at": time.time(),
            "task": episode.task.task_id,
            "member": episode.member,
            "turn": turns,
            "tokens": len(generation.tokens),
        }
        turns += 1
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        return generation

    episode.generate = noted  # type: ignore[method-assign]
    await load_loop(loop)(episode)


def read_turns(directory: Path) -> list[dict[str, Any]]:
    """All turns that came back; a line that is being written is left out."""
    lines: list[dict[str, Any]] = []
    for path in sorted(directory.glob("turns-*.jsonl")):
        text = path.read_text(encoding="utf-8")
        lines += [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
    return lines


def generated_again(turns: list[dict[str, Any]]) -> int:
    """How many turns came back more than once.

    >>> first = {"task": "t", "member": 0, "turn": 0}
    >>> generated_again([first, {**first, "turn": 1}]), generated_again([first, first])
    (0, 1)
    """
    times = Counter((line["task"], line["member"], line["turn"]) for line in turns)
    return sum(count - 1 for count in times.values())
