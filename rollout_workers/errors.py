"""Faults of an episode, by whose fault it is.

Environment and system faults live in `env_pool.errors`; here are those that a rollout loop or the model can cause.
"""

from __future__ import annotations

import traceback


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


def user_error(loop: str, error: Exception) -> str:
    """The error of user code: its type, message and the innermost lines of its traceback."""
    frames = traceback.extract_tb(error.__traceback__)[-3:]
    where = "; ".join(f"{frame.filename}:{frame.lineno} in {frame.name}: {frame.line}" for frame in frames)
    return f"rollout loop {loop!r} raised {type(error).__name__}: {error} ({where})"


class EpisodeFailed(Exception):
    """An episode was given up; carries what is reported."""

    def __init__(self, reason: str, cause: str) -> None:
        super().__init__(f"{reason}: {cause}")
        self.reason = reason
        self.cause = cause

    @classmethod
    def undelivered(cls, error: Exception) -> EpisodeFailed:
        """The queue or the controller did not take it; ``error`` may be one that Ray brought from another process."""
        cause = getattr(error, "cause", None) or error
        return cls("delivery_fault", f"{type(cause).__name__}: {(str(cause).splitlines() or [''])[0]}")
