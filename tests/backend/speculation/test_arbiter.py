"""Who proposes and what is verified: decided from what is known before the pass, for what pays."""

from __future__ import annotations

import gc
from dataclasses import dataclass, field, replace

import pytest

from dspark_backend.request import StepKind
from dspark_backend.speculation.arbiter import Arbiter
from dspark_backend.speculation.block import Block, Offer, unconstrained
from dspark_backend.speculation.candidate import BudgetPolicy, Candidate
from dspark_backend.speculation.copy import CopyProposer
from dspark_backend.speculation.copy_acceptance import CopyAcceptance
from dspark_backend.speculation.policies import Fixed, Threshold
from dspark_backend.speculation.protocol import Proposal
from dspark_backend.speculation.signals import Signals
from dspark_backend.speculation.step_aware import StepAware
from dspark_backend.speculation.throughput import PrefixThroughput


@dataclass
class Cost:
    """A pass costs ``base`` and ``row`` for each row; the drafter ``draft`` an anchor."""

    base: float = 10.0
    row: float = 0.5
    draft: float = 1.0

    def verify_s(self, rows: int, requests: int, context: int) -> float:
        return self.base + self.row * rows

    def draft_s(self, anchors: int) -> float:
        return self.draft * anchors


@dataclass(eq=False)
class Step:
    kind: StepKind = StepKind.TEXT
    weight: float = 1.0
    rejects: bool = False
    base_rows: int = 1
    context: int = 100
    room: int = 50
    block: Block = field(default_factory=Block)


def arbiter(
    cost: Cost | None = None, policy: BudgetPolicy | None = None, signals: Signals | None = None
) -> Arbiter:
    return Arbiter(4, policy or StepAware(block_size=4), cost or Cost(), signals or Signals())


def offer(*survival: float, source: str = "dspark") -> Offer:
    return Offer.as_said(Proposal(tuple(range(len(survival))), survival, source))


def test_a_good_copy_makes_a_draft_needless_and_a_bad_one_does_not() -> None:
    mind, step = arbiter(), Step()
    assert mind.to_draft([step], {}, []) == [0]
    assert mind.to_draft([step], {0: offer(0.9, 0.8, 0.7, 0.6, 0.5)}, []) == []
    assert mind.to_draft([step], {0: offer(0.2)}, []) == [0]


def test_the_better_offer_is_taken() -> None:
    mind, step = arbiter(), Step()
    good, bad = offer(0.9, 0.8), offer(0.5, 0.4)
    assert mind.better(step, good, bad) is good
    assert mind.better(step, bad, good) is good
    assert mind.better(step, None, bad) is bad
    assert mind.better(step, bad, None) is bad
    assert mind.better(step, None, None) is None


def test_a_sampled_draft_stands_whatever_it_says_of_itself() -> None:
    """Its confidences know its tokens: preferring a copy now would bias what is written."""
    mind, step = arbiter(), Step(rejects=True)
    draft = offer(0.1, 0.01)
    assert mind.better(step, offer(0.9, 0.9), draft) is draft


def test_a_drafter_that_is_always_wrong_is_parked_and_tried_again() -> None:
    mind, step = arbiter(Cost(draft=5.0)), Step()
    asked = []
    for _ in range(200):
        wanted = mind.to_draft([step], {}, [])
        asked.append(bool(wanted))
        if wanted:
            mind.drafted(step, Proposal((1, 2), (0.05, 0.01), "dspark"))
    assert all(asked[:1])
    assert 5 <= sum(asked[20:]) <= 12  # one cycle in 24
    busy = Step(StepKind.TOOL_CALL)
    assert mind.to_draft([busy], {}, []) == [0]  # nothing is known of another kind


