"""What a grammar allows along the paths that a pass looks at, each place computed once.

A mask costs 50-90 us and forced spans as much, and the same places are asked for three times in a
pass: for the plain mask, while drafting, and when the block is laid out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from dspark_backend.grammar import bitmask

if TYPE_CHECKING:
    from dspark_backend.grammar.matcher import Matcher


@dataclass(slots=True)
class _Place:
    """What is known about one place; None where nobody has asked yet."""

    forced: tuple[int, ...] | None = None
    mask: torch.Tensor | None = None
    width: int | None = None
    over: bool | None = None


class Trail:
    """A step's matcher, seen from the tokens that were committed.

    A *path* is what follows them: asking about one changes nothing, whatever order paths are asked
    in, and :meth:`commit` is the only way on. The matcher belongs to the trail from then on; forks
    of it walk the paths, one at a time. ``canonical`` says that forced spans are the output
    (``ForcedMode.CANONICAL``): where one begins, the mask holds its first token alone.

    All methods raise GrammarError when the grammar dies, or does not allow the path.
    """

    def __init__(self, matcher: Matcher, *, canonical: bool) -> None:
        self.canonical = canonical
        self.end_of_turn_id = matcher.end_of_turn_id
        self._committed = matcher
        self._walker = matcher  # at the end of the path that was asked about last
        self._at: list[int] = []
        self._places: dict[tuple[int, ...], _Place] = {}

    def forced(self, path: Sequence[int] = ()) -> tuple[int, ...]:
        """The canonical tokens of the bytes that must follow, as :meth:`Matcher.forced`."""
        place = self._place(path)
        if place.forced is None:
            place.forced = tuple(self._matcher(path).forced())
            for count in range(1, len(place.forced)):
                inside = self._place((*path, *place.forced[:count]))
                inside.forced, inside.over = place.forced[count:], False
        return place.forced

    def span(self, path: Sequence[int] = ()) -> tuple[int, ...]:
        """What is output by definition: :meth:`forced` in canonical mode, else nothing."""
        return self.forced(path) if self.canonical else ()

    def mask(self, path: Sequence[int] = ()) -> torch.Tensor:
        """The tokens that plain decoding may choose from: ``[words] int32``; not to be written."""
        place = self._place(path)
        if place.mask is None:
            span = self.span(path)
            if span:
                place.mask = bitmask.only(span[0], self._committed.words)
            else:
                mask = torch.empty(self._committed.words, dtype=torch.int32)
                self._matcher(path).fill_mask(mask)
                place.mask = mask  # only a mask that was filled is remembered
        return place.mask

    def width(self, path: Sequence[int] = ()) -> int:
        """How many tokens :meth:`mask` allows."""
        place = self._place(path)
        if place.width is None:
            place.width = bitmask.width(self.mask(path))
        return place.width

    def over(self, path: Sequence[int] = ()) -> bool:
        """Whether nothing can follow but the end of the turn, or the turn has ended."""
        place = self._place(path)
        if place.over is None:
            place.over = self._matcher(path).is_terminated
        return place.over

    def commit(self, tokens: Sequence[int]) -> None:
        """``tokens`` were committed: paths begin after them now."""
        self._committed = self._matcher(tokens)
        self._at.clear()
        self._places.clear()

    def _place(self, path: Sequence[int]) -> _Place:
        return self._places.setdefault(tuple(path), _Place())

    def _matcher(self, path: Sequence[int]) -> Matcher:
        """A matcher at the end of ``path``, to be read only."""
        if not path:
            return self._committed
        known = len(self._at)
        if not known or list(path[:known]) != self._at:
            self._walker, self._at, known = self._committed.fork(), [], 0
        self._walker.accept(path[known:])
        self._at.extend(path[known:])
        return self._walker
