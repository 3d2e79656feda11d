"""Who proposes, whose proposal is taken and how much of it is verified (DSPARK.md, 5 and 6).

Everything here is decided before the pass, from the committed history, the grammar's state, load,
cost and confidences. With sampled drafts (rejection sampling) nothing may depend on a token that
is still to be judged: there the source is chosen before the drafter is asked, and the budget is the
one that does not anticipate. All other drafts are functions of the context, for which any choice is
exact.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final, Protocol

from dspark_backend.request import StepKind
from dspark_backend.speculation.block import Block, Extend, Offer
from dspark_backend.speculation.calibrator import SurvivalCalibrator
from dspark_backend.speculation.candidate import BudgetPolicy, Candidate
from dspark_backend.speculation.copy import CopyProposal, CopyProposer
from dspark_backend.speculation.cost import CycleCost
from dspark_backend.speculation.outlook import Outlook
from dspark_backend.speculation.parking import worth_drafting
from dspark_backend.speculation.policies import Fixed
from dspark_backend.speculation.protocol import Proposal
from dspark_backend.speculation.signals import Signals
from dspark_backend.speculation.step_aware import StepAware

# How surely a draft goes on in an easy text, such as boilerplate.
_EASY: Final = 0.9


class Speculating(Protocol):
    """What the arbiter looks at of a running step."""

    @property
    def kind(self) -> StepKind: ...

    @property
    def weight(self) -> float:
        """What a token of it is worth beside one of another step."""

    @property
    def rejects(self) -> bool:
        """Whether its drafts are sampled and judged by rejection sampling."""

    @property
    def base_rows(self) -> int:
        """Committed tokens that its next pass computes in any case."""

    @property
    def context(self) -> int:
        """Positions that are computed already."""

    @property
    def room(self) -> int:
        """Drafts that can be of use."""

    @property
    def block(self) -> Block: ...


@dataclass(frozen=True, slots=True)
class Decision:
    """How much of a step's block is verified, and why."""

    length: int
    reason: str


