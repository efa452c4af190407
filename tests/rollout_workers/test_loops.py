from __future__ import annotations

import pytest

from rollout_workers.loops import load_loop, single_turn, tool_agent


def test_bundled_loops_by_name() -> None:
    assert load_loop("tool_agent") is tool_agent
    assert load_loop("single_turn") is single_turn


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tool_agnet", "did you mean 'tool_agent'"),
        ("no_such_module:loop", "cannot import 'no_such_module'"),
        ("rollout_workers.loops:nothing", "its async functions are"),
        ("rollout_workers.loops:load_loop", "must be an async function"),
    ],
)
def test_a_bad_name_says_what_is_wrong(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_loop(name)
