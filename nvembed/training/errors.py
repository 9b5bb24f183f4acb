"""Errors of a training run (exit code 4). Free of torch: the launcher raises them before any worker imports it."""

from __future__ import annotations


class TrainingError(RuntimeError):
    """The run failed; its checkpoints stay."""


class NonFiniteError(TrainingError):
    """The loss or the gradient of a step was infinite or not a number."""
