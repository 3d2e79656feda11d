"""The drafter's own keys and values of every running step, kept up with the target's."""

from __future__ import annotations

import logging
import time

import torch
from torch import Tensor

from dspark_backend.kernels import jit
from dspark_backend.kv.pool import SequencePool
from dspark_backend.kv.sequence import Positions
from dspark_backend.running import RunningStep
from dspark_backend.speculation.protocol import Drafter

_log = logging.getLogger(__name__)

# Computed tokens whose features wait for the drafter at most: bounds what a step holds.
_UNREAD = 128


class DraftContexts:
    """What ``drafter`` will read of tokens that were computed, handed over when it drafts next, or
    when others may look at its context: many tokens at once cost it little more than one."""

    def __init__(self, drafter: Drafter | None, pool: SequencePool, threads: int) -> None:
        self._drafter = drafter
        self._pool = pool
        self._threads = threads

    def reserve(self, step: RunningStep, positions: int) -> None:
        """Room for a block, whose own keys and values go past the end of the context."""
        context = context_of(step)
        self._pool.reserve(context, context.length + positions)

    def remember(self, step: RunningStep, features: Tensor) -> None:
        """Of tokens that are committed and computed: ``features`` [rows, len(taps) * d]."""
        step.unread.append(features.clone())
        if step.finished or sum(map(len, step.unread)) >= _UNREAD:
            self.catch_up(step)

    def catch_up(self, step: RunningStep) -> None:
        """Bring the drafter's context to where the target's is."""
        if not step.unread:
            return
        features, step.unread = step.unread, []
        assert self._drafter is not None
        started = time.perf_counter()
        with jit.threads(self._threads):
            self._drafter.extend(context_of(step), torch.cat(features))
        if not step.finished:
            step.metrics.draft_s += time.perf_counter() - started

    def end(self, step: RunningStep) -> None:
        """A step is over: its session may be forked, rolled back or copied from."""
        try:
            self.catch_up(step)
        except Exception:
            _log.exception("the drafter could not read the end of a step: its context stays behind")


def context_of(step: RunningStep) -> Positions:
    """The drafter's context of the session that ``step`` runs in."""
    context = step.session.kv.draft
    assert context is not None, "every sequence of an engine with a drafter has a draft context"
    return context
