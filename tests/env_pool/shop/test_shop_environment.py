"""The shop's tools, spellings, judgement and snapshots."""

from __future__ import annotations

import json

import pytest

from env_pool.environment import Observation, StepResult
from env_pool.shop.environment import ShopEnvironment, normalise
from env_pool.shop.tasks import parse_facts
from experience.records import Task


@pytest.fixture
def task() -> Task:
    made = (ShopEnvironment.make_task(index, 0, "train", {}) for index in range(1000))
    return next(task for task in made if task.domain == "customer_refund_note")


def step(shop: ShopEnvironment, action: str) -> StepResult:
    result = shop.step(action)
    assert isinstance(result, StepResult)
    return result


def call(tool: str, /, **arguments: object) -> str:
    return f"<tool_call>{json.dumps({'name': tool, 'arguments': arguments})}</tool_call>"


def test_word_and_json_calls_act_alike(task: Task) -> None:
    facts = parse_facts(task.payload)
    number = " ".join(str(facts.order))
    words = [f"find_user {facts.customer}", f"find_order {number}", f"check_stock {facts.item}"]
    words += [f"refund {number}", f"note {facts.note} {number}", f"done {facts.item}"]
    objects = [call("find_user", name=facts.customer), call("find_order", order=facts.order)]
    objects += [call("check_stock", item=facts.item), call("refund", order=facts.order)]
    objects += [call("note", text=facts.note, order=str(facts.order)), facts.item.capitalize() + "."]
    outcomes = []
    replies = []
    for actions in (words, objects):
        shop = ShopEnvironment()
        shop.reset(task)
        results = [step(shop, action) for action in actions]
        assert [result.done for result in results] == [False] * 5 + [True]
        replies.append([result.observation for result in results])
        outcomes.append(shop.outcome())
        shop.close()
    assert replies[0] == replies[1]
    assert replies[0][0] == f"order {number}"
    assert replies[0][1] == f"{facts.customer} {facts.item} {facts.status}"
    assert outcomes[0]["refunds"] == outcomes[1]["refunds"] == [facts.order]
    assert outcomes[0]["notes"] == outcomes[1]["notes"] == [[facts.order, facts.note]]
    assert [ShopEnvironment.verify(task, outcome).reward for outcome in outcomes] == [1.0, 1.0]


@pytest.mark.parametrize(
    "action",
    [
        "find_user nobody",
        "find_order 0 0 1",
        "check_stock moon",
        "refund 0 0 1",
        "note vip 0 0 1",
        "refund lamp",
        "note",
    ],
)
def test_a_mistake_is_an_error_the_agent_sees_and_the_episode_goes_on(task: Task, action: str) -> None:
    shop = ShopEnvironment()
    shop.reset(task)
    result = step(shop, action)
    assert result.observation == "error"
    assert result.fault
    assert not result.done
    assert shop.outcome() == {"answer": None, "calls": 0, "faults": 1, "refunds": [], "notes": []}
    rewards = [step(shop, golden) for golden in task.payload["golden"]]
    assert rewards[-1].done
    assert ShopEnvironment.verify(task, shop.outcome()).reward == 1.0
    shop.close()


def test_the_answer_alone_or_the_state_alone_is_no_success(task: Task) -> None:
    *calls, last = task.payload["golden"]
    for actions, parts in (
        ([last], {"state": 0.0, "answer": 1.0}),
        ([*calls, "done ok"], {"state": 1.0, "answer": 0.0}),
    ):
        shop = ShopEnvironment()
        shop.reset(task)
        for action in actions:
            step(shop, action)
        verdict = ShopEnvironment.verify(task, shop.outcome())
        assert verdict.reward == 0.0
        assert verdict.parts == parts
        shop.close()


def test_an_episode_without_an_answer_fails(task: Task) -> None:
    shop = ShopEnvironment()
    shop.reset(task)
    for action in task.payload["golden"][:-1]:
        step(shop, action)
    assert ShopEnvironment.verify(task, shop.outcome()).reward == 0.0
    shop.close()


def test_a_snapshot_carries_the_whole_state(task: Task) -> None:
    *first, last = task.payload["golden"]
    shop = ShopEnvironment()
    shop.reset(task)
    for action in first:
        step(shop, action)
    state = shop.snapshot()
    shop.close()
    other = ShopEnvironment()
    other.restore(task, state)
    step(other, last)
    assert ShopEnvironment.verify(task, other.outcome()).reward == 1.0
    assert other.outcome()["calls"] == len(first)
    other.close()


def test_natural_style_speaks_english_and_offers_the_tools() -> None:
    task = ShopEnvironment.make_task(4, 0, "train", {"style": "natural"})
    shop = ShopEnvironment()
    observation = shop.reset(task)
    assert isinstance(observation, Observation)
    assert [message["role"] for message in observation.messages] == ["system", "user"]
    assert [schema["function"]["name"] for schema in shop.tool_schemas()] == [
        "find_user",
        "find_order",
        "check_stock",
        "refund",
        "note",
    ]
    note = shop.tool_schemas()[-1]["function"]
    assert note["parameters"]["properties"]["order"] == {"type": "integer", "description": "number of the order."}
    facts = parse_facts(task.payload)
    assert step(shop, call("find_user", name=facts.customer)).observation == (
        f"Customer {facts.customer} has order {facts.order}."
    )
    assert "there is no customer zoe" in step(shop, call("find_user", name="zoe")).observation
    shop.close()


@pytest.mark.parametrize(
    ("given", "normal"),
    [("4 8 2", "482"), ("482.", "482"), ("Late!", "late"), ("0", "none"), ("none", "none"), ("", "")],
)
def test_answers_are_compared_without_case_punctuation_or_digit_spacing(given: str, normal: str) -> None:
    assert normalise(given) == normal
