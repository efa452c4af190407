"""Faults of an episode, by whose fault it is.

Environment and system faults live in `env_pool.errors`; here are those that a rollout loop or the model can cause.
"""

from __future__ import annotations


class EpisodeError(Exception):
    """An episode cannot go on; ``reason`` is the short name under which it is counted."""

    reason = "episode_error"


class LoopFault(EpisodeError):
    """The user's rollout loop raised, returned without generating, or never ended."""

    reason = "loop_fault"


class LoopTimeout(LoopFault):
    """The rollout loop did not end in time."""

    reason = "loop_timeout"


class HistoryRewritten(EpisodeError):
    """The chat template rendered the recorded conversation differently from how it was sampled."""

    reason = "history_rewritten"


class EngineFault(EpisodeError):
    """No engine could serve a request."""

    reason = "engine_fault"


class ContextFull(EpisodeError):
    """The trajectory has reached `rollout.max_episode_tokens`; the episode ends as `truncated`."""

    reason = "context_full"


class ChatTemplateMissing(EpisodeError):
    """Messages were observed but the model's tokenizer has no chat template."""

    reason = "no_chat_template"