def test_a_hard_text_does_not_cost_the_next_one_its_drafts() -> None:
    mind = arbiter(Cost(draft=5.0))
    good, bad = Proposal((1, 2), (0.9, 0.8), "dspark"), Proposal((1, 2), (0.05, 0.01), "dspark")
    for _ in range(40):
        easy = Step()
        assert mind.to_draft([easy], {}, []) == [0]
        mind.drafted(easy, good)
    hard, other = Step(), Step()
    for _ in range(30):
        if mind.to_draft([hard], {}, []):
            mind.drafted(hard, bad)
    assert mind.to_draft([hard, other], {}, []) == [1]
    mind.drafted(other, good)
    assert mind.to_draft([hard, other], {}, []) == [1]


def test_a_text_that_becomes_easy_is_drafted_for_again_soon() -> None:
    mind, step = arbiter(Cost(draft=5.0)), Step()
    for _ in range(60):
        if mind.to_draft([step], {}, []):
            mind.drafted(step, Proposal((1, 2), (0.05, 0.01), "dspark"))
    asked = []
    for _ in range(60):
        asked.append(bool(mind.to_draft([step], {}, [])))
        if asked[-1]:
            mind.drafted(step, Proposal((1, 2, 3, 4), (0.95, 0.9, 0.85, 0.8), "dspark"))
    assert all(asked[40:])


def test_a_machine_on_which_no_draft_can_pay_tries_none() -> None:
    """One step alone tries now and then; sixteen, whose every row costs a sixteenth, do not."""
    cost = Cost(base=6.0, row=4.0, draft=5.0)

    def tries(count: int) -> int:
        mind, steps = arbiter(cost), [Step() for _ in range(count)]
        for step in steps:
            mind.drafted(step, Proposal((1, 2), (0.05, 0.01), "dspark"))
        return sum(len(mind.to_draft(steps, {}, [])) for _ in range(60))

    assert tries(16) == 0
    cost.row = 0.5
    assert tries(1) > 0


def test_what_is_said_before_the_draft_follows_from_the_drafts_before() -> None:
    mind, easy, hard = arbiter(signals=Signals(calibration=False)), Step(), Step()
    assert mind.foreseen([easy, hard]) == ([0, 1], [4, 4]), "hoped for, as long as nobody knows"
    for _ in range(12):
        mind.drafted(easy, Proposal((1, 2, 3, 4), (0.9, 0.8, 0.7, 0.6), "dspark"))
        mind.drafted(hard, Proposal((1, 2, 3, 4), (0.02, 0.01, 0.0, 0.0), "dspark"))
    drafting, lengths = mind.foreseen([easy, hard])
    assert (drafting, lengths) == ([0], [4, 0])
    tried = [mind.foreseen([easy, hard])[0] for _ in range(8)]
    assert [0, 1] in tried, "a text may become easy"
    assert arbiter(policy=Fixed(2)).foreseen([Step(), Step(room=1)]) == ([0, 1], [2, 1])
    assert arbiter(policy=Fixed(0)).foreseen([Step()]) == ([], [0])


def test_what_steps_were_worth_is_forgotten_with_them() -> None:
    mind = arbiter()
    for _ in range(100):
        mind.drafted(Step(), Proposal((1,), (0.5,), "dspark"))
    gc.collect()
    assert len(mind._outlook._steps) == 0


def test_parking_can_be_turned_off() -> None:
    mind, step = arbiter(Cost(draft=5.0), signals=Signals(parking=False)), Step()
    for _ in range(50):
        assert mind.to_draft([step], {}, []) == [0]
        mind.drafted(step, Proposal((1, 2), (0.05, 0.01), "dspark"))


@pytest.mark.parametrize("policy", [Fixed(2), Threshold(4, 0.5), PrefixThroughput()])
def test_policies_that_do_not_count_the_draft_always_draft(policy: BudgetPolicy) -> None:
    mind, step = arbiter(Cost(draft=5.0), policy), Step()
    for _ in range(50):
        assert mind.to_draft([step], {}, []) == [0]
        mind.drafted(step, Proposal((1, 2), (0.05, 0.01), "dspark"))


def test_a_policy_of_nothing_asks_nobody() -> None:
    mind, step = arbiter(policy=Fixed(0)), Step()
    proposer = CopyProposer(CopyAcceptance())
    proposer.append([1, 2, 3, 1, 2, 3, 1, 2])
    assert mind.to_draft([step], {}, []) == []
    assert mind.copies(proposer, step) is None
    assert mind.continuation(proposer, step) is None


