"""Steps that begin alike: one computes the beginning, the others wait for it and take it over.

Sub-agents that a parent sends out at once share its instructions and tools, often most of what
they read before they write. Each could compute that for itself, in passes that all of them share;
whoever waits instead begins no later, since the pass then has fewer rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from dspark_backend.kv.prefix import common_prefix
from dspark_backend.running import RunningStep
from dspark_backend.scheduler import precedence

WORTH_WAITING: Final = 64
"""Tokens that a step must save by waiting. Fewer are computed along with what follows them."""


@dataclass(frozen=True, slots=True)
class Beginning:
    """The first ``length`` tokens of ``leader``, which it has not computed yet."""

    leader: RunningStep
    length: int

    @property
    def settled(self) -> bool:
        """Whether it is there, or will never be."""
        return self.leader.finished or self.leader.session.kv.length >= self.length


def awaited(step: RunningStep, running: Sequence[RunningStep], known: int) -> Beginning | None:
    """What ``step``, of whose log ``known`` tokens could be taken over now, had better wait for:
    the longest beginning that one of ``running`` is about to compute, None where none saves enough.

    Only a step that goes before it in any case is waited for: as urgent, and due no later.
    """
    if step.session.kv.length:
        return None
    best: Beginning | None = None
    length = known + WORTH_WAITING - 1
    for leader in running:
        log = leader.session.log
        if not _goes_before(leader, step) or min(len(log), len(step.session.log) - 1) <= length:
            continue
        shared = min(common_prefix(step.session.log, log), len(step.session.log) - 1)
        if shared > length and leader.session.kv.length < shared:
            best, length = Beginning(leader, shared), shared
    return best


def _goes_before(leader: RunningStep, step: RunningStep) -> bool:
    if leader.session is step.session:  # a prefill that the step takes over from
        return False
    first = precedence(leader.request.urgency, leader.due, 0)
    return first < precedence(step.request.urgency, step.due, 1)
