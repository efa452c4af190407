"""The bundled rollout loops, and how a user's own is found."""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Awaitable, Callable

from env_pool.workloads.environment import script_of
from env_pool.workloads.scripts import carried_tokens
from rollout_workers.episode import Episode

RolloutLoop = Callable[..., Awaitable[None]]


async def single_turn(episode: Episode) -> None:
    """One prompt, one answer: the environment is told the answer and judges it."""
    async with episode.environment() as env:
        episode.observe(await env.reset())
        answer = await episode.generate()
        await env.step(answer.text)


async def tool_agent(episode: Episode, max_turns: int | None = None) -> None:
    """Act until the environment says that it is over, or `rollout.max_turns` turns are used up."""
    async with episode.environment() as env:
        episode.observe(await env.reset())
        for _ in range(max_turns or episode.config.max_turns):
            action = await episode.generate()
            episode.observe(await env.step(action.text))
            if env.done:
                break


async def scripted(episode: Episode) -> None:
    """Play a task of the `workload` environment: as many tokens, tool calls and observations as its script says."""
    payload = episode.task.payload
    script = script_of(payload, episode.member)
    async with episode.environment(member=episode.member, attempt=episode.attempt) as env:
        for message in (await env.reset()).messages:
            episode.observe_text(message["content"])
        for turn in script.turns:
            action = await episode.generate(max_tokens=carried_tokens(turn.output_tokens, payload["token_scale"]))
            result = await env.step(action.text)
            if env.done:
                break
            episode.observe_text(result.observation)


BUNDLED: dict[str, RolloutLoop] = {"single_turn": single_turn, "tool_agent": tool_agent, "scripted": scripted}


def load_loop(name: str) -> RolloutLoop:
    """A bundled loop by name, or `package.module:function`. ValueError says what is wrong with the name."""
    if name in BUNDLED:
        return BUNDLED[name]
    if ":" not in name:
        close = difflib.get_close_matches(name, BUNDLED, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(
            f"rollout.loop: {name!r} is neither a bundled loop ({', '.join(BUNDLED)}) nor of the form "
            f"package.module:function{hint}"
        )
    module_name, _, function_name = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ValueError(
            f"rollout.loop: cannot import {module_name!r} for {name!r}: {error}. The module must be on PYTHONPATH or in "
            "the directory that millrace is started from"
        ) from error
    loop = getattr(module, function_name, None)
    if loop is None:
        names = [key for key, value in vars(module).items() if inspect.iscoroutinefunction(value)]
        raise ValueError(f"rollout.loop: {module_name} has no {function_name!r}; its async functions are {names}")
    if not inspect.iscoroutinefunction(loop):
        raise ValueError(f"rollout.loop: {name} must be an async function taking an Episode (`async def`)")
    return loop  # type: ignore[no-any-return]
