"""What a step took and who proposed what it wrote, as it goes."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from dspark_backend.metrics import EngineMetrics


class Tally:
    """From a step's submission on; ``metrics`` are complete once it is closed."""

    def __init__(self) -> None:
        self.metrics = EngineMetrics()
        self.submitted = time.perf_counter()
        self._proposed: Counter[str] = Counter()
        self._accepted: Counter[str] = Counter()
        self._admitted = False

    @property
    def admitted(self) -> bool:
        """Whether the step has left the queue."""
        return self._admitted

    def admit(self, cached: int) -> None:
        """The step leaves the queue, ``cached`` of its tokens being computed."""
        self._admitted = True
        self.metrics.queue_s = self._since_submission()
        self.metrics.prefill_cached_tokens = cached

    @contextmanager
    def grammar(self) -> Iterator[None]:
        """What is done meanwhile is the grammar's."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.metrics.grammar_s += time.perf_counter() - started

    def judged(self, sources: Sequence[str], accepted: int) -> None:
        """A block of tokens from ``sources`` was verified, and its first ``accepted`` stood."""
        self._proposed.update(sources)
        self._accepted.update(sources[:accepted])

    def wrote(self, source: str, proposed: int, accepted: int) -> None:
        """Tokens that were in no block."""
        self._proposed[source] += proposed
        self._accepted[source] += accepted

    def delivered(self) -> None:
        """Tokens are out."""
        if self.metrics.ttft_s == 0.0:
            self.metrics.ttft_s = self._since_submission()

    def close(self, new_tokens: int) -> None:
        """The step is over."""
        m = self.metrics
        m.total_s = self._since_submission()
        if not self._admitted:
            m.queue_s = m.total_s
        m.new_tokens = new_tokens
        m.proposed, m.accepted = dict(self._proposed), dict(self._accepted)
        named = m.queue_s + m.prefill_s + m.decode_s + m.grammar_s + m.draft_s + m.verify_s
        m.overhead_s = max(0.0, m.total_s - named)

    def _since_submission(self) -> float:
        return time.perf_counter() - self.submitted
