"""Errors of a training run that no change of the recipe's syntax mends (exit code 4)."""

from __future__ import annotations


class TrainingError(RuntimeError):
    """A run failed; what it had saved before stays."""


class NonFiniteError(TrainingError):
    """The loss or the gradient of a step was infinite or not a number."""
