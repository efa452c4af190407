"""What an episode of a workload does: how much it generates, how long its tools take, how its context grows.

All figures are in the units of the system that is modelled: seconds and tokens. The laws, for all suites:

* *Model time becomes tokens* at ``REFERENCE_TOKENS_PER_S`` = 50: a turn of 5 s is 250 tokens, on whatever engine it then runs.
* Turns, times and lengths of the members of a group are independent of each other; only the domain of `mixed` and the chance
  of success belong to the task.
* A script depends on (suite, seed, index, member) and on nothing else, so every mode of a run sees the same episodes.

=========  ============================================================================================================
suite      law
=========  ============================================================================================================
`reason`   one turn; tokens LogNormal(mean 4,000, s = 1.0), cap 8 x mean; prompt 500 tokens, no tool
`swe`      turns LogNormal(ln 35, 0.5), at least 1, cap 100; model time a turn LogNormal(1.6, 1.15) s; tool time a turn
           LogNormal(-1.2, 2.9) s, cap 600 s; context +1,800 tokens a turn: the turn itself and an observation that makes up
           the rest (at least 64 tokens); prompt 4,000 tokens
`long`     the whole episode takes LogNormal(mean 4,200 s, s = 1.28), cap 18,000 s; it has as many turns as one of `swe`, whose
           shares of it are Dirichlet(2); half of each turn is the model's, half the tool's (in `swe` 9.6 s of 20 s are)
`mixed`    each task is of `swe` (70 %), `reason` (20 %) or `long` (10 %)
`fault`    `swe`; 7 % of its tool calls take ``TOOL_TIMEOUT_S`` = 30 s and return an error; 7 % of its episodes lose their
           environment after a turn drawn uniformly, and are run again from the start (the second run loses none)
`burst`    one turn of 64 tokens; the environment's start takes LogNormal(median 0.5 s, s = 0.5), and 1 % of them take 60 s
=========  ============================================================================================================

The swe laws are fits to TraceLab (432,510 tool calls of coding agents, CC BY 4.0).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b

import msgspec
import numpy as np

from env_pool.tools import nearest
from env_pool.workloads.laws import LogNormal

REFERENCE_TOKENS_PER_S = 50.0
"""Tokens that a second of model time stands for: the decode rate of one sequence on the engines the laws were measured on."""

REASON_LENGTH = LogNormal.with_mean(4000, 1.0, cap=8 * 4000)
REASON_PROMPT = 500
SWE_TURNS = LogNormal.with_median(35, 0.5, cap=100)
SWE_MODEL_S = LogNormal(1.6, 1.15)
SWE_TOOL_S = LogNormal(-1.2, 2.9, cap=600)
SWE_PROMPT = 4000
CONTEXT_PER_TURN = 1800
LEAST_OBSERVATION = 64
LONG_EPISODE_S = LogNormal.with_mean(70 * 60, 1.28, cap=5 * 3600)
LONG_MODEL_SHARE = 0.5
LONG_DIRICHLET = 2.0
MIXED_SHARES = (("swe", 0.7), ("reason", 0.2), ("long", 0.1))
FAULT_TOOL_TIMEOUTS = 0.07
FAULT_LOST_ENVIRONMENTS = 0.07
TOOL_TIMEOUT_S = 30.0
FAULT_ENGINE_KILL_EVERY_S = 300.0
"""Of `fault`: how often an engine is to be killed. Whoever runs the suite does that; a script cannot."""
BURST_STARTS = 10_000
BURST_START_S = LogNormal.with_median(0.5, 0.5)
BURST_SLOW_SHARE = 0.01
BURST_SLOW_S = 60.0
BURST_TOKENS = 64

SUITES = ("reason", "swe", "long", "mixed", "fault", "burst")


class ScriptedTurn(msgspec.Struct, frozen=True, gc=False):
    """One turn: the tokens it generates, the seconds its tool takes, the tokens of what the tool returns."""

    output_tokens: int
    tool_s: float
    observation_tokens: int
    timed_out: bool = False
    """The tool returned an error after its time-out (which is ``tool_s``)."""


@dataclass(frozen=True, slots=True)
class EpisodeScript:
    """One episode: context to begin with, seconds that the environment's start takes, and the turns (at least one)."""

    prompt_tokens: int
    reset_s: float
    turns: list[ScriptedTurn]
    domain: str = ""
    lost_at: int | None = None
    """The environment dies in the tool call of this turn (from 0) of the episode's first attempt."""

    @property
    def output_tokens(self) -> int:
        """Tokens generated in all."""
        return sum(turn.output_tokens for turn in self.turns)

    @property
    def tool_s(self) -> float:
        """Seconds of all tool calls, one after the other."""
        return sum(turn.tool_s for turn in self.turns)

    @property
    def context_tokens(self) -> int:
        """Length of the trajectory at its end: prompt, generations and observations (the last turn's is not read)."""
        read = sum(turn.observation_tokens for turn in self.turns[:-1])
        return self.prompt_tokens + self.output_tokens + read

    def seconds(self, tokens_per_s: float = REFERENCE_TOKENS_PER_S) -> float:
        """How long the episode takes on an engine that decodes it at ``tokens_per_s``: start, turns and tools."""
        return self.reset_s + self.output_tokens / tokens_per_s + self.tool_s


