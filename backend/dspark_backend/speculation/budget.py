"""How much of a proposal is verified: pure policies over survivals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dspark_backend.errors import RequestError


@dataclass(frozen=True, slots=True)
class Budget:
    """Verify at most ``length`` drafts, and none whose survival is below ``threshold``.

    Non-anticipating: whether position k is verified is decided from survivals up to k, which do
    not depend on x_k (DSPARK.md, section 6).
    """

    length: int
    threshold: float = 0.0

    def __post_init__(self) -> None:
        if self.length < 0:
            raise RequestError(f"a budget's length is at least 0, not {self.length}")
        if not 0.0 <= self.threshold <= 1.0:
            raise RequestError(f"a budget's threshold is a probability, not {self.threshold}")

    def take(self, survival: Sequence[float], room: int) -> int:
        """How many of the drafts to verify; ``room`` is what the step may still write, less one
        for the token that follows the drafts."""
        most = min(self.length, room, len(survival))
        taken = 0
        while taken < most and survival[taken] >= self.threshold:
            taken += 1
        return max(taken, 0)
