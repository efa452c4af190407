from __future__ import annotations

from typing import Literal

import pytest
from pool_fixtures import Counter, make_task

from env_pool.environment import Environment, ToolEnvironment, as_observation, tools_of
from env_pool.errors import AgentFault
from env_pool.tools import Answer, Malformed, ToolCall, make_tool, parse_action, parse_docstring

TOOLS = ("find_user", "add")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("find_user anna", ToolCall("find_user", ["anna"])),
        ("  find_user   anna  smith ", ToolCall("find_user", ["anna", "smith"])),
        ("add", ToolCall("add", [])),
        ("done late", Answer("late")),
        ("Answer: 4 8 2", Answer("4 8 2")),
        ("it is late", Answer("it is late")),
        ("finduser anna", Answer("finduser anna")),
        ("", Answer("")),
        ("<think>find_user bob?</think>\ndone late", Answer("late")),
        ('<tool_call>\n{"name": "add", "arguments": {"amount": 2}}\n</tool_call>', ToolCall("add", {"amount": 2})),
        ('I look. <tool_call>{"name": "other"}</tool_call>', ToolCall("other", {})),
        ('<tool_call>{"name": "add", "arguments": {}}', ToolCall("add", {})),
    ],
)
def test_an_action_is_read_as_call_or_answer(text: str, expected: object) -> None:
    assert parse_action(text, TOOLS) == expected


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("<tool_call>{add}</tool_call>", "not valid JSON"),
        ("<tool_call>[1]</tool_call>", '"name"'),
        ('<tool_call>{"name": "add", "arguments": [1]}</tool_call>', "must be an object, got list"),
        ('<tool_call>{"name": "a"}</tool_call><tool_call>{"name": "b"}</tool_call>', "one tool call at a time, got 2"),
    ],
)
def test_a_call_that_cannot_be_read_says_why(text: str, reason: str) -> None:
    parsed = parse_action(text, TOOLS)
    assert isinstance(parsed, Malformed)
    assert reason in parsed.reason


def test_without_word_syntax_a_tool_name_is_only_a_word() -> None:
    assert parse_action("find_user anna", TOOLS, words=False) == Answer("find_user anna")


def note(order: int, kind: Literal["late", "lost"], text: str = "none", urgent: bool | None = None) -> str:
    """Write a note
    to an order.

    Second paragraph, for programmers.

    Args:
        order (int): number,
            three digits.
        kind: what happened.

    Returns:
        text: nothing of interest.
    """
    return f"{order}{kind}{text}{urgent}"


def test_the_schema_comes_from_hints_and_docstring() -> None:
    function = make_tool(note).schema["function"]
    assert function["name"] == "note"
    assert function["description"] == "Write a note to an order."
    parameters = function["parameters"]
    assert parameters["required"] == ["order", "kind"]
    assert parameters["properties"]["order"] == {"type": "integer", "description": "number, three digits."}
    assert parameters["properties"]["kind"] == {"enum": ["late", "lost"], "description": "what happened."}
    assert parameters["properties"]["text"] == {"type": "string", "default": "none"}
    assert parameters["properties"]["urgent"]["default"] is None


def test_rest_docstrings_are_read_too() -> None:
    description, parameters = parse_docstring(
        "Find.\n\n:param str name: who,\n    exactly\n:param age: years\n:returns: it"
    )
    assert (description, parameters) == ("Find.", {"name": "who, exactly", "age": "years"})


def test_arguments_are_converted_to_the_hinted_types() -> None:
    tool = make_tool(note)
    assert tool.bind({"order": "12", "kind": "late"}) == {"order": 12, "kind": "late"}
    assert tool.bind({"order": 12, "kind": "lost", "urgent": "true"}) == {"order": 12, "kind": "lost", "urgent": True}


def test_words_fill_parameters_in_order_and_digits_make_one_number() -> None:
    tool = make_tool(note)
    assert tool.bind(["4", "8", "2", "late", "x", "true"]) == {
        "order": 482,
        "kind": "late",
        "text": "x",
        "urgent": True,
    }

    def write(order: int, text: str) -> str:
        return text

    assert make_tool(write).bind(["7", "late", "again"]) == {"order": 7, "text": "late again"}


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"order": 1, "kind": "late", "colour": "red"}, "no argument 'colour'"),
        ({"kind": "late"}, "needs 'order'"),
        ({"order": "x", "kind": "late"}, "argument 'order'"),
        ({"order": 1, "kind": "blue"}, "argument 'kind'"),
    ],
)
def test_arguments_that_do_not_fit_are_the_agents_fault(arguments: dict[str, object], reason: str) -> None:
    with pytest.raises(AgentFault, match=reason):
        make_tool(note).bind(arguments)


def test_too_many_words_for_a_tool_without_arguments_are_the_agents_fault() -> None:
    with pytest.raises(AgentFault, match="no arguments, got 1 words"):
        make_tool(lambda: "x").bind(["why"])


def test_a_parameter_without_a_hint_is_refused() -> None:
    def bare(order):  # type: ignore[no-untyped-def]
        return order

    with pytest.raises(TypeError, match="'order' has no type hint"):
        make_tool(bare)


def test_only_the_methods_that_a_subclass_adds_are_tools() -> None:
    assert list(tools_of(Counter)) == ["add", "whoami"]


def test_a_class_without_tools_is_refused() -> None:
    class Empty(ToolEnvironment):
        pass

    with pytest.raises(TypeError, match="no tools"):
        tools_of(Empty)


def start() -> Counter:
    counter = Counter()
    counter.reset(make_task(Counter))
    return counter


def test_both_spellings_act_on_the_same_tool() -> None:
    counter = start()
    assert counter.step("add 2").observation == "2"
    assert counter.step('<tool_call>{"name":"add","arguments":{"amount":1}}</tool_call>').observation == "3"
    assert counter.step("done 3").done
    assert counter.outcome() == {"answer": "3", "calls": 2, "faults": 0, "value": 3}


@pytest.mark.parametrize(
    ("action", "reason"),
    [
        ('<tool_call>{"name":"subtract","arguments":{}}</tool_call>', "there is no tool 'subtract', only add, whoami"),
        ("add much", "argument 'amount'"),
        ("add 101", "at most 100"),
        ("<tool_call>?</tool_call>", "not valid JSON"),
    ],
)
def test_a_mistake_of_the_agent_is_an_observation_and_the_episode_goes_on(action: str, reason: str) -> None:
    counter = start()
    result = counter.step(action)
    assert result.fault is not None
    assert reason in result.fault
    assert result.observation == f"error: {result.fault}"
    assert not result.done
    assert counter.step("add 3").observation == "3"
    assert counter.outcome()["faults"] == 1


def test_a_string_from_reset_becomes_a_user_message_with_the_tools() -> None:
    counter = Counter()
    observation = as_observation(counter, counter.reset(make_task(Counter)))
    assert observation.messages == [{"role": "user", "content": "Count up to 3."}]
    assert [tool["function"]["name"] for tool in observation.tools] == ["add", "whoami"]
    with pytest.raises(TypeError, match="got NoneType"):
        as_observation(Environment(), None)
