"""Tools as plain methods: their schema from type hints and docstrings, and how an action's text calls them.

Two spellings of a call act on the same tools:

- Hermes/Qwen JSON: ``<tool_call>{"name": "find_user", "arguments": {"name": "anna"}}</tool_call>``;
- words: ``find_user anna`` (first word a tool's name, the rest its arguments in order).

Anything else is the final answer; a leading word ``done`` or ``answer`` marks it and is taken off.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, get_type_hints

import msgspec

from env_pool.errors import AgentFault

ANSWER_WORDS = ("done", "answer")

_THINKING = re.compile(r"<think>.*?</think>", re.DOTALL)
_CALL = re.compile(r"<tool_call>(.*?)(?:</tool_call>|\Z)", re.DOTALL)
_GOOGLE_SECTION = re.compile(r"^(Args|Arguments|Parameters|Returns|Raises|Yields|Example|Examples|Note|Notes):\s*$")
_GOOGLE_PARAMETER = re.compile(r"^\*{0,2}(\w+)\s*(?:\([^)]*\))?:\s*(.*)$")
_REST_FIELD = re.compile(r"^:(\w+)\s*([^:]*):\s*(.*)$")


@dataclass(frozen=True)
class ToolCall:
    """A call that was understood as such; whether tool and arguments exist is not known yet."""

    name: str
    arguments: dict[str, Any] | list[str]
    """By name (JSON), or the words in order."""


@dataclass(frozen=True)
class Answer:
    """The agent's final answer."""

    text: str


@dataclass(frozen=True)
class Malformed:
    """A call that could not be read; ``reason`` is told to the agent."""

    reason: str


def parse_action(text: str, tools: Collection[str], words: bool = True) -> ToolCall | Answer | Malformed:
    """Read one action.

    Args:
        text: what the model wrote, end-of-turn token taken off. A ``<think>`` block is skipped.
        tools: names of the tools there are.
        words: whether the word spelling counts as a call (else only JSON does).
    """
    text = _THINKING.sub("", text).strip()
    if "<tool_call>" in text:
        return _parse_json_call(_CALL.findall(text))
    first, *rest = text.split() or [""]
    if words and first in tools:
        return ToolCall(first, rest)
    if first.lower().rstrip(":") in ANSWER_WORDS:
        return Answer(text[len(first) :].strip())
    return Answer(text)


def _parse_json_call(calls: list[str]) -> ToolCall | Malformed:
    if len(calls) > 1:
        return Malformed(f"one tool call at a time, got {len(calls)}")
    try:
        call = json.loads(calls[0])
    except ValueError as error:
        return Malformed(f"the tool call is not valid JSON ({error})")
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        return Malformed('a tool call is an object with "name" (a string) and "arguments" (an object)')
    arguments = call.get("arguments", {})
    if not isinstance(arguments, dict):
        return Malformed(f'"arguments" must be an object, got {type(arguments).__name__}')
    return ToolCall(call["name"], arguments)


@dataclass(frozen=True)
class Tool:
    """A callable method: name, OpenAI function schema, and the types its arguments are converted to."""

    name: str
    schema: dict[str, Any]
    types: dict[str, Any]
    required: frozenset[str]

    def bind(self, arguments: dict[str, Any] | list[str]) -> dict[str, Any]:
        """Arguments by name, converted to the hinted types. Raises :class:`AgentFault` saying what does not fit."""
        named = self._spread(arguments) if isinstance(arguments, list) else arguments
        if unknown := [name for name in named if name not in self.types]:
            raise AgentFault(f"{self.name} has no argument {unknown[0]!r}; it takes {self._signature()}")
        if missing := [name for name in self.types if name in self.required and name not in named]:
            raise AgentFault(f"{self.name} needs {missing[0]!r}; it takes {self._signature()}")
        return {name: self._convert(name, value) for name, value in named.items()}

    def _convert(self, name: str, value: Any) -> Any:
        try:
            return msgspec.convert(value, self.types[name], strict=False)
        except (msgspec.ValidationError, TypeError) as error:
            raise AgentFault(f"{self.name}, argument {name!r}: {error}, got {value!r}") from None

    def _spread(self, words: list[str]) -> dict[str, Any]:
        """Words to parameters in order. A number may be spelt digit by digit; the last parameter takes what is left."""
        named: dict[str, Any] = {}
        names = list(self.types)
        left = list(words)
        for position, name in enumerate(names):
            if not left:
                break
            number = self.types[name] in (int, float)
            if position == len(names) - 1:
                taken = len(left)
            elif number and len(left) > len(names) - position:
                taken = _digit_run(left)
            else:
                taken = 1
            named[name] = ("" if number else " ").join(left[:taken])
            left = left[taken:]
        if left:
            raise AgentFault(f"{self.name} takes {self._signature()}, got {len(words)} words")
        return named

    def _signature(self) -> str:
        return f"({', '.join(self.types)})" if self.types else "no arguments"