class Arbiter:
    """One engine's; used by its thread. ``block_size`` is the drafter's, 0 without one; ``cost`` is
    None where nothing was measured, which only policies that look at no cost can do without."""

    def __init__(
        self, block_size: int, policy: BudgetPolicy, cost: CycleCost | None, signals: Signals
    ) -> None:
        self.signals = signals
        self._cost = cost
        self._policy = policy
        self._careful = _without_anticipation(policy)
        self._never = isinstance(policy, Fixed) and policy.length == 0
        self._parks = signals.parking and policy.parks and cost is not None
        self._calibrator = SurvivalCalibrator()
        self._outlook = Outlook(block_size)
        self._block_size = block_size
        self._easy = tuple(_EASY ** (k + 1) for k in range(block_size))

    def copies(self, proposer: CopyProposer, step: Speculating) -> Offer | None:
        """What the step's own log suggests; None where that is nothing."""
        if self._never or not self.signals.copies or step.room < 1:
            return None
        proposal = proposer.propose(step.room, step.kind)
        return Offer.as_said(proposal) if proposal.tokens else None

    def continuation(self, proposer: CopyProposer, step: Speculating) -> Extend | None:
        """What a block goes on with where its drafts end: copies again; None where that is off."""
        if self._never or not (self.signals.copies and self.signals.splice):
            return None

        def extend(tokens: Sequence[int]) -> Offer | None:
            if not tokens:
                return None  # a copy of what follows the log itself was considered before
            length = len(proposer)
            proposer.append(tokens)
            try:
                proposal = proposer.propose(max(step.room - len(tokens), 0), step.kind)
            finally:
                proposer.truncate(length)
            return Offer.as_said(proposal) if proposal.tokens else None

        return extend

    def to_draft(
        self, steps: Sequence[Speculating], copies: Mapping[int, Offer], others: Sequence[Candidate]
    ) -> list[int]:
        """For which of ``steps`` to call the drafter: those for whom it pays, with the rows of
        ``others`` in the same pass. ``copies`` by index: a copy that promises more than a draft
        makes one needless."""
        if self._never or not self._block_size:
            return []
        wanting = []
        for index, step in enumerate(steps):
            expected = self._outlook.expected(step, step.kind)
            copy = copies.get(index)
            if step.room > 0 and (copy is None or copy.gain < sum(expected)):
                wanting.append(index)
        if not (self._parks and wanting):
            return wanting
        return self._worth_it(steps, wanting, copies, others)

    def foreseen(self, steps: Sequence[Speculating]) -> tuple[list[int], list[int]]:
        """For which of ``steps`` to draft, and how many drafts of each to verify, where both are
        to be said before anything is drafted: by what drafts have been worth until now. It knows
        no token of the blocks, so it is exact for any draft (DSPARK.md, section 6)."""
        drafting = self.to_draft(steps, {}, ())
        candidates = []
        for index, step in enumerate(steps):
            drafted = index in drafting
            survival = self._outlook.expected(step, step.kind) if drafted else ()
            candidates.append(_candidate(step, survival, drafted=drafted))
        cost = self._cost if self._cost is not None else _Unknown()
        return drafting, self._policy.lengths(candidates, cost)

    def drafted(self, step: Speculating, proposal: Proposal) -> Offer:
        """A draft with the survival that experience gives it."""
        survival = proposal.survival
        if self.signals.calibration:
            survival = self._calibrator.survival(step.kind, survival, proposal.mask_width)
        self._outlook.drafted(step, step.kind, survival)
        return Offer(proposal, survival)

    def better(self, step: Speculating, copy: Offer | None, draft: Offer | None) -> Offer | None:
        """Which of the two offers to verify. A sampled draft stands whatever it says of itself."""
        if copy is None or draft is None or step.rejects:
            return draft or copy
        return copy if copy.gain >= draft.gain else draft

    def decide(self, steps: Sequence[Speculating], others: Sequence[Candidate]) -> list[Decision]:
        """How much of each step's block the pass verifies; ``others`` take part without one."""
        if not any(step.block.tokens for step in steps):
            return [Decision(0, "nothing was proposed") for _ in steps]
        candidates = [self._candidate(step) for step in steps]
        policy = self._careful if any(step.rejects for step in steps) else self._policy
        cost = self._cost if self._cost is not None else _Unknown()
        lengths = policy.lengths([*candidates, *others], cost)
        return [
            Decision(length, _reason(candidate, length))
            for candidate, length in zip(candidates, lengths, strict=False)
        ]

    def learn(
        self, step: Speculating, proposer: CopyProposer | None, block: Block, accepted: int
    ) -> None:
        """A pass has judged ``block``, of which the first ``accepted`` tokens stood."""
        for offer, held, seen in block.judged(accepted):
            proposal = offer.proposal
            if isinstance(proposal, CopyProposal):
                if proposer is not None:
                    proposer.observe(proposal, held, seen)
            elif self.signals.calibration:
                said = proposal.first(seen)
                self._calibrator.observe(step.kind, said.survival, said.mask_width, held)

    def _worth_it(
        self,
        steps: Sequence[Speculating],
        wanting: Sequence[int],
        copies: Mapping[int, Offer],
        others: Sequence[Candidate],
    ) -> list[int]:
        assert self._cost is not None
        expected: list[Candidate] = []
        for index, step in enumerate(steps):
            survival: tuple[float, ...] = ()
            if index in wanting:
                survival = self._outlook.expected(step, step.kind)
            elif index in copies:
                survival = copies[index].survival
            drafted = index in wanting
            expected.append(_candidate(step, survival, drafted=drafted))
        worth = worth_drafting([*expected, *others], self._cost)
        due = []
        for index in wanting:
            if worth[index]:
                self._outlook.worth(steps[index])
            elif not self._outlook.parked(steps[index]):
                due.append(index)
        if due:
            # A try shows whether a text has become easy; on a full machine even that may not pay.
            for index in due:
                expected[index] = replace(expected[index], survival=self._easy)
            could = worth_drafting([*expected, *others], self._cost)
            due = [index for index in due if could[index]]
        return [index for index in wanting if worth[index] or index in due]

    def _candidate(self, step: Speculating) -> Candidate:
        block = step.block
        drafted = any(not isinstance(o.proposal, CopyProposal) for o in block.offers)
        return _candidate(step, block.survival, free=block.free, drafted=drafted)


def _candidate(
    step: Speculating, survival: tuple[float, ...], *, free: int = 0, drafted: bool
) -> Candidate:
    return Candidate(
        survival,
        base_rows=step.base_rows,
        context=step.context,
        weight=step.weight,
        cap=max(step.room, 0),
        free=free,
        drafted=drafted,
    )


def _without_anticipation(policy: BudgetPolicy) -> BudgetPolicy:
    return replace(policy, anticipating=False) if isinstance(policy, StepAware) else policy


def _reason(candidate: Candidate, length: int) -> str:
    proposed = candidate.most
    if not proposed:
        return "nothing was proposed"
    if length == proposed:
        return "all of it pays" if length > candidate.certain else "forced by the grammar"
    if length == 0:
        return "no draft pays for its row"
    return f"survival {candidate.survival[length]:.2f} does not pay for a row"


class _Unknown:
    """The cost where nothing was measured: policies that ask for it cannot be used."""

    def verify_s(self, rows: int, requests: int, context: int) -> float:
        raise ValueError("this policy needs a cost model: load the engine with one")

    def draft_s(self, anchors: int) -> float:
        raise ValueError("this policy needs a cost model: load the engine with one")
