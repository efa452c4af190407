"""Errors of the weight synchronisation."""

from __future__ import annotations


class WeightTransferError(RuntimeError):
    """Weights could not be moved, or what arrived is not what was offered. The receiver must not commit."""


class TransitionError(RuntimeError):
    """An event that the state machine does not allow in its present state."""
