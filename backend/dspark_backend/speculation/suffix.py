"""Where a log's ending occurred before: an index over token ids that grows and shrinks with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dspark_backend.errors import RequestError
from dspark_backend.speculation.suffix_kernels import Ids, continuation, matching_ends

VOTERS = 32  # most occurrences of one ending that are kept, hence asked how it went on
_GRAIN = 256  # tokens


@dataclass(frozen=True, slots=True)
class Match:
    """The longest ending of a log that occurs in a text, with something behind it.

    ``length`` is in tokens, 0 for none. ``ends`` are the positions of its last token in the text,
    most recent first, at most ``VOTERS``. ``operations`` is what the search took: positions
    visited and tokens compared.
    """

    length: int
    ends: tuple[int, ...]
    operations: int


@dataclass(frozen=True, slots=True)
class Continuation:
    """What followed a match: ``tokens[k]`` was said by ``votes[k]`` of the ``voters[k]``
    occurrences that had said ``tokens[:k]`` and went on."""

    tokens: tuple[int, ...] = ()
    votes: tuple[int, ...] = ()
    voters: tuple[int, ...] = ()


class SuffixIndex:
    """A text, and for each position the one before it that holds the same token.

    Appending and truncating take constant time a token; a search visits the occurrences of the
    log's last token alone, and takes at most three operations for each token of the text. Holds 12
    bytes a token of capacity (at most half more than the longest length it had), and a dictionary
    entry for each distinct token. Not thread-safe.
    """

    def __init__(self) -> None:
        self._length = 0
        self._floor = 0
        self._tokens: Ids = np.empty(0, np.int32)
        self._previous: Ids = np.empty(0, np.int32)
        self._extents: Ids = np.empty(0, np.int32)
        self._matched = False
        self._last: dict[int, int] = {}

    def __len__(self) -> int:
        return self._length

    @property
    def tokens(self) -> Ids:
        """The text, int32 [length], a view for reading; -1 is a border."""
        return self._tokens[: self._length]

    def append(self, tokens: Sequence[int]) -> None:
        """Let the text go on with ``tokens``.

        Raises RequestError for a negative id; nothing was appended then.
        """
        if len(tokens) and min(tokens) < 0:
            raise RequestError(f"a token id is at least 0, not {min(tokens)}: nothing was appended")
        self._append(tokens)

    def border(self) -> None:
        """End a document: no match and no continuation reaches across."""
        self._append((-1,))

    def truncate(self, length: int) -> None:
        """Take back all but the first ``length`` tokens; exactly what it was when it had those.

        Raises RequestError if it holds fewer.
        """
        if not 0 <= length <= self._length:
            raise RequestError(
                f"cannot truncate a suffix index to {length} tokens: it holds {self._length}"
            )
        tokens = self._tokens[length : self._length].tolist()
        previous = self._previous[length : self._length].tolist()
        for token, before in zip(reversed(tokens), reversed(previous), strict=True):
            if before < 0:
                del self._last[token]
            else:
                self._last[token] = before
        self._length = length
        self._matched = False

    def forget_before(self, position: int) -> None:
        """Match nothing before ``position``, which must hold a border; memory is kept."""
        self._floor = position

    def fork(self) -> SuffixIndex:
        """An independent copy: 8 bytes a token and the dictionary are copied."""
        other = SuffixIndex()
        other._reserve(self._length)
        other._tokens[: self._length] = self.tokens
        other._previous[: self._length] = self._previous[: self._length]
        other._last = self._last.copy()
        other._length, other._floor = self._length, self._floor
        return other

    def match(self) -> Match:
        """The longest ending of this text that occurs in it earlier; overlaps count, itself does
        not."""
        if not self._length:
            return Match(0, (), 0)
        if len(self._extents) < self._length:
            self._extents = np.empty(len(self._tokens), np.int32)
        self._extents[: self._length] = 0
        self._matched = True
        return self._search(self, int(self._previous[self._length - 1]))

    def match_in(self, other: SuffixIndex) -> Match:
        """The longest ending of this text that occurs in ``other``."""
        if not self._length:
            return Match(0, (), 0)
        if not self._matched:
            self.match()
        return self._search(other, other._last.get(int(self._tokens[self._length - 1]), -1))

    def follow(self, match: Match, limit: int, *, extend: bool) -> Continuation:
        """What came after ``match``, a match in this text: at most ``limit`` tokens by majority.

        ``extend`` lets the text go on with the continuation itself, as it does where it is the log
        that is being continued: a period continues as often as it is asked to.
        """
        if not match.ends or limit < 1:
            return Continuation()
        tokens, votes, voters = (np.empty(limit, np.int32) for _ in range(3))
        ends = np.array(match.ends, np.int32)
        count = continuation(self.tokens, ends, extend, tokens, votes, voters)
        return Continuation(
            tuple(tokens[:count].tolist()),
            tuple(votes[:count].tolist()),
            tuple(voters[:count].tolist()),
        )

    def _append(self, tokens: Sequence[int]) -> None:
        first, last = self._length, self._last
        self._reserve(first + len(tokens))
        previous = []
        for position, token in enumerate(tokens, first):
            previous.append(last.get(token, -1))
            last[token] = position
        self._length = first + len(tokens)
        self._tokens[first : self._length] = tokens
        self._previous[first : self._length] = previous
        self._matched = False

    def _search(self, text: SuffixIndex, end: int) -> Match:
        ends = np.empty(VOTERS, np.int32)
        previous = text._previous[: text._length]
        length, count, operations = matching_ends(
            self.tokens, text.tokens, previous, end, text._floor, self._extents, text is self, ends
        )
        return Match(length, tuple(ends[:count].tolist()), operations)

    def _reserve(self, length: int) -> None:
        if length > len(self._tokens):
            capacity = max(_GRAIN, length + length // 2)
            self._tokens = _grown(self._tokens, self._length, capacity)
            self._previous = _grown(self._previous, self._length, capacity)


def warm() -> None:
    """Search a small text: compiles the kernels where this machine has not done so yet."""
    index = SuffixIndex()
    index.append((1, 2, 1))
    index.follow(index.match(), 1, extend=True)


def _grown(values: Ids, kept: int, capacity: int) -> Ids:
    grown = np.empty(capacity, np.int32)
    grown[:kept] = values[:kept]
    return grown
