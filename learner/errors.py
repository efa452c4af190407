"""Errors of the learner."""

from __future__ import annotations


class LearnerError(RuntimeError):
    """Training cannot go on."""


class ModelError(ValueError):
    """A model that is missing, damaged, or not one that can be trained here."""


class CheckpointError(RuntimeError):
    """A checkpoint that is missing, incomplete or damaged, or that cannot be written."""
