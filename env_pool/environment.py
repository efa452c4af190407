"""What an environment is, at two depths.

Depth two is :class:`Environment`: ``reset``, ``step``, ``close`` and the evidence (``outcome``) for the verifier.
Depth one is :class:`ToolEnvironment`: ``reset`` and public methods, each of them a tool; parsing, schemas, argument
conversion and error observations come with the base class::

    class Counter(ToolEnvironment):
        name = "counter"
        deterministic = True

        @classmethod
        def make_task(cls, index, seed, split, options):
            target = random.Random(f"{seed}/{split}/{index}").randint(1, 9)
            return Task(task_id=f"{split}/{index}", environment=cls.name, payload={"target": target})

        @classmethod
        def verify(cls, task, outcome):
            return VerifierResult(reward=float(outcome["value"] == task.payload["target"]))

        def reset(self, task):
            self.value = 0
            return f"Count up to {task.payload['target']}."

        def add(self, amount: int) -> str:
            '''Add to the counter.'''
            self.value += amount
            return str(self.value)

        def outcome(self):
            return {**super().outcome(), "value": self.value}

An instance serves one episode and is thrown away. Every method may be ``async``; synchronous ones run on a thread of
the environment actor, never on its event loop, and possibly on different threads one after another. ``make_task`` and
``verify`` belong to the class: they run elsewhere than the episode (in the dispatcher, in a reward actor), so all that
an instance or a verifier needs is in ``task.payload`` and ``outcome()``, both plain msgpack data.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Mapping
from inspect import isawaitable, isfunction
from typing import Any, ClassVar, Literal

import msgspec

from env_pool.errors import AgentFault
from env_pool.tools import Answer, Malformed, Tool, ToolCall, make_tool, nearest, parse_action
from experience.records import Task

Split = Literal["train", "held_out"]
"""Which tasks: those to train on, or those only evaluated. No task is in both, by construction of ``make_task``."""

Message = dict[str, Any]
"""One chat message: ``role`` and ``content``, as chat templates take them."""


class Observation(msgspec.Struct, kw_only=True):
    """What an episode starts with: messages to open the conversation, and the tools (OpenAI function schemas)."""

    messages: list[Message]
    tools: list[dict[str, Any]] = msgspec.field(default_factory=list)


class StepResult(msgspec.Struct, kw_only=True, gc=False):
    """What came of one action."""

    observation: str = ""
    """Text the agent sees next; empty when there is nothing more to see."""
    done: bool = False
    fault: str | None = None
    """Why the action was the agent's mistake, if it was. The episode goes on unless ``done``."""
    role: str = "tool"
    """Role of the message that carries ``observation``."""

    @property
    def messages(self) -> list[Message]:
        """Messages to add to the conversation."""
        return [{"role": self.role, "content": self.observation}] if self.observation else []


class VerifierResult(msgspec.Struct, frozen=True, kw_only=True):
    """A judgement: ``reward`` and, where there are several, the named parts it was made of."""

    reward: float
    parts: dict[str, float] = msgspec.field(default_factory=dict)


class Environment:
    """Depth two: the agent's raw text in, an observation out. Constructed without arguments, used for one episode."""

    name: ClassVar[str] = ""
    """Name in the registry and in ``Task.environment``."""
    deterministic: ClassVar[bool] = False
    """The same task and actions always give the same observations, so a lost instance may be rebuilt by replay."""
    default_options: ClassVar[Mapping[str, Any]] = {}
    """Keys of ``tasks.options`` that ``make_task`` understands, with their defaults."""

    @classmethod
    def make_task(cls, index: int, seed: int, split: Split, options: Mapping[str, Any]) -> Task:
        """Task number ``index`` (from 0) of a split: a pure function of its arguments.

        ``options`` is ``tasks.options`` of the configuration; pass it through :meth:`resolve_options`.
        """
        raise NotImplementedError(f"{cls.__name__}.make_task(index, seed, split, options) must return a Task")

    @classmethod
    def verify(cls, task: Task, outcome: Mapping[str, Any]) -> VerifierResult:
        """Judge what :meth:`outcome` returned at the end of an episode."""
        raise NotImplementedError(f"{cls.__name__}.verify(task, outcome) must return a VerifierResult")

    @classmethod
    def resolve_options(cls, options: Mapping[str, Any]) -> dict[str, Any]:
        """``default_options`` overridden by ``options``. Raises ValueError on a key that is not among them."""
        for key in options:
            if key not in cls.default_options:
                raise ValueError(
                    f"tasks.options.{key}: environment {cls.name!r} has no such option, "
                    f"valid are {sorted(cls.default_options)}.{nearest(key, cls.default_options)}"
                )
        return {**cls.default_options, **options}

    def reset(self, task: Task) -> Observation | str | Awaitable[Observation | str]:
        """Begin the episode. A plain string becomes one user message."""
        raise NotImplementedError(f"{type(self).__name__}.reset(task) must return an Observation or a string")

    def step(self, action: str) -> StepResult | Awaitable[StepResult]:
        """Carry out what the agent wrote."""
        raise NotImplementedError(f"{type(self).__name__}.step(action) must return a StepResult")

    def outcome(self) -> dict[str, Any] | Awaitable[dict[str, Any]]:
        """Evidence for :meth:`verify`, in plain msgpack types; asked for once, when the episode is over."""
        return {}

    def close(self) -> Awaitable[None] | None:
        """Let go of what the instance holds. Called once, also after a failed ``reset``."""

    def snapshot(self) -> bytes | Awaitable[bytes | None] | None:
        """The whole state as bytes, or None: this environment takes no snapshots."""
        return None

    def restore(self, task: Task, state: bytes) -> Awaitable[None] | None:
        """Take the place of the instance that made ``state``; called instead of ``reset``."""
        raise NotImplementedError(f"{type(self).__name__} makes snapshots, so it must define restore(task, state)")

    def tool_schemas(self) -> list[dict[str, Any]]:
        """OpenAI function schemas that the agent is shown, unless ``reset`` returned some."""
        return []


