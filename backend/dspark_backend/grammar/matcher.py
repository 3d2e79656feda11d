"""The position of one turn inside its grammar: masks, forced tokens, advance."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

from dspark_backend.errors import GrammarError

if TYPE_CHECKING:
    import torch
    from llguidance import LLMatcher, LLTokenizer


class Matcher:
    """A cursor over one grammar, thin over llguidance's.

    The state is a function of the accepted tokens alone, and a ``fork`` shares nothing with its
    origin: it is how one looks ahead. There is no way back, since llguidance's own is not sound: a
    mask asked for behind the place that is gone back to can turn up again at another one (1.9.1).
    Failed calls leave the state as it was.
    The end-of-turn token is part of the language: legal wherever the grammar is satisfied, and
    nothing is legal after it. Not thread-safe; a matcher belongs to the session that steps it.

    A *canonical* matcher's mask allows one token wherever the bytes that must follow have one
    canonical tokenisation: ``forced`` and masks then describe the same text. The other kind allows
    every tokenisation of those bytes, and ``forced`` is a proposal. Either kind accepts them all.
    """

    __slots__ = ("_accepted", "_cores", "_ended", "_tables", "end_of_turn_id", "words")

    def __init__(
        self, cores: tuple[LLMatcher, ...], tables: LLTokenizer, end_of_turn_id: int
    ) -> None:
        """``cores`` are parsers in one state: the first decides and masks, the last forces."""
        self._cores = cores
        self._tables = tables
        self._accepted = 0
        self._ended = False
        self.end_of_turn_id = end_of_turn_id
        self.words: int = (tables.vocab_size + 31) // 32
        """Length of a mask row: one bit a token id, lowest bit first."""

    @property
    def accepted(self) -> int:
        """How many tokens were accepted, the end of the turn included."""
        return self._accepted

    @property
    def is_accepting(self) -> bool:
        """Whether the turn may end here."""
        return self._ended or bool(self._cores[0].is_accepting())

    @property
    def is_terminated(self) -> bool:
        """Whether nothing can follow but the end of the turn (or the turn has ended)."""
        return self._ended or bool(self._cores[0].is_stopped())

    def fill_mask(self, row: torch.Tensor) -> None:
        """Write the legal next tokens into ``row``: ``[words] int32``, contiguous, on the CPU.

        Bit ``i % 32`` of word ``i // 32`` is set when token ``i`` is legal. In a terminated state
        that is the end-of-turn token alone.

        Raises:
            GrammarError: the turn has ended already, or the parser ran into a resource limit.
            ValueError: ``row`` has another shape, type or layout.
        """
        if self._ended:
            raise GrammarError("the turn has ended: no token can follow its end-of-turn token")
        if row.shape != (self.words,) or row.element_size() != 4 or not row.is_contiguous():
            raise ValueError(
                f"a mask row is contiguous int32 [{self.words}], got {row.dtype} {list(row.shape)}"
            )
        self._cores[0].unsafe_compute_mask_ptr(row.data_ptr(), self.words * 4)
        self._check()

    def accepts_prefix(self, tokens: Sequence[int]) -> int:
        """How many of ``tokens``, from the first, would be legal here; the state stays."""
        if self._ended or not tokens:
            return 0
        if tokens[0] == self.end_of_turn_id:  # the parser itself denies it once it has stopped
            return int(self.is_accepting)
        limit = self._tables.vocab_size
        known = list(itertools.takewhile(lambda token: 0 <= token < limit, tokens))
        return int(self._cores[0].validate_tokens(known)) if known else 0

    def accept(self, tokens: Sequence[int]) -> None:
        """Advance over ``tokens``, all of them or none.

        Raises:
            GrammarError: names the first token that is not legal, and what came before it.
        """
        legal = self.accepts_prefix(tokens)
        if legal != len(tokens):
            raise GrammarError(self._illegal(tokens, legal))
        if not tokens:
            return
        ends = tokens[-1] == self.end_of_turn_id
        body = list(tokens[:-1] if ends else tokens)
        if body:
            for core in self._cores:
                core.consume_tokens(body)
            self._check()
        self._ended = ends
        self._accepted += len(tokens)

    def forced(self) -> list[int]:
        """The canonical tokens of the bytes that must come next, without those at the end that a
        longer legal token could swallow (DSPARK.md, section 6). Empty where there is a choice, and
        where only the end of the turn is left."""
        if self._ended:
            return []
        tokens = [int(token) for token in self._cores[-1].compute_ff_tokens()]
        return tokens[:-1] if tokens and tokens[-1] == self.end_of_turn_id else tokens

    def fork(self) -> Matcher:
        """An independent matcher in the same state."""
        cores = tuple(core.deep_copy() for core in self._cores)
        twin = Matcher(cores, self._tables, self.end_of_turn_id)
        twin._accepted = self._accepted
        twin._ended = self._ended
        return twin

    def _check(self) -> None:
        for core in self._cores:
            if core.is_error():
                raise GrammarError(f"the grammar died in the turn: {core.get_error()}")

    def _illegal(self, tokens: Sequence[int], at: int) -> str:
        before = self._tables.dbg_tokens(list(tokens[max(0, at - 8) : at]))
        token = tokens[at]
        known = 0 <= token < self._tables.vocab_size
        shown = self._tables.dbg_tokens([token]) if known else "(no such id)"
        return (
            f"token {token} {shown} at place {self._accepted + at} of the turn is not legal in its"
            f" grammar (just before it: {before})"
        )