def _digit_run(words: list[str]) -> int:
    run = 0
    while run < len(words) and len(words[run]) == 1 and words[run].isdigit():
        run += 1
    return max(run, 1)


def make_tool(function: Callable[..., Any]) -> Tool:
    """Describe a function or method (``self`` is left out).

    Every parameter needs a type hint that msgspec can convert to (``int``, ``str``, ``list[int]``, ``Literal[...]``,
    enums, dataclasses, ``X | None`` ...); defaults make parameters optional. Raises TypeError otherwise.
    """
    name = function.__name__
    hints = get_type_hints(function, include_extras=True)
    description, parameter_texts = parse_docstring(inspect.getdoc(function) or "")
    properties: dict[str, Any] = {}
    required: list[str] = []
    for parameter in inspect.signature(function).parameters.values():
        if parameter.name == "self":
            continue
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise TypeError(f"tool {name}: *{parameter.name} cannot be described to a model; name every parameter")
        if parameter.name not in hints:
            raise TypeError(f"tool {name}: parameter {parameter.name!r} has no type hint; add one, e.g. `: str`")
        properties[parameter.name] = _property(name, parameter, hints, parameter_texts)
        if parameter.default is parameter.empty:
            required.append(parameter.name)
    schema = {
        "type": "function",
        "function": {
            "name": name,
            "description": description,
            "parameters": {"type": "object", "properties": properties, "required": required},
        },
    }
    return Tool(name, schema, {key: hints[key] for key in properties}, frozenset(required))


def _property(tool: str, parameter: inspect.Parameter, hints: dict[str, Any], texts: dict[str, str]) -> dict[str, Any]:
    try:
        schema: dict[str, Any] = msgspec.json.schema(hints[parameter.name])
    except TypeError as error:
        raise TypeError(f"tool {tool}: parameter {parameter.name!r} has no JSON schema: {error}") from None
    if parameter.name in texts:
        schema["description"] = texts[parameter.name]
    if parameter.default is not parameter.empty:
        schema["default"] = msgspec.to_builtins(parameter.default)
    return schema


def parse_docstring(text: str) -> tuple[str, dict[str, str]]:
    """First paragraph, and the parameters' texts from an ``Args:`` section or ``:param name:`` fields."""
    lines = text.splitlines()
    description: list[str] = []
    for line in lines:
        stripped = line.strip()
        if not stripped or _REST_FIELD.match(stripped) or _GOOGLE_SECTION.match(stripped):
            break
        description.append(stripped)
    return " ".join(description), {**_google_parameters(lines), **_rest_parameters(lines)}


def _google_parameters(lines: list[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    inside, current, depth = False, "", 0
    for line in lines:
        stripped, indent = line.strip(), len(line) - len(line.lstrip())
        if section := _GOOGLE_SECTION.match(stripped):
            inside, current, depth = section[1] in ("Args", "Arguments", "Parameters"), "", 0
        elif inside and stripped:
            if indent == 0:
                inside = False
                continue
            match = _GOOGLE_PARAMETER.match(stripped) if not current or indent <= depth else None
            if match:
                current, depth = match[1], indent
                found[current] = match[2].strip()
            elif current:
                found[current] = f"{found[current]} {stripped}".strip()
    return found


def _rest_parameters(lines: list[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    current = ""
    for line in lines:
        stripped = line.strip()
        if field := _REST_FIELD.match(stripped):
            current = field[2].split()[-1] if field[1] == "param" and field[2].strip() else ""
            if current:
                found[current] = field[3].strip()
        elif current and stripped:
            found[current] = f"{found[current]} {stripped}".strip()
        else:
            current = ""
    return found


def nearest(name: str, valid: Collection[str]) -> str:
    """`` Did you mean 'x'?`` when something valid is close to ``name``, otherwise nothing."""
    matches = get_close_matches(name, list(valid), n=1, cutoff=0.5)
    return f" Did you mean {matches[0]!r}?" if matches else ""
