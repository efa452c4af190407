"""Plays a workload through the ordinary pool: waits as its tools would, and returns as much text as they would."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

from env_pool.environment import Environment, Observation, Split, StepResult, VerifierResult
from env_pool.tools import nearest
from env_pool.workloads.replay import load_recording
from env_pool.workloads.scripts import SUITES, EpisodeScript, carried_tokens, succeeds, suite_script, task_domain
from experience.records import Task

REPLAY = "replay"
HELD_OUT_FROM = 1 << 40
"""Held-out tasks are those of indices that no training reaches."""
WORD = ". "
"""Filler: one token for nearly every tokenizer."""


class EnvironmentLost(Exception):
    """The environment died, as the script says."""


class WorkloadEnvironment(Environment):
    """One episode of a suite or of a recording; see :mod:`env_pool.workloads.scripts` for the laws.

    Seconds are divided by ``time_scale``, tokens by ``token_scale``. ``payload`` gets ``member`` and ``attempt`` from the
    loop that leases the environment (0 without). An environment that waits costs a timer and nothing else.
    """

    name: ClassVar[str] = "workload"
    deterministic: ClassVar[bool] = True
    default_options: ClassVar[Mapping[str, Any]] = {
        "suite": "swe",
        "file": "",
        "time_scale": 1.0,
        "token_scale": 1.0,
        "longest_first": 0,
        "group_size": 8,
        "success": 0.5,
    }
    """``suite``: one of the suites, or `replay` with ``file``. ``longest_first`` n > 0 orders the tasks within each block of n by
    what they will take, longest first (an oracle that only a scheduler of recorded work can have), looking at ``group_size``
    members of each. ``success``: the chance of the reward 1."""

    def __init__(self) -> None:
        self._script: EpisodeScript | None = None
        self._payload: Mapping[str, Any] = {}
        self._turn = 0

    @classmethod
    def make_task(cls, index: int, seed: int, split: Split, options: Mapping[str, Any]) -> Task:
        resolved = cls.resolve_options(options)
        check_options(resolved)
        first = HELD_OUT_FROM if split == "held_out" else 0
        file = str(Path(resolved["file"]).resolve()) if resolved["file"] else ""
        source = (str(resolved["suite"]), file, seed)
        block = int(resolved["longest_first"])
        if block:
            place = _order(source, first + index // block * block, block, int(resolved["group_size"]))[index % block]
        else:
            place = first + index
        suite = source[0]
        domain = script_domain(suite, file, seed, place)
        payload = {"suite": suite, "file": file, "seed": seed, "index": place, "success": float(resolved["success"])}
        payload |= {name: float(resolved[name]) for name in ("time_scale", "token_scale")}
        return Task(task_id=f"{suite}/{split}/{seed}/{place}", environment=cls.name, payload=payload, domain=domain)

    @classmethod
    def verify(cls, task: Task, outcome: Mapping[str, Any]) -> VerifierResult:
        made = task.payload
        won = succeeds(made["suite"], made["seed"], made["index"], outcome["member"], made["success"])
        return VerifierResult(reward=float(won))

    async def reset(self, task: Task) -> Observation:
        self._payload = task.payload
        self._script = script_of(task.payload, task.payload.get("member", 0))
        await self._wait(self._script.reset_s)
        return Observation(messages=[{"role": "user", "content": self._text(self._script.prompt_tokens)}])

    async def step(self, action: str) -> StepResult:
        assert self._script is not None, "reset comes first"
        turn = self._script.turns[self._turn]
        lost = self._turn == self._script.lost_at and self._payload.get("attempt", 0) == 0
        self._turn += 1
        await self._wait(turn.tool_s)
        if lost:
            raise EnvironmentLost(f"the script loses its environment in turn {self._turn}")
        if self._turn == len(self._script.turns):
            return StepResult(done=True)
        fault = "the tool timed out" if turn.timed_out else None
        return StepResult(observation=self._text(turn.observation_tokens), fault=fault)

    def outcome(self) -> dict[str, Any]:
        return {"member": self._payload.get("member", 0), "turns": self._turn}

    async def _wait(self, seconds: float) -> None:
        if seconds > 0:
            await asyncio.sleep(seconds / self._payload["time_scale"])

    def _text(self, tokens: int) -> str:
        return filler(carried_tokens(tokens, self._payload["token_scale"]))


def script_of(payload: Mapping[str, Any], member: int) -> EpisodeScript:
    """The script of one member of a workload task."""
    return _script(payload["suite"], payload["file"], payload["seed"], payload["index"], member)


def script_domain(suite: str, file: str, seed: int, index: int) -> str:
    """The domain of a task. Raises ValueError when ``file`` cannot be replayed."""
    if suite != REPLAY:
        return task_domain(suite, seed, index)
    return load_recording(file).script(index, 0).domain


@lru_cache(maxsize=1024)
def filler(tokens: int) -> str:
    """Text of as many words."""
    return WORD * tokens


def check_options(options: Mapping[str, Any]) -> None:
    """Raises ValueError naming the option and what would be right."""
    suite, file = options["suite"], options["file"]
    if suite != REPLAY and suite not in SUITES:
        known = (*SUITES, REPLAY)
        raise ValueError(
            f"tasks.options.suite must be one of {', '.join(known)}, got {suite!r}.{nearest(suite, known)}"
        )
    if (suite == REPLAY) != bool(file):
        raise ValueError(
            f"tasks.options.file={file!r} with suite={suite!r}: `replay` needs a file, the others take none"
        )
    for name in ("time_scale", "token_scale"):
        value = options[name]
        if not (isinstance(value, int | float) and math.isfinite(value) and value > 0):
            raise ValueError(f"tasks.options.{name} must be a positive number, got {value!r}")
    for name, least in (("longest_first", 0), ("group_size", 1)):
        if not (isinstance(options[name], int) and options[name] >= least):
            raise ValueError(f"tasks.options.{name} must be a whole number >= {least}, got {options[name]!r}")
    if not (isinstance(options["success"], int | float) and 0 <= options["success"] <= 1):
        raise ValueError(f"tasks.options.success must lie between 0 and 1, got {options['success']!r}")


@lru_cache(maxsize=4096)
def _script(suite: str, file: str, seed: int, index: int, member: int) -> EpisodeScript:
    if suite == REPLAY:
        return load_recording(file).script(index, member)
    return suite_script(suite, seed, index, member)


@lru_cache(maxsize=16)
def _order(source: tuple[str, str, int], first: int, count: int, members: int) -> list[int]:
    """The indices of a block, the task with the longest episode first."""
    suite, file, seed = source

    def longest(index: int) -> float:
        return max(_script(suite, file, seed, index, member).seconds() for member in range(members))

    return sorted(range(first, first + count), key=longest, reverse=True)
