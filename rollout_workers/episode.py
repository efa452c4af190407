"""What a rollout loop holds: `Episode`, with `observe`, `generate`, `environment`, `fork`, `subagent` and `reward`.

Token-in, token-out: the recorded tokens are the history, and only what is new is ever encoded. Before each generation
the chat template renders the whole conversation; that text must start with the recorded text (the *prefix check*), and
what follows is the new context. A template that rewrites history fails the episode or, by
`rollout.on_rewrite=fork`, closes this trajectory and opens another one with the rewritten history as its prompt.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from env_pool.environment import Observation, StepResult
from experience.records import Task
from experience.vitals import DISPATCH, TURNS, process_vitals
from rollout_workers.chat import CONTEXT_OF_DECODING, Message
from rollout_workers.config import RolloutConfig
from rollout_workers.engines.protocol import FinishReason, GenerateRequest, TokenChunk
from rollout_workers.episode_context import EpisodeContext
from rollout_workers.episode_environment import EpisodeEnvironment
from rollout_workers.errors import ContextFull, EngineFault, EpisodeError, HistoryRewritten
from rollout_workers.step_log import StepRecord
from rollout_workers.trajectory_builder import TrajectoryBuilder


@dataclass(frozen=True)
class Generation:
    """What `generate` returns. ``text`` lacks the end-of-turn token and the stop string."""

    text: str
    tokens: Sequence[int]
    logprobs: Sequence[float]
    versions: Sequence[int]
    finish_reason: FinishReason
    stop: str | None = None


class Episode:
    """One attempt at a task, as a rollout loop sees it. A loop is a plain async function::

        async def triage(episode: Episode) -> None:
            async with episode.environment() as env:
                episode.observe(await env.reset())
                while not env.done:
                    action = await episode.generate(max_tokens=256, stop=["</call>"])
                    episode.observe(await env.step(action.text))

    Loops must be deterministic functions of what `generate` and the environment return: after the loss of a worker
    the loop runs again with the recorded results until it has caught up.
    """

    def __init__(self, context: EpisodeContext, builder: TrajectoryBuilder | None = None) -> None:
        self._context = context
        self._builder = builder if builder is not None else context.new_builder()
        self._messages: list[Message] = []
        self._tools: list[dict[str, Any]] = []
        self._text = ""
        """The conversation as text, exactly as recorded in the tokens."""
        self._pending_text: list[str] = []

    @property
    def task(self) -> Task:
        return self._context.task

    @property
    def config(self) -> RolloutConfig:
        return self._context.config

    @property
    def member(self) -> int:
        """Which of the group's episodes this is, from 0."""
        return self._context.member

    @property
    def attempt(self) -> int:
        """How often this episode was started before (after a fault), from 0."""
        return self._context.attempt

    @property
    def turns(self) -> int:
        """Generations so far in this trajectory."""
        return self._builder.generations

    @property
    def length(self) -> int:
        """Tokens so far in this trajectory, context included (what was observed since the last turn is not)."""
        return len(self._builder)

    @property
    def messages(self) -> list[Message]:
        """The conversation so far, as chat messages (a copy)."""
        return [dict(message) for message in self._messages]

    def observe(self, what: Observation | StepResult | Message | str | Sequence[Message]) -> None:
        """Add to the context of the next generation.

        An `Observation` or `StepResult` of an environment, one chat message or several; a plain string is a `user`
        message before the first turn and a `tool` message after it.
        """
        match what:
            case Observation():
                self._messages.extend(what.messages)
                self._tools = what.tools or self._tools
            case StepResult():
                self._messages.extend(what.messages)
            case str():
                self._messages.append({"role": "tool" if self.turns else "user", "content": what})
            case dict():
                self._messages.append(what)
            case _:
                self._messages.extend(what)

    def observe_text(self, text: str) -> None:
        """Add raw text to the context, without any chat template (base models, custom formats)."""
        self._pending_text.append(text)

    async def generate(
        self,
        max_tokens: int | None = None,
        stop: Sequence[str] = (),
        temperature: float | None = None,
    ) -> Generation:
        """Sample one turn.

        ``max_tokens`` defaults to `rollout.max_tokens` and is cut to what is left of `rollout.max_episode_tokens`.
        Raises ContextFull when nothing is left, HistoryRewritten when the prefix check fails. The sampling temperature
        of trained tokens is one per run (the learner divides by it): another one is refused.
        """
        config = self._context.config
        if temperature is not None and temperature != config.temperature and self._context.pinned_version is None:
            raise EpisodeError(
                f"generate(temperature={temperature}) differs from rollout.temperature={config.temperature}; the "
                "learner needs one temperature for all trained tokens, set it in the configuration"
            )
        self._append_context()
        room = config.max_episode_tokens - len(self._builder)
        if room <= 0:
            raise ContextFull(
                f"the trajectory has {len(self._builder)} tokens of rollout.max_episode_tokens={config.max_episode_tokens}"
            )
        chunk = await self._sample(min(max_tokens or config.max_tokens, room), tuple(stop))
        if chunk.finish_reason is FinishReason.ERROR:
            raise EngineFault(chunk.error or "the engine gave no reason")
        return self._accept(chunk)

    @asynccontextmanager
    async def environment(self, **payload: Any) -> AsyncIterator[EpisodeEnvironment]:
        """Lease the task's environment. When the block ends well its `outcome` is kept for the reward branches.

        ``payload`` (plain msgpack types) is added to the task's payload for this environment alone.
        """
        environment = EpisodeEnvironment(self._context, self._builder.trajectory_id, payload)
        try:
            yield environment
            await environment.finish()
        except ContextFull:
            await environment.finish()
            raise
        finally:
            await environment.close()

    def fork(self, n: int) -> list[Episode]:
        """Branch from the current turn: ``n`` episodes that share what was said so far and go on separately.

        Their trajectories belong to this episode; the shared part is trained once, in this trajectory.
        """
        return [self._fork_one() for _ in range(n)]

    def subagent(self, *messages: Message) -> Episode:
        """Open a trajectory with a conversation of its own that belongs to the same episode."""
        child = Episode(self._context)
        child.observe(list(messages))
        return child

    def reward(self, value: float, part: str = "loop") -> None:
        """Give a part of the reward from inside the loop; it is added to that of the configured branches."""
        self._context.reward_parts[part] = float(value)

    def _fork_one(self) -> Episode:
        child = Episode(self._context, self._context.new_builder(parent=self._builder))
        child._messages = self.messages
        child._tools = self._tools
        child._text = self._text
        child._pending_text = list(self._pending_text)
        return child

    def _append_context(self) -> None:
        """Encode what was observed since the last turn."""
        role = "observation" if self._builder.generations else "prompt"
        added = "".join(self._pending_text)
        if self._messages:
            rendered = self._context.chat.render(self._messages, self._tools, generation_prompt=True)
            if not rendered.startswith(self._text):
                self._history_rewritten(rendered)
                role = "prompt"
            added = rendered[len(self._text) :] + added
        self._pending_text.clear()
        self._text += added
        self._builder.append_context(self._context.chat.encode(added), role, self._context.clock())
        if not len(self._builder):
            raise EpisodeError("generate() was called before anything was observed: there is no prompt")

    def _history_rewritten(self, rendered: str) -> None:
        self._context.rewrites += 1
        if self._context.config.on_rewrite == "fail":
            at = next((i for i, (a, b) in enumerate(zip(self._text, rendered, strict=False)) if a != b), len(rendered))
            raise HistoryRewritten(
                f"the chat template rewrites history at character {at}: recorded {self._text[at : at + 40]!r}, rendered "
                f"{rendered[at : at + 40]!r}. Use a template that only appends, or set rollout.on_rewrite=fork"
            )
        self._context.generator.release(self._context.session_of(self._builder))
        self._builder = self._context.new_builder()
        self._text = ""

    async def _sample(self, max_tokens: int, stop: tuple[str, ...]) -> TokenChunk:
        context = self._context
        recorded = context.replay.next_generation(self._builder.trajectory_id)
        if recorded is not None:
            chunk, began_at, ended_at = recorded.chunk(), recorded.began_at, recorded.ended_at
        else:
            if context.ended:
                raise EpisodeError(
                    f"generate() was called after episode {context.episode_id} had ended: await all tasks of the loop "
                    "before it returns (asyncio.TaskGroup does)"
                )
            began_at = context.clock()
            if context.opened_at is not None:
                process_vitals().observe(DISPATCH, began_at - context.opened_at)
                context.opened_at = None
            chunk = await context.generator.generate(
                GenerateRequest(
                    request_id=f"{context.session_of(self._builder)}@{len(self._builder)}",
                    session_id=context.session_of(self._builder),
                    prompt=self._builder.prompt(),
                    max_tokens=max_tokens,
                    temperature=context.config.temperature,
                    top_p=context.config.top_p,
                    top_k=context.config.top_k,
                    stop=stop,
                    seed=context.seed_of(self._builder),
                    pinned_version=context.pinned_version,
                    prefix_group=context.group_id,
                )
            )
            ended_at = context.clock()
            context.generate_s += ended_at - began_at
            process_vitals().count(TURNS)
        if chunk.finish_reason is not FinishReason.ERROR:
            context.record(self._generation_record(chunk, began_at, ended_at))
            self._builder.append_generation(chunk, began_at, ended_at)
        return chunk

    def _generation_record(self, chunk: TokenChunk, began_at: float, ended_at: float) -> StepRecord:
        return StepRecord(
            episode_id=self._context.episode_id,
            attempt=self._context.attempt,
            trajectory_id=self._builder.trajectory_id,
            call="generate",
            tokens=chunk.tokens,
            logprobs=chunk.logprobs,
            versions=chunk.versions,
            finish_reason=chunk.finish_reason,
            stop_match=chunk.stop_match,
            began_at=began_at,
            ended_at=ended_at,
        )

    def _accept(self, chunk: TokenChunk) -> Generation:
        """Continue the text with what was sampled and add the assistant's message."""
        chat = self._context.chat
        tokens = chunk.tokens.tolist()
        sampled_text = chat.decode(tokens, after=self._builder.tail(CONTEXT_OF_DECODING, before=len(tokens)))
        self._text += sampled_text
        content = sampled_text
        if chunk.finish_reason is FinishReason.STOP and chunk.stop_match is None:
            content = chat.without_end_token(sampled_text, tokens)
        if self._messages:
            self._messages.append({"role": "assistant", "content": content})
        text = content
        if chunk.stop_match is not None and chunk.stop_match in content:
            text = content[: content.rindex(chunk.stop_match)]
        self._context.final_text = text
        return Generation(
            text=text.strip(),
            tokens=tokens,
            logprobs=chunk.logprobs.tolist(),
            versions=chunk.versions.tolist(),
            finish_reason=chunk.finish_reason or FinishReason.STOP,
            stop=chunk.stop_match,
        )
