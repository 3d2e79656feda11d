"""What an agent can copy from beside a session's own log."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Final

from dspark_backend.speculation.corpus import Corpora, Corpus
from dspark_backend.speculation.quoting import quoted
from dspark_backend.tokenizer import Tokenizer

LIMIT_TOKENS: Final = 32_768
"""Of an agent, or of a session that is nobody's: some 0.4 MB, 1.2 MB for moments."""
AGENTS: Final = 32


class Memory:
    """A session's: ``corpus`` holds what it read as JSON strings hold it and, where sessions of one
    agent share it, what each of them read and wrote.

    Not thread-safe: for the holder of the engine's lock.
    """

    def __init__(self, corpus: Corpus, tokenizer: Tokenizer, *, shared: bool) -> None:
        self.corpus = corpus
        self._tokenizer = tokenizer
        self._shared = shared

    def quote(self, tokens: Sequence[int]) -> None:
        """``tokens`` were read, and what is written now is JSON."""
        for document in quoted(tokens, self._tokenizer):
            self.corpus.add(document)

    def keep(self, tokens: Sequence[int]) -> None:
        """A step is over that read and wrote ``tokens``: other sessions of the agent may copy."""
        if self._shared:
            self.corpus.add(tokens)


class Memories:
    """An engine's: one for each agent, and one for each session of nobody. Not thread-safe."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._corpora = Corpora(LIMIT_TOKENS, AGENTS)

    def of(self, agent: Hashable | None) -> Memory:
        """For a new session of ``agent``; None for one that shares nothing."""
        corpus = Corpus(LIMIT_TOKENS) if agent is None else self._corpora.of(agent)
        return Memory(corpus, self._tokenizer, shared=agent is not None)
