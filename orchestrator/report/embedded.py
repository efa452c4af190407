"""The trajectories that the page carries for its browser: bounded, as plain data."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from experience.journal import JournalError
from experience.records import NOT_SAMPLED, Trajectory
from experience.wire import WireFormatError
from orchestrator.episodes import Episode, load_trajectories
from orchestrator.report.picks import Picked
from orchestrator.run_directory import RunDirectory
from orchestrator.show import find_tokenizer, token_texts, turns_of

if TYPE_CHECKING:
    from tokenizers import Tokenizer

logger = logging.getLogger(__name__)

MAX_TOKENS = 250_000
"""Tokens of all trajectories in the page together."""

MAX_TOKENS_EACH = 6_000
"""Of a longer trajectory the first and the last half of this are kept."""

CONTEXT, TRAINED, MASKED, UNTRAINED = range(4)
"""What a token was to the learner: not sampled; carried loss; sampled but too old; sampled but not (yet) trained."""


@dataclass
class Embedded:
    """``items`` is what the page's script reads; see ``_item``."""

    items: list[dict[str, Any]] = field(default_factory=list)
    left_out: int = 0
    """Chosen episodes for which there was no room."""
    shortened: int = 0
    decoded: bool = False
    """Whether tokens are shown as text (else as ids)."""
    problems: list[str] = field(default_factory=list)


def embed(run: RunDirectory, picked: Iterable[Picked], max_lag: int | None) -> Embedded:
    """Load the chosen episodes, until the page has enough."""
    tokenizer = _tokenizer(run)
    embedded = Embedded(decoded=tokenizer is not None)
    room = MAX_TOKENS
    for choice in picked:
        try:
            trajectories = load_trajectories(choice.episode)
        except (JournalError, WireFormatError) as error:
            embedded.problems.append(f"episode {choice.episode.episode_id} cannot be read: {error}")
            continue
        for trajectory in trajectories:
            cost = min(len(trajectory), MAX_TOKENS_EACH)
            if cost > room:
                embedded.left_out += 1
                continue
            room -= cost
            embedded.shortened += len(trajectory) > MAX_TOKENS_EACH
            embedded.items.append(_item(choice, trajectory, tokenizer, max_lag))
    embedded.items.sort(key=lambda item: str(item["source"]) != "train")
    return embedded


def _tokenizer(run: RunDirectory) -> Tokenizer | None:
    try:
        return find_tokenizer(run)
    except Exception as error:  # noqa: BLE001 - tokenizers raises bare exceptions; a damaged file must not cost the report
        logger.warning("the run's tokenizer cannot be read, token ids are shown: %s", error)
        return None


def _item(choice: Picked, trajectory: Trajectory, tokenizer: Tokenizer | None, max_lag: int | None) -> dict[str, Any]:
    episode = choice.episode
    pieces = token_texts(trajectory.tokens.tolist(), tokenizer)
    kinds = token_kinds(trajectory, episode, max_lag)
    keep = _kept(len(trajectory))
    turns = [
        {
            "role": turn.role,
            "seconds": round(turn.ended_at - turn.began_at, 4) if turn.ended_at > turn.began_at else None,
            **_tokens(trajectory, pieces, kinds, turn.start, turn.end, keep),
        }
        for turn in turns_of(trajectory)
    ]
    return {
        "id": trajectory.trajectory_id,
        "episode": episode.episode_id,
        "group": episode.group_id,
        "task": trajectory.task_id,
        "domain": trajectory.domain,
        "difficulty": trajectory.difficulty,
        "source": episode.source,
        "why": choice.why,
        "status": str(trajectory.status),
        "error": trajectory.error,
        "dropped": episode.dropped,
        "reward": _finite(trajectory.reward, 6),
        "parts": {name: _finite(value, 4) for name, value in trajectory.reward_parts.items()},
        "step": episode.trained_at,
        "lag": episode.lag,
        "length": len(trajectory),
        "sampled": trajectory.sampled_tokens,
        "cut": max(0, len(trajectory) - MAX_TOKENS_EACH),
        "timings": {name: _finite(seconds, 3) for name, seconds in trajectory.timings.items()},
        "turns": turns,
    }


def _finite(value: float | None, digits: int) -> float | None:
    """Rounded; None for what JSON cannot say (not a number, infinite)."""
    return None if value is None or not math.isfinite(value) else round(value, digits)


def token_kinds(trajectory: Trajectory, episode: Episode, max_lag: int | None) -> npt.NDArray[np.int8]:
    """What each token was to the learner: ``CONTEXT``, ``TRAINED``, ``MASKED`` or ``UNTRAINED``."""
    kinds = np.full(len(trajectory), CONTEXT, np.int8)
    sampled = trajectory.versions != NOT_SAMPLED
    kinds[sampled] = UNTRAINED
    if episode.trained_at is None or episode.dropped is not None:
        return kinds
    carries_loss = sampled & trajectory.trainable
    kinds[carries_loss] = TRAINED
    if max_lag is not None:
        kinds[carries_loss & (episode.trained_at - trajectory.versions > max_lag)] = MASKED
    return kinds


def _kept(length: int) -> npt.NDArray[np.bool_]:
    """Which tokens of a trajectory go into the page."""
    keep = np.ones(length, np.bool_)
    if length > MAX_TOKENS_EACH:
        keep[MAX_TOKENS_EACH // 2 : length - MAX_TOKENS_EACH // 2] = False
    return keep


def _tokens(
    trajectory: Trajectory,
    pieces: list[str],
    kinds: npt.NDArray[np.int8],
    start: int,
    end: int,
    keep: npt.NDArray[np.bool_],
) -> dict[str, Any]:
    """The kept tokens of a turn: ``text`` a token, ``runs`` of (kind, version, tokens), ``logprobs`` where sampled."""
    index = np.flatnonzero(keep[start:end]) + start
    runs: list[list[int]] = []
    for kind, version in zip(kinds[index].tolist(), trajectory.versions[index].tolist(), strict=True):
        if runs and runs[-1][:2] == [kind, version]:
            runs[-1][2] += 1
        else:
            runs.append([kind, version, 1])
    sampled = index[trajectory.versions[index] != NOT_SAMPLED]
    return {
        "text": [pieces[position] for position in index.tolist()],
        "runs": runs,
        "logprobs": [_finite(float(value), 2) for value in trajectory.logprobs[sampled]],
        "cut": int(end - start - len(index)),
    }
