"""Who judges the blocks of a pass, and what is asked: one interface for CPU and device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch

from dspark_backend.sampling.sampler import Sampler
from dspark_backend.sampling.verify import Acceptance
from dspark_backend.speculation.distribution import Distribution

Answer = Callable[[], Acceptance]
"""The verdict on one block. Raises GrammarError where the grammar's mask allows nothing and
BackendError where no maximum exists: to the step that it belongs to, and to no other."""


@dataclass(frozen=True, slots=True)
class Question:
    """One step's block: ``drafts`` after what ``sampler`` has observed, with the ``masks`` and
    ``distributions`` of :meth:`Sampler.verify`."""

    sampler: Sampler
    drafts: tuple[int, ...] = ()
    masks: tuple[torch.Tensor | None, ...] | None = None
    distributions: tuple[Distribution | None, ...] = ()

    @property
    def rows(self) -> int:
        """Rows of logits that it takes: one before each draft, and one after the last."""
        return len(self.drafts) + 1


class Verifier(Protocol):
    """Judges blocks as :meth:`Sampler.verify` does."""

    def ask(self, logits: torch.Tensor, questions: Sequence[Question]) -> list[Answer]:
        """An answer to each of ``questions``, whose rows of ``logits`` follow one another; nothing
        that the samplers hold is changed."""


class HostVerifier:
    """On the CPU, when an answer is asked for."""

    def ask(self, logits: torch.Tensor, questions: Sequence[Question]) -> list[Answer]:
        row = 0
        answers: list[Answer] = []
        for question in questions:
            own = logits[row : row + question.rows]
            row += question.rows
            answers.append(partial(_judge, question, own))
        return answers


def _judge(question: Question, logits: torch.Tensor) -> Acceptance:
    return question.sampler.verify(logits, question.drafts, question.masks, question.distributions)
