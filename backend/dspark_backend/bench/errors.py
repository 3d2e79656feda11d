"""What can go wrong in a benchmark besides the engine's own errors."""

from __future__ import annotations

from dspark_backend.errors import BackendError


class BenchError(BackendError):
    """A benchmark's input is malformed, or a contender cannot take part."""
