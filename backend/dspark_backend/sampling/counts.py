"""Which tokens the penalties see, kept up to date one token at a time and undone in order."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


class TokenCounts:
    """Distinct tokens of a log, each with how often *this step's output* holds it.

    ``push`` and ``pop`` are O(1) (amortised) and form a stack, so verification can let row k see
    the drafts before it and take them back.
    """

    def __init__(self, log: Sequence[int]) -> None:
        seen = np.unique(np.asarray(log, dtype=np.int64))
        self._size = self._prior = len(seen)
        self._ids = np.zeros(max(64, 2 * len(seen)), dtype=np.int64)
        self._ids[: len(seen)] = seen
        self._counts = np.zeros(len(self._ids), dtype=np.float32)
        self._slot = {token: slot for slot, token in enumerate(seen.tolist())}
        self._stack: list[int] = []

    @property
    def ids(self) -> NDArray[np.int64]:
        """Tokens of the log and of the output, ``[N]``, each once. A view: valid until a push."""
        return self._ids[: self._size]

    @property
    def counts(self) -> NDArray[np.float32]:
        """Occurrences of ``ids`` in the output, ``[N]``; 0 where only the log before it has one."""
        return self._counts[: self._size]

    def push(self, token: int) -> None:
        slot = self._slot.get(token)
        if slot is None:
            slot = self._append(token)
        self._counts[slot] += 1
        self._stack.append(slot)

    def pop(self) -> None:
        """Undo the last push. Raises IndexError when there is none."""
        slot = self._stack.pop()
        self._counts[slot] -= 1
        if slot >= self._prior and self._counts[slot] == 0:
            # Pushes are undone in order, so a token that is gone again was the last to come.
            self._size -= 1
            del self._slot[int(self._ids[slot])]

    def _append(self, token: int) -> int:
        if self._size == len(self._ids):
            self._ids = np.concatenate([self._ids, np.zeros_like(self._ids)])
            self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
        slot = self._size
        self._ids[slot] = token
        self._counts[slot] = 0
        self._slot[token] = slot
        self._size += 1
        return slot
