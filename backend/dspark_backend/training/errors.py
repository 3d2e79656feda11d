"""What stops a training run, beside the engine's own errors."""

from __future__ import annotations

from dspark_backend.errors import BackendError


class TrainingError(BackendError):
    """Prompts, rollouts, settings or a training state that cannot be used; says what to do."""
