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
    in, and :meth:`commit` is the only way on. The matcher belongs to the trail from then on, which
    moves it to where the next question is. ``canonical`` says that forced spans are the output
    (``ForcedMode.CANONICAL``): where one begins, the mask holds its first token alone.

    All methods raise GrammarError when the grammar dies, or does not allow the path.
    """

    def __init__(self, matcher: Matcher, *, canonical: bool) -> None:
        self.canonical = canonical
        self.end_of_turn_id = matcher.end_of_turn_id
        self._matcher = matcher
        self._at: list[int] = []
        self._places: dict[tuple[int, ...], _Place] = {}

    def forced(self, path: Sequence[int] = ()) -> tuple[int, ...]:
        """The canonical tokens of the bytes that must follow, as :meth:`Matcher.forced`."""
        place = self._place(path)
        if place.forced is None:
            self._go(path)
            place.forced = tuple(self._matcher.forced())
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
                place.mask = bitmask.only(span[0], self._matcher.words)
            else:
                self._go(path)
                mask = torch.empty(self._matcher.words, dtype=torch.int32)
                self._matcher.fill_mask(mask)
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
            self._go(path)
            place.over = self._matcher.is_terminated
        return place.over

    def commit(self, tokens: Sequence[int]) -> None:
        """``tokens`` were committed: paths begin after them now."""
        self._go(tokens)
        self._at.clear()
        self._places.clear()

    def _place(self, path: Sequence[int]) -> _Place:
        return self._places.setdefault(tuple(path), _Place())

    def _go(self, path: Sequence[int]) -> None:
        """Move the matcher to ``path``."""
        shared = 0
        for ours, theirs in zip(self._at, path, strict=False):
            if ours != theirs:
                break
            shared += 1
        self._matcher.rollback(len(self._at) - shared)
        del self._at[shared:]
        self._matcher.accept(path[shared:])
        self._at.extend(path[shared:])
