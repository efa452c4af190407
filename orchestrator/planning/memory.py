"""Bytes: of trajectories, of KV, of weights."""

from __future__ import annotations

TOKEN_BYTES = 13
"""Of a token in a trajectory: id 4, trainable 1, log-probability 4, version 4."""
TRAJECTORY_BYTES = 1024
"""Allowance for the rest of a trajectory: ids, turns, timings, reward parts."""
MEBIBYTE = 1 << 20
