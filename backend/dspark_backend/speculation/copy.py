"""The copy proposer: what followed the last time that the log ended as it does now.

After prompt-lookup decoding (Saxena 2023) and SuffixDecoding (Oliaro et al., arXiv 2411.04975): the
longest ending of the log that occurs earlier, and the most frequent continuation of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dspark_backend.errors import RequestError
from dspark_backend.request import StepKind
from dspark_backend.speculation.copy_acceptance import Cell, CopyAcceptance, cell
from dspark_backend.speculation.corpus import Corpus
from dspark_backend.speculation.protocol import Proposal
from dspark_backend.speculation.suffix import SuffixIndex

COPY = "copy"
LONGEST = 32
FLOOR = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class CopyProposal(Proposal):
    """A proposal that remembers for :meth:`CopyProposer.observe` where its estimates came from.

    ``cells[k]`` is that of ``tokens[k]``, ``kind`` the step that it was made for, ``matched`` the
    length of the match that it continues.
    """

    kind: StepKind
    cells: tuple[Cell, ...]
    matched: int


class CopyProposer:
    """Copies for one session: hold it in step with the session's log.

    The session's own log is searched first, then ``corpus``, whose match counts where it is
    longer, or as long in a step that may write JSON. A function of the log, the corpus and what was
    observed, hence deterministic: any scheduler stays exact (DSPARK.md, section 6). It knows no
    grammar. Not thread-safe.
    """

    def __init__(
        self, acceptance: CopyAcceptance, corpus: Corpus | None = None, floor: float = FLOOR
    ) -> None:
        """``acceptance`` is the engine's: all sessions learn together. A proposal ends where its
        survival would fall below ``floor``.

        Raises RequestError unless ``floor`` is a probability.
        """
        if not 0.0 <= floor <= 1.0:
            raise RequestError(f"a copy's survival floor is a probability, not {floor}")
        self._acceptance = acceptance
        self._corpus = corpus
        self._floor = floor
        self._log = SuffixIndex()

    def __len__(self) -> int:
        return len(self._log)

    def append(self, tokens: Sequence[int]) -> None:
        """The log went on: prompt, tool output or committed tokens, whoever drafted them.

        Raises RequestError for a negative token id.
        """
        self._log.append(tokens)

    def truncate(self, length: int) -> None:
        """The log was rolled back to ``length`` tokens. Raises RequestError if it has fewer."""
        self._log.truncate(length)

    def fork(self) -> CopyProposer:
        """The proposer of a forked session: its own log, the same corpus and acceptance."""
        other = CopyProposer(self._acceptance, self._corpus, self._floor)
        other._log = self._log.fork()
        return other

    def propose(self, limit: int = LONGEST, kind: StepKind = StepKind.TEXT) -> CopyProposal:
        """What may follow the log: at most ``limit`` and ``LONGEST`` tokens, none when nothing that
        is worth verifying is known."""
        match, text = self._log.match(), self._log
        if self._corpus is not None:
            elsewhere = self._log.match_in(self._corpus.index)
            # Of equal ones in JSON, what was read goes on as the quotation does, not as the file.
            nearer = match.length if kind is StepKind.TEXT else match.length - 1
            if elsewhere.length > nearer:
                match, text = elsewhere, self._corpus.index
        own = text is self._log
        found = text.follow(match, min(limit, LONGEST), extend=own)
        cells: list[Cell] = []
        survival: list[float] = []
        alive = 1.0
        for k, (votes, voters) in enumerate(zip(found.votes, found.voters, strict=True)):
            at = cell(match.length + k, votes, voters, foreign=not own)
            alive *= self._acceptance.probability(kind, at)
            if alive < self._floor:
                break
            cells.append(at)
            survival.append(alive)
        return CopyProposal(
            found.tokens[: len(cells)],
            tuple(survival),
            COPY,
            kind=kind,
            cells=tuple(cells),
            matched=match.length,
        )

    def observe(self, proposal: CopyProposal, accepted: int, verified: int | None = None) -> None:
        """Of the first ``verified`` tokens (all, when left out) the first ``accepted`` held.

        Tokens behind a rejected one say nothing, and neither do those that were not verified.
        Raises RequestError when the numbers contradict each other.
        """
        verified = len(proposal.tokens) if verified is None else verified
        if not 0 <= accepted <= verified <= len(proposal.tokens):
            raise RequestError(
                f"of a copy of {len(proposal.tokens)} tokens {verified} cannot have been verified "
                f"and {accepted} accepted"
            )
        for k in range(min(accepted + 1, verified)):
            self._acceptance.observe(proposal.kind, proposal.cells[k], k < accepted)