class ToolEnvironment(Environment):
    """Depth one: every public method that a subclass adds is a tool.

    A tool's parameters need type hints; its docstring describes it. What it returns becomes the observation (text as
    it is, None as ``ok``, anything else as JSON). It raises :class:`~env_pool.errors.AgentFault` to tell the agent of
    a mistake; any other exception is a fault of the environment. The agent's answer ends the episode.
    """

    word_syntax: bool = True
    """Accept ``tool word word`` beside JSON calls. May be set on the instance, in ``reset``."""
    answer: str | None = None
    """The agent's final answer, once given."""
    calls: int = 0
    """Tool calls that were carried out."""
    faults: int = 0
    """Actions that were the agent's mistake."""

    def step(self, action: str) -> StepResult | Awaitable[StepResult]:
        tools = tools_of(type(self))
        parsed = parse_action(action, tools, self.word_syntax)
        match parsed:
            case Answer(text):
                self.answer = text
                return StepResult(done=True)
            case Malformed(reason):
                return self._mistake(reason)
            case ToolCall(name, _) if name not in tools:
                return self._mistake(f"there is no tool {name!r}, only {', '.join(tools)}")
            case ToolCall(name, arguments):
                return self._call(tools[name], arguments)

    def outcome(self) -> dict[str, Any]:
        """``answer``, ``calls`` and ``faults``; add the final state: ``{**super().outcome(), "rows": ...}``."""
        return {"answer": self.answer, "calls": self.calls, "faults": self.faults}

    def tool_schemas(self) -> list[dict[str, Any]]:
        return [tool.schema for tool in tools_of(type(self)).values()]

    def render_result(self, value: Any) -> str:
        """Text of a tool's return value."""
        if value is None:
            return "ok"
        return value if isinstance(value, str) else json.dumps(msgspec.to_builtins(value), ensure_ascii=False)

    def render_error(self, reason: str) -> str:
        """Text that tells the agent of its mistake."""
        return f"error: {reason}"

    def _call(self, tool: Tool, arguments: dict[str, Any] | list[str]) -> StepResult | Awaitable[StepResult]:
        try:
            value = getattr(self, tool.name)(**tool.bind(arguments))
        except AgentFault as fault:
            return self._mistake(str(fault))
        if isawaitable(value):
            return self._finish(value)
        self.calls += 1
        return StepResult(observation=self.render_result(value))

    async def _finish(self, pending: Awaitable[Any]) -> StepResult:
        try:
            value = await pending
        except AgentFault as fault:
            return self._mistake(str(fault))
        self.calls += 1
        return StepResult(observation=self.render_result(value))

    def _mistake(self, reason: str) -> StepResult:
        self.faults += 1
        return StepResult(observation=self.render_error(reason), fault=reason)


_TOOLS: dict[type[ToolEnvironment], dict[str, Tool]] = {}


def tools_of(environment: type[ToolEnvironment]) -> dict[str, Tool]:
    """The tools of a class by name, in the order of their definition, base classes first."""
    if environment in _TOOLS:
        return _TOOLS[environment]
    tools: dict[str, Tool] = {}
    for parent in reversed(environment.__mro__):
        if parent is object or issubclass(ToolEnvironment, parent):
            continue
        for name, member in vars(parent).items():
            if isfunction(member) and not name.startswith("_") and not hasattr(ToolEnvironment, name):
                tools[name] = make_tool(member)
    if not tools:
        raise TypeError(f"{environment.__name__} has no public methods besides the protocol's: it has no tools")
    _TOOLS[environment] = tools
    return tools


def as_observation(environment: Environment, value: Any) -> Observation:
    """What ``reset`` returned, in its full form. Raises TypeError when it is neither a string nor an Observation."""
    if isinstance(value, str):
        value = Observation(messages=[{"role": "user", "content": value}])
    if not isinstance(value, Observation):
        raise TypeError(f"reset must return an Observation or a string, got {type(value).__name__}")
    return value if value.tools else Observation(messages=value.messages, tools=environment.tool_schemas())
