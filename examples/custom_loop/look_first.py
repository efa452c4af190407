"""A rollout loop that sends an answer back once when the agent has not looked anything up."""

from __future__ import annotations

from rollout_workers import Episode


async def look_first(episode: Episode, second_chances: int = 1, bonus: float = 0.2) -> None:
    """Act with tools; an answer given before the first tool call is refused ``second_chances`` times.

    The refusal is a message that only the agent sees: the environment's episode would end with the answer. An agent
    that used a tool unasked earns ``bonus``, one that had to be told so half of it.
    """
    earned, worth = 0.0, bonus
    async with episode.environment() as env:
        opening = await env.reset()
        episode.observe(opening)
        tools = {tool["function"]["name"] for tool in opening.tools}
        for _ in range(episode.config.max_turns):
            action = await episode.generate()
            if action.text.split(" ")[0] in tools:
                earned = max(earned, worth)
            elif not earned and second_chances:
                second_chances -= 1
                worth = bonus / 2
                episode.observe("error")
                continue
            episode.observe(await env.step(action.text))
            if env.done:
                break
    episode.reward(earned, part="looked_first")
