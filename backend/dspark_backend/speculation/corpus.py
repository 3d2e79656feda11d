"""What an agent read and wrote elsewhere: texts of its other sessions, searched for copies."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Hashable, Sequence
from hashlib import blake2b

import numpy as np

from dspark_backend.errors import RequestError
from dspark_backend.speculation.suffix import SuffixIndex


class Corpus:
    """Documents of one agent, at most ``limit_tokens`` of them together, oldest forgotten first.

    Forgotten tokens are given up when there are as many of them as the limit, so the index never
    holds more than 3 ``limit_tokens`` (with borders), and adding takes constant time a token on
    average. Not thread-safe.
    """

    def __init__(self, limit_tokens: int) -> None:
        """Raises RequestError unless ``limit_tokens`` is positive."""
        if limit_tokens < 1:
            raise RequestError(f"a corpus holds at least 1 token, not {limit_tokens}")
        self.index = SuffixIndex()
        self.held_tokens = 0
        self._limit_tokens = limit_tokens
        self._documents: deque[tuple[int, int, bytes]] = deque()  # border, tokens, digest
        self._digests: set[bytes] = set()

    def add(self, document: Sequence[int]) -> None:
        """Remember a text; one that is held already stays where it is.

        Of a document longer than the whole corpus the end is kept. Raises RequestError for a
        negative token id; nothing was added then.
        """
        kept = document[-self._limit_tokens :]
        if not len(kept):
            return
        if min(document) < 0:
            raise RequestError(f"a token id is at least 0, not {min(document)}: nothing was added")
        digest = blake2b(np.asarray(kept, np.int32).tobytes(), digest_size=16).digest()
        if digest in self._digests:
            return
        self._forget(self._limit_tokens - len(kept))
        if len(self.index) - self.held_tokens - len(self._documents) >= self._limit_tokens:
            self._compact()
        self._write(kept, digest)

    def _forget(self, room: int) -> None:
        """Drop documents until the others hold at most ``room`` tokens."""
        while self.held_tokens > room:
            _, length, digest = self._documents.popleft()
            self.held_tokens -= length
            self._digests.discard(digest)
        start = self._documents[0][0] if self._documents else len(self.index)
        self.index.forget_before(start)

    def _compact(self) -> None:
        old, kept = self.index.tokens, self._documents
        self.index, self._documents, self.held_tokens = SuffixIndex(), deque(), 0
        for border, length, digest in kept:
            self._write(old[border + 1 : border + 1 + length].tolist(), digest)

    def _write(self, document: Sequence[int], digest: bytes) -> None:
        self._documents.append((len(self.index), len(document), digest))
        self._digests.add(digest)
        self.held_tokens += len(document)
        self.index.border()
        self.index.append(document)


class Corpora:
    """A corpus for each agent, of at most ``agents``: the one that was asked for longest ago goes.

    A session that still holds a forgotten corpus goes on with it. Not thread-safe.
    """

    def __init__(self, limit_tokens: int, agents: int) -> None:
        """Raises RequestError unless both are positive."""
        if agents < 1:
            raise RequestError(f"corpora are kept for at least 1 agent, not {agents}")
        Corpus(limit_tokens)
        self._limit_tokens = limit_tokens
        self._agents = agents
        self._kept: OrderedDict[Hashable, Corpus] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def of(self, agent: Hashable) -> Corpus:
        """The corpus of the agent that goes by this key, empty when it is new."""
        corpus = self._kept.pop(agent, None) or Corpus(self._limit_tokens)
        self._kept[agent] = corpus
        if len(self._kept) > self._agents:
            self._kept.popitem(last=False)
        return corpus
