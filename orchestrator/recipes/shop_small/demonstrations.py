"""Conversations of the clumsy clerk with the shop, as tokens."""

from __future__ import annotations

import random
from collections.abc import Iterator

from tokenizers import Tokenizer

from env_pool.environment import StepResult
from env_pool.shop.clerk import ClumsyClerk
from env_pool.shop.environment import ShopEnvironment
from experience.records import Task
from learner.warm_up import Demonstration
from orchestrator.recipes.shop_small.vocabulary import END_OF_TURN


def conversation(task: Task, actions: list[str]) -> Iterator[tuple[str, bool]]:
    """Act in a fresh shop; yields pieces of the conversation, and whether the piece is the model's."""
    shop = ShopEnvironment()
    shop.reset(task)
    yield f"ask {task.payload['request']} /", False
    for action in actions:
        yield f"{action} {END_OF_TURN}", True
        result = shop.step(action)
        assert isinstance(result, StepResult)
        if result.observation:
            yield f"> {result.observation} .", False
    shop.close()


def demonstrate(tokenizer: Tokenizer, clerk: ClumsyClerk, count: int, seed: int) -> list[Demonstration]:
    """``count`` demonstrations on training tasks, decided by ``seed`` alone."""
    rng = random.Random(f"demonstrations/{seed}")
    made = []
    for index in range(count):
        task = ShopEnvironment.make_task(index, seed, "train", {})
        tokens: list[int] = []
        trained: list[bool] = []
        for text, own in conversation(task, clerk.act(task, rng)):
            ids = tokenizer.encode(text, add_special_tokens=False).ids
            tokens += ids
            trained += [own] * len(ids)
        made.append(Demonstration(tokens, trained))
    return made
