"""Samples that share prefixes, for the tests of prefix trees."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from learner.batching import Sample

Sequences = list[np.ndarray]


@st.composite
def forests(draw: st.DrawFn, most: int = 8, vocabulary: int = 64) -> Sequences:
    """Sequences grown from one another: each begins with some of an earlier one (perhaps all, perhaps nothing)."""
    seed = draw(st.integers(0, 2**16))
    rng = np.random.default_rng(seed)
    sequences: Sequences = []
    for index in range(draw(st.integers(1, most))):
        own = draw(st.integers(0, 24))
        kept = np.zeros(0, np.int32)
        if index:
            origin = sequences[draw(st.integers(0, index - 1))]
            kept = origin[: draw(st.integers(0, len(origin)))]
        # A small vocabulary makes sequences agree by chance too.
        grown = np.concatenate([kept, rng.integers(0, vocabulary, own).astype(np.int32)])
        sequences.append(grown if len(grown) else rng.integers(0, vocabulary, 1).astype(np.int32))
    return sequences


def as_samples(sequences: Sequences, seed: int = 0, *, trained: float = 0.5) -> list[Sample]:
    """Samples of these tokens, longest first, each with advantages, lags and temperatures of its own."""
    rng = np.random.default_rng(seed)
    samples = []
    for index, inputs in enumerate(sequences):
        positions = np.flatnonzero(rng.random(len(inputs)) < trained)
        positions = np.union1d(positions, [len(inputs) - 1])
        following = np.append(inputs[1:], rng.integers(0, 64))
        samples.append(
            Sample(
                trajectory_id=f"t{index}",
                group_id=f"g{index % 2}",
                inputs=inputs.astype(np.int32),
                positions=positions,
                targets=following[positions].astype(np.int64),
                behaviour=-rng.uniform(2.0, 6.0, len(positions)).astype(np.float32),
                lags=rng.integers(0, 3, len(positions)),
                advantage=float(rng.normal()),
                temperature=float(rng.choice([0.7, 1.0])),
            )
        )
    return sorted(samples, key=len, reverse=True)
