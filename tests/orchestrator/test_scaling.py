from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.scaling import Change, ScaleError, ScalePlan, parse_change, plan_scale


@pytest.mark.parametrize(
    ("text", "change"),
    [
        ("engines=+1", Change(1, False)),
        ("engines=-2", Change(-2, False)),
        ("engines=3", Change(3, True)),
        ("engines = +1 ", Change(1, False)),
    ],
)
def test_what_may_be_asked_for(text: str, change: Change) -> None:
    assert parse_change(text) == change


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("workers=+1", "only engines can be scaled"),
        ("engines", "give engines=\\+1, engines=-1 or engines=3"),
        ("engines=", "give engines=\\+1"),
        ("engines=two", "give engines=\\+1"),
        ("engines=+1.5", "give engines=\\+1"),
        ("engines=99999999999", "give engines=\\+1"),
    ],
)
def test_what_may_not(text: str, told: str) -> None:
    with pytest.raises(ScaleError, match=told):
        parse_change(text)


def test_new_engines_get_new_indices_and_those_that_joined_last_leave_first() -> None:
    assert plan_scale(Change(2, False), [0, 1], [], 2) == ScalePlan(2, 4, add=(2, 3))
    assert plan_scale(Change(-1, False), [0, 3, 1], [], 4) == ScalePlan(3, 2, remove=(3,))
    assert plan_scale(Change(1, True), [0, 1, 2], [], 3) == ScalePlan(3, 1, remove=(1, 2))
    assert plan_scale(Change(2, True), [0, 1], [], 2) == ScalePlan(2, 2)


@pytest.mark.parametrize(
    ("change", "serving", "others", "told"),
    [
        (Change(-1, False), [0], [], "engines=-1: a run needs at least 1 engine, and it has 1"),
        (Change(0, True), [0, 1], [], "engines=0: a run needs at least 1 engine"),
        (Change(-1, False), [0], [1], "only 1 of the 2 engines serve at this moment"),
        (Change(5000, False), [0], [], "1024 are the most"),
    ],
)
def test_what_cannot_be_done_is_refused(change: Change, serving: list[int], others: list[int], told: str) -> None:
    with pytest.raises(ScaleError, match=told):
        plan_scale(change, serving, others, 9)


@given(
    serving=st.sets(st.integers(0, 9), max_size=6),
    starting=st.sets(st.integers(10, 14), max_size=3),
    amount=st.integers(-12, 12),
    absolute=st.booleans(),
)
def test_somebody_always_serves_and_nobody_comes_and_goes_at_once(
    serving: set[int], starting: set[int], amount: int, absolute: bool
) -> None:
    change = Change(abs(amount) if absolute else amount, absolute)
    try:
        plan = plan_scale(change, sorted(serving), sorted(starting), 15)
    except ScaleError:
        return
    assert not (plan.add and plan.remove)
    assert plan.before + len(plan.add) - len(plan.remove) == plan.after == change.target(plan.before) >= 1
    assert set(plan.remove) <= serving
    assert not set(plan.add) & (serving | starting)
    assert not plan.remove or serving - set(plan.remove)
