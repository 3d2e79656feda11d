"""What sequences take up, and the memory that is granted to them."""

from __future__ import annotations

from dataclasses import dataclass

from dspark_backend.errors import CapacityError


@dataclass(frozen=True, slots=True)
class KVShape:
    """What one position of a sequence takes up: keys and values of every layer, numbers of
    ``itemsize`` bytes."""

    layers: int
    kv_heads: int
    head_dim: int
    itemsize: int = 4

    @property
    def bytes_per_token(self) -> int:
        return 2 * self.layers * self.kv_heads * self.head_dim * self.itemsize


class KVBudget:
    """The memory granted to all sequences of an engine, counted by capacity held."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.used_bytes = 0

    def fits(self, more_bytes: int) -> bool:
        return self.used_bytes + more_bytes <= self.limit_bytes

    def is_plenty(self, more_bytes: int) -> bool:
        """Whether half of the grant is still free after ``more_bytes``."""
        return self.used_bytes + more_bytes <= self.limit_bytes // 2

    def take(self, more_bytes: int) -> None:
        """Raises CapacityError when the grant is used up; nothing is taken then."""
        if not self.fits(more_bytes):
            raise CapacityError(
                f"the KV memory is used up: {self.used_bytes / 2**20:.0f} of "
                f"{self.limit_bytes / 2**20:.0f} MiB held, {more_bytes / 2**20:.0f} MiB more "
                "needed; close sessions, or load the engine with a larger kv_bytes"
            )
        self.used_bytes += more_bytes

    def give_back(self, count_bytes: int) -> None:
        self.used_bytes -= count_bytes