def test_rows_that_do_not_pay_are_not_verified_and_the_reason_says_so() -> None:
    step = Step(block=unconstrained(offer(0.9, 0.5, 0.001, 0.001), room=9))
    (decision,) = arbiter().decide([step], [])
    assert decision.length == 2
    assert "0.00 does not pay" in decision.reason
    step.block = unconstrained(offer(0.99, 0.99, 0.98, 0.98), room=9)
    (decision,) = arbiter(Cost(row=0.1)).decide([step], [])
    assert decision == replace(decision, length=4, reason="all of it pays")


def test_a_full_machine_verifies_less() -> None:
    """Rows of others make the pass dear: the same block is cut earlier."""
    block = unconstrained(offer(0.9, 0.6, 0.4, 0.2), room=9)
    lengths = []
    for row in (0.1, 2.0, 8.0):
        steps = [Step(block=block) for _ in range(8)]
        lengths.append(arbiter(Cost(row=row)).decide(steps, [])[0].length)
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[0] > lengths[-1]


def test_a_critical_step_gets_the_rows() -> None:
    block = unconstrained(offer(0.6, 0.5, 0.4, 0.3), room=9)
    steps = [Step(block=block, weight=weight) for weight in (0.2, 5.0)]
    background, critical = arbiter(Cost(row=3.0)).decide(steps, [])
    assert critical.length > background.length


def test_prefilling_neighbours_count() -> None:
    step = Step(block=unconstrained(offer(0.3, 0.2), room=9))
    prefill = Candidate((), base_rows=64)
    (alone,) = arbiter(Cost(base=10.0, row=1.0)).decide([step], [])
    (beside,) = arbiter(Cost(base=10.0, row=1.0)).decide([step], [prefill])
    assert beside.length >= alone.length  # the pass is long already: a row more matters less


def test_sampled_drafts_are_budgeted_without_looking_ahead() -> None:
    """c_3 knows x_2: whether position 2 is verified may not depend on it."""
    lengths = set()
    for last in (0.45, 0.01):
        step = Step(rejects=True, block=unconstrained(offer(0.5, 0.45, last), room=9))
        lengths.add(min(arbiter(Cost(row=4.0)).decide([step], [])[0].length, 2))
    assert len(lengths) == 1


def test_outcomes_teach_the_proposer_that_spoke() -> None:
    mind, step = arbiter(), Step()
    proposer = CopyProposer(CopyAcceptance())
    proposer.append([5, 6, 7, 8, 5, 6])
    copied = mind.copies(proposer, step)
    assert copied is not None
    assert copied.proposal.tokens[0] == 7
    before = copied.survival[0]
    for _ in range(60):
        mind.learn(step, proposer, unconstrained(copied, room=9), 0)
    after = mind.copies(proposer, step)
    assert after is None or after.survival[0] < before
    said = Proposal((1, 2), (0.9, 0.8), "dspark")
    for _ in range(200):
        mind.learn(step, proposer, unconstrained(Offer.as_said(said), room=9), 0)
    assert mind.drafted(step, said).survival[0] < 0.5


def test_a_block_goes_on_with_what_follows_it_in_the_log() -> None:
    mind, step = arbiter(), Step()
    proposer = CopyProposer(CopyAcceptance())
    proposer.append([1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2, 3])
    extend = mind.continuation(proposer, step)
    assert extend is not None
    assert extend([]) is None
    further = extend([4, 5])
    assert further is not None
    assert further.proposal.tokens[:2] == (6, 7)
    assert len(proposer) == 12  # looking changed nothing


@pytest.mark.parametrize("policy", [StepAware(block_size=4), Fixed(2)])
def test_nothing_proposed_is_nothing_verified(policy: BudgetPolicy) -> None:
    assert [d.length for d in arbiter(policy=policy).decide([Step(), Step()], [])] == [0, 0]
