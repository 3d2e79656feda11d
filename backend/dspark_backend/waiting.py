"""Which waiting step is admitted next: policy only, no tensors, no clock."""

from __future__ import annotations

import heapq
import math
from collections import OrderedDict
from collections.abc import Iterator
from typing import Generic, TypeVar

from dspark_backend.request import Urgency
from dspark_backend.scheduler import Precedence, precedence

T = TypeVar("T")

PATIENCE = 8
"""How often in a row the step that has waited longest may be overtaken."""


class WaitingLine(Generic[T]):
    """Steps on their way to admission: by urgency, then earliest deadline, then arrival.

    Nothing starves: the one that has waited longest is overtaken ``patience`` times in a row at
    most and then has its turn, so one that finds k others before it leaves with turn
    ``(k + 1) * (patience + 1)`` at the latest, whatever arrives after it. Ageing counts turns and
    not seconds: under overload the urgent ones keep ``patience`` turns of ``patience + 1``.

    Every operation takes logarithmic time. Items are compared by identity of their hash.
    """

    def __init__(self, patience: int = PATIENCE) -> None:
        self._patience = patience
        self._places: OrderedDict[T, Precedence] = OrderedDict()
        self._heap: list[tuple[Precedence, T]] = []
        self._overtaken = 0
        self._arrivals = 0

    def __len__(self) -> int:
        return len(self._places)

    def __iter__(self) -> Iterator[T]:
        """In order of arrival."""
        return iter(self._places)

    def add(self, item: T, urgency: Urgency, due: float = math.inf) -> None:
        """Queue ``item``; ``due`` is when it should be over, on any clock that all items share."""
        place = precedence(urgency, due, self._arrivals)
        self._arrivals += 1
        self._places[item] = place
        heapq.heappush(self._heap, (place, item))

    def remove(self, item: T) -> None:
        """Forget ``item``, wherever it stands. Raises KeyError if it does not wait."""
        if item is self.oldest:
            self._overtaken = 0
        del self._places[item]
        if len(self._heap) > 2 * len(self._places) + 16:
            self._heap = [(place, item) for item, place in self._places.items()]
            heapq.heapify(self._heap)

    @property
    def oldest(self) -> T | None:
        """The one that has waited longest."""
        return next(iter(self._places), None)

    @property
    def next(self) -> T | None:
        """Whose turn it is; None when nobody waits."""
        if self._overtaken >= self._patience:
            return self.oldest
        while self._heap and self._heap[0][1] not in self._places:
            heapq.heappop(self._heap)
        return self._heap[0][1] if self._heap else None

    def take(self) -> T:
        """Remove and give the one whose turn it is. Raises IndexError when nobody waits."""
        item = self.next
        if item is None:
            raise IndexError("nobody waits")
        overtaken = 0 if item is self.oldest else self._overtaken + 1
        self.remove(item)
        self._overtaken = overtaken
        return item