def suite_script(suite: str, seed: int, index: int, member: int) -> EpisodeScript:
    """Episode ``member`` of task ``index`` of a suite: a pure function. ValueError names a suite that does not exist."""
    domain = task_domain(suite, seed, index)
    generator = _generator(domain, seed, index, member)
    match domain:
        case "reason":
            return _reason(generator)
        case "swe":
            return _swe(generator)
        case "long":
            return _long(generator)
        case "fault":
            return _fault(generator)
        case _:
            return _burst(generator)


@lru_cache(maxsize=65536)
def task_domain(suite: str, seed: int, index: int) -> str:
    """The suite whose law task ``index`` follows: ``suite`` itself, or for `mixed` one of its three."""
    if suite not in SUITES:
        raise ValueError(
            f"there is no workload suite {suite!r}; there are {', '.join(SUITES)}.{nearest(suite, SUITES)}"
        )
    if suite != "mixed":
        return suite
    draw = _generator("mixed", seed, index).random()
    for domain, share in MIXED_SHARES:
        draw -= share
        if draw < 0:
            return domain
    return MIXED_SHARES[-1][0]


def succeeds(key: str, seed: int, index: int, member: int, chance: float) -> bool:
    """Whether an episode earns its reward: a Bernoulli draw that depends on the arguments alone."""
    return bool(_generator(f"{key}/reward", seed, index, member).random() < chance)


def carried_tokens(tokens: int, token_scale: float) -> int:
    """Tokens that stand for ``tokens`` in a run that carries one for ``token_scale``: at least 1, or 0 for none."""
    return max(1, round(tokens / token_scale)) if tokens else 0


def _generator(*key: str | int) -> np.random.Generator:
    digest = blake2b("/".join(map(str, key)).encode(), digest_size=16).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest, "little")))


def _tokens(seconds: float) -> int:
    return max(1, round(seconds * REFERENCE_TOKENS_PER_S))


def _reason(generator: np.random.Generator) -> EpisodeScript:
    length = max(1, round(float(REASON_LENGTH.sample(generator, 1)[0])))
    return EpisodeScript(REASON_PROMPT, 0.0, [ScriptedTurn(length, 0.0, 0)], "reason")


def _turn(model_s: float, tool_s: float) -> ScriptedTurn:
    output = _tokens(model_s)
    return ScriptedTurn(output, tool_s, max(LEAST_OBSERVATION, CONTEXT_PER_TURN - output))


def _count(generator: np.random.Generator) -> int:
    return max(1, round(float(SWE_TURNS.sample(generator, 1)[0])))


def _swe(generator: np.random.Generator) -> EpisodeScript:
    count = _count(generator)
    model_s = SWE_MODEL_S.sample(generator, count).tolist()
    tool_s = SWE_TOOL_S.sample(generator, count).tolist()
    return EpisodeScript(SWE_PROMPT, 0.0, [_turn(m, t) for m, t in zip(model_s, tool_s, strict=True)], "swe")


def _long(generator: np.random.Generator) -> EpisodeScript:
    total_s = float(LONG_EPISODE_S.sample(generator, 1)[0])
    count = _count(generator)
    shares = generator.dirichlet(np.full(count, LONG_DIRICHLET)).tolist()
    turns = [_turn(s * total_s * LONG_MODEL_SHARE, s * total_s * (1 - LONG_MODEL_SHARE)) for s in shares]
    return EpisodeScript(SWE_PROMPT, 0.0, turns, "long")


def _fault(generator: np.random.Generator) -> EpisodeScript:
    script = _swe(generator)
    late = (generator.random(len(script.turns)) < FAULT_TOOL_TIMEOUTS).tolist()
    turns = [
        ScriptedTurn(turn.output_tokens, TOOL_TIMEOUT_S, LEAST_OBSERVATION, timed_out=True) if is_late else turn
        for turn, is_late in zip(script.turns, late, strict=True)
    ]
    lost = generator.random() < FAULT_LOST_ENVIRONMENTS
    lost_at = int(generator.integers(len(turns)))
    return EpisodeScript(script.prompt_tokens, 0.0, turns, "fault", lost_at if lost else None)


def _burst(generator: np.random.Generator) -> EpisodeScript:
    slow = generator.random() < BURST_SLOW_SHARE
    start_s = BURST_SLOW_S if slow else float(BURST_START_S.sample(generator, 1)[0])
    return EpisodeScript(REASON_PROMPT, start_s, [ScriptedTurn(BURST_TOKENS, 0.0, 0)], "burst")
