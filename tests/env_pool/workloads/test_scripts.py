"""Suites against the closed forms of their laws."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest

from env_pool.workloads.laws import LogNormal
from env_pool.workloads.scripts import (
    BURST_SLOW_S,
    CONTEXT_PER_TURN,
    LONG_EPISODE_S,
    REASON_LENGTH,
    REFERENCE_TOKENS_PER_S,
    SUITES,
    SWE_MODEL_S,
    SWE_TOOL_S,
    SWE_TURNS,
    TOOL_TIMEOUT_S,
    EpisodeScript,
    carried_tokens,
    succeeds,
    suite_script,
    task_domain,
)

SAMPLES = 1500


def scripts(suite: str, count: int = SAMPLES, seed: int = 7) -> list[EpisodeScript]:
    return [suite_script(suite, seed, index, 0) for index in range(count)]


def close_quantiles(values: list[float], law: LogNormal, floor: float = 0.0) -> None:
    """Sample quantiles lie where the law's do, within four standard errors of an order statistic."""
    for share in (0.1, 0.25, 0.5, 0.75, 0.9):
        error = 4 * math.sqrt(share * (1 - share) / len(values))
        found = float(np.quantile(values, share))
        assert law.quantile(share - error) - floor <= found <= law.quantile(share + error) + floor, share


@pytest.mark.parametrize(
    "law", [SWE_TURNS, SWE_MODEL_S, SWE_TOOL_S, LONG_EPISODE_S, REASON_LENGTH, LogNormal(0.0, 1.0)]
)
def test_the_closed_forms_agree_with_integration(law: LogNormal) -> None:
    shares = (np.arange(200_000) + 0.5) / 200_000
    z = np.array([law.quantile(float(s)) for s in shares[::20]])
    assert float(z.mean()) == pytest.approx(law.mean(), rel=0.02)
    assert law.quantile(0.5) == pytest.approx(math.exp(law.mu))


def test_with_mean_is_the_mean_before_the_cut() -> None:
    assert LogNormal.with_mean(4200, 1.28).mean() == pytest.approx(4200)
    assert LONG_EPISODE_S.mean() < 4200


@pytest.mark.parametrize("suite", SUITES)
def test_a_script_depends_on_its_place_alone(suite: str) -> None:
    assert suite_script(suite, 1, 2, 3) == suite_script(suite, 1, 2, 3)
    different = {repr(suite_script(suite, *place)) for place in [(1, 2, 3), (2, 2, 3), (1, 3, 3), (1, 2, 4)]}
    assert len(different) == (4 if suite != "mixed" else len(different))
    assert all(turn.output_tokens >= 1 for turn in suite_script(suite, 1, 2, 3).turns)


def test_scripts_never_change() -> None:
    """Recorded results name suite and seed only: the draws behind them must stay what they are."""
    assert [len(suite_script("swe", 0, index, 0).turns) for index in range(6)] == [21, 44, 56, 89, 16, 16]
    assert suite_script("reason", 0, 0, 0).output_tokens == 1146


def test_reason() -> None:
    made = scripts("reason")
    assert all(len(script.turns) == 1 and script.tool_s == 0 for script in made)
    close_quantiles([script.output_tokens for script in made], REASON_LENGTH, floor=1)
    assert max(script.output_tokens for script in scripts("reason", 5000)) <= 8 * 4000


def test_swe() -> None:
    made = scripts("swe")
    close_quantiles([len(script.turns) for script in made], SWE_TURNS, floor=0.51)
    turns = [turn for script in made[:200] for turn in script.turns]
    close_quantiles([turn.output_tokens / REFERENCE_TOKENS_PER_S for turn in turns], SWE_MODEL_S, floor=0.02)
    close_quantiles([turn.tool_s for turn in turns], SWE_TOOL_S)
    growth = [turn.output_tokens + turn.observation_tokens for turn in turns if turn.output_tokens < 1700]
    assert set(growth) == {CONTEXT_PER_TURN}
    script = made[0]
    read = sum(turn.output_tokens + turn.observation_tokens for turn in script.turns)
    assert script.context_tokens == script.prompt_tokens + read - script.turns[-1].observation_tokens


def test_long() -> None:
    made = scripts("long", 800)
    rounding = 0.02 * 100 / 2
    close_quantiles([script.seconds() for script in made], LONG_EPISODE_S, floor=rounding)
    assert max(script.seconds() for script in made) <= 5 * 3600 + rounding
    shares = [script.tool_s / script.seconds() for script in made if script.seconds() > 100]
    assert np.allclose(shares, 0.5, atol=0.01)


def test_mixed() -> None:
    counts = Counter(task_domain("mixed", 3, index) for index in range(4000))
    for domain, share in (("swe", 0.7), ("reason", 0.2), ("long", 0.1)):
        assert counts[domain] / 4000 == pytest.approx(share, abs=4 * math.sqrt(share * (1 - share) / 4000))
        index = next(i for i in range(4000) if task_domain("mixed", 3, i) == domain)
        assert {suite_script("mixed", 3, index, member).domain for member in range(4)} == {domain}
        assert suite_script("mixed", 3, index, 1) == suite_script(domain, 3, index, 1)


def test_fault() -> None:
    made = scripts("fault")
    lost = sum(script.lost_at is not None for script in made) / len(made)
    assert lost == pytest.approx(0.07, abs=4 * math.sqrt(0.07 * 0.93 / len(made)))
    assert all(script.lost_at is None or script.lost_at < len(script.turns) for script in made)
    turns = [turn for script in made[:300] for turn in script.turns]
    late = [turn for turn in turns if turn.timed_out]
    assert len(late) / len(turns) == pytest.approx(0.07, abs=4 * math.sqrt(0.07 * 0.93 / len(turns)))
    assert {turn.tool_s for turn in late} == {TOOL_TIMEOUT_S}


def test_burst() -> None:
    made = scripts("burst", 4000)
    slow = [script for script in made if script.reset_s == BURST_SLOW_S]
    assert len(slow) / len(made) == pytest.approx(0.01, abs=4 * math.sqrt(0.01 * 0.99 / len(made)))
    close_quantiles(
        [script.reset_s for script in made if script.reset_s != BURST_SLOW_S], LogNormal.with_median(0.5, 0.5)
    )


def test_rewards_are_bernoulli() -> None:
    won = [succeeds("swe", 0, index, member, 0.3) for index in range(500) for member in range(8)]
    assert sum(won) / len(won) == pytest.approx(0.3, abs=4 * math.sqrt(0.21 / len(won)))
    assert won[:8] == [succeeds("swe", 0, 0, member, 0.3) for member in range(8)]


def test_carried_tokens() -> None:
    assert [carried_tokens(n, 100) for n in (0, 1, 149, 1800)] == [0, 1, 1, 18]


def test_an_unknown_suite_is_named() -> None:
    with pytest.raises(ValueError, match=r"no workload suite 'swee'.*swe"):
        suite_script("swee", 0, 0, 0)
