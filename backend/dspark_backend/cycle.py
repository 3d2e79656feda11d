"""What is known of one cycle of the loop while it is under way."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from dspark_backend.running import RunningStep
from dspark_backend.sampling.verifier import Answer
from dspark_backend.speculation.account import CycleAccount
from dspark_backend.speculation.arbiter import Decision
from dspark_backend.speculation.block import Block


@dataclass(frozen=True, slots=True)
class Judged:
    """A pass after its verification: the ``answers`` to the steps that asked, in order, and the
    ``features`` of all its rows."""

    answers: list[Answer]
    features: Tensor


@dataclass(slots=True, eq=False)
class Cycle:
    """What has been counted and timed so far, for the account of the steps that ask."""

    anchors: int = 0
    draft_s: float = 0.0
    rows: int = 0
    requests: int = 0
    verify_s: float = 0.0
    predicted_s: float | None = None
    explained: dict[RunningStep, tuple[Block, Decision]] = field(default_factory=dict)

    def account(self, step: RunningStep) -> CycleAccount:
        """As ``step`` sees it before its block is judged."""
        block, decision = self.explained.get(step, (step.block, Decision(0, "prefill")))
        return CycleAccount(
            position=len(step.session.log),
            tokens=block.tokens,
            sources=block.sources,
            survival=block.survival,
            verified=decision.length,
            reason=decision.reason,
            accepted=0,
            written=0,
            rows=self.rows,
            requests=self.requests,
            draft_s=self.draft_s,
            verify_s=self.verify_s,
            predicted_s=self.predicted_s,
        )
