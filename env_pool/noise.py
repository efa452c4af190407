"""Disturbed tools, for agents that should learn to cope: a seeded share of steps goes wrong on purpose."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping

NOISE_TEXT = {"timeout": "the tool timed out, try again", "error": "the tool failed, try again"}
"""What the agent is told when a step was not carried out."""


def draw_noise(shares: Mapping[str, float], seed: int, step: int) -> str | None:
    """The kind of disturbance of step number ``step`` of an episode, or None; a pure function of its arguments."""
    if not shares:
        return None
    draw = random.Random(f"noise/{seed}/{step}").random()
    for kind in sorted(shares):
        draw -= shares[kind]
        if draw < 0:
            return kind
    return None


def drop_field(text: str, seed: int, step: int) -> str:
    """The observation with one field missing: a key of a JSON object, an element of a list, or else a word."""
    rng = random.Random(f"field/{seed}/{step}")
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if isinstance(value, dict) and value:
        del value[rng.choice(sorted(value))]
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, list) and value:
        del value[rng.randrange(len(value))]
        return json.dumps(value, ensure_ascii=False)
    words = text.split()
    if len(words) > 1:
        del words[rng.randrange(len(words))]
    return " ".join(words)
