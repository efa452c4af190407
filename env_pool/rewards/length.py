"""Bundled branches that judge how long an episode was."""

from __future__ import annotations

from env_pool.rewards.records import RewardSample


class Overlong:
    """Soft punishment of length: 0 up to ``max_tokens - buffer_tokens`` sampled tokens, then linearly down to -1 at ``max_tokens``.

    Yu et al. 2025, "DAPO", arXiv:2503.14476, eq. 13 (soft overlong punishment). Added to the correctness reward.

    >>> Overlong(max_tokens=100, buffer_tokens=20).punishment(90)
    -0.5
    """

    def __init__(self, max_tokens: int, buffer_tokens: int) -> None:
        if not 0 < buffer_tokens <= max_tokens:
            raise ValueError(
                f"rewards (overlong): args.buffer_tokens={buffer_tokens} must lie between 1 and args.max_tokens={max_tokens}"
            )
        self._max, self._buffer = max_tokens, buffer_tokens

    def punishment(self, tokens: int) -> float:
        """Of an episode with so many sampled tokens, from -1 to 0."""
        return -min(max((tokens - (self._max - self._buffer)) / self._buffer, 0.0), 1.0)

    def score(self, sample: RewardSample) -> float:
        return self.punishment(sample.sampled_tokens)
