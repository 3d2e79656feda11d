"""What is copied, how likely it is said to hold, and what is learnt from what held."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dspark_backend.errors import RequestError
from dspark_backend.request import StepKind
from dspark_backend.speculation.copy import COPY, LONGEST, CopyProposal, CopyProposer
from dspark_backend.speculation.copy_acceptance import (
    LENGTHS,
    MEMORY,
    PRIOR,
    PRIOR_WEIGHT,
    Agreement,
    CopyAcceptance,
    cell,
)
from dspark_backend.speculation.corpus import Corpus
from dspark_backend.speculation.suffix import SuffixIndex

untimed = settings(deadline=None)  # the first call may compile

tokens = st.lists(st.integers(0, 3), max_size=60)


def proposer(log: list[int], corpus: Corpus | None = None, floor: float = 0.0) -> CopyProposer:
    made = CopyProposer(CopyAcceptance(), corpus, floor)
    made.append(log)
    return made


def corpus_of(*documents: list[int]) -> Corpus:
    corpus = Corpus(1000)
    for document in documents:
        corpus.add(document)
    return corpus


@untimed
@given(
    tokens,
    st.lists(tokens, max_size=3),
    st.integers(0, 40),
    st.floats(0.0, 1.0),
    st.sampled_from(StepKind),
)
def test_a_proposal_is_what_followed_the_longest_match(
    log: list[int], others: list[list[int]], limit: int, floor: float, kind: StepKind
) -> None:
    corpus = corpus_of(*others)
    proposal = proposer(log, corpus, floor).propose(limit, kind)
    index = SuffixIndex()
    index.append(log)
    own, elsewhere = index.match(), index.match_in(corpus.index)
    assert proposal.matched == max(own.length, elsewhere.length)
    if own.length > elsewhere.length or (own.length == elsewhere.length and kind is StepKind.TEXT):
        told = index.follow(own, min(limit, LONGEST), extend=True)
    else:
        told = corpus.index.follow(elsewhere, min(limit, LONGEST), extend=False)
    length = len(proposal.tokens)
    assert proposal.tokens == told.tokens[:length]
    assert len(proposal.survival) == len(proposal.cells) == length <= min(limit, LONGEST)
    conditional = [
        PRIOR[np.searchsorted(LENGTHS, proposal.matched + k, "right") - 1][Agreement.of(v, w)]
        for k, (v, w) in enumerate(zip(told.votes, told.voters, strict=True))
    ]
    survival = np.cumprod(conditional)
    assert proposal.survival == pytest.approx(survival[:length])
    assert length == len(told.tokens) or survival[length] < floor


@untimed
@given(tokens, st.data())
def test_rollback_and_fork_leave_no_trace(log: list[int], data: st.DataObject) -> None:
    kept = data.draw(st.integers(0, len(log)))
    rolled = proposer(log)
    fork = rolled.fork()
    rolled.propose()
    rolled.truncate(kept)
    assert len(rolled) == kept
    assert rolled.propose() == proposer(log[:kept]).propose()
    assert fork.propose() == proposer(log).propose()
    fork.append([1, 2])
    assert len(rolled) == kept
    assert fork.propose() == proposer([*log, 1, 2]).propose()


def test_a_period_is_copied_to_the_limit_and_not_further() -> None:
    proposal = proposer([8, 9] * 20).propose()
    assert proposal.tokens == (8, 9) * (LONGEST // 2)
    assert proposal.source == COPY
    assert list(proposal.survival) == sorted(proposal.survival, reverse=True)
    assert proposer([8, 9] * 20).propose(3).tokens == (8, 9, 8)


@pytest.mark.parametrize("log", [[], [5], [1, 2, 3, 4]])
def test_where_nothing_repeats_nothing_is_proposed(log: list[int]) -> None:
    assert proposer(log).propose() == CopyProposal(
        (), (), COPY, kind=StepKind.TEXT, cells=(), matched=0
    )
    assert proposer([1, 2, 1]).propose(0).tokens == ()


def test_a_copy_ends_with_its_source() -> None:
    proposal = proposer([1, 2, 3], corpus_of([1, 2, 3, 4, 5], [6, 7])).propose()
    assert proposal.tokens == (4, 5)


def test_the_own_log_comes_first_and_a_longer_match_elsewhere_before_it() -> None:
    log = [1, 2, 50, 9, 1, 2]
    assert proposer(log, corpus_of([1, 2, 60, 61])).propose().tokens[0] == 50
    longer = proposer(log, corpus_of([9, 1, 2, 60, 61])).propose()
    assert (longer.tokens, longer.matched) == ((60, 61), 3)
    assert {at[0] for at in longer.cells} == {1}


def test_the_majority_is_copied_and_disagreement_lowers_its_survival() -> None:
    said = [1, 7, 2, 1, 7, 3, 1, 8, 4]
    agreed = proposer([1, 7, 2, 1, 7, 3, 1, 7, 4, 1]).propose(1)
    split = proposer([*said, 1]).propose(1)
    assert agreed.tokens == split.tokens == (7,)
    assert split.cells[0] == cell(1, 2, 3, foreign=False)
    assert agreed.survival[0] > split.survival[0]
    # Among equals the most recent: 8 was said last.
    assert proposer([1, 7, 2, 1, 8, 4, 1]).propose(1).tokens == (8,)


def test_a_proposal_is_cut_where_survival_falls_below_the_floor() -> None:
    text = list(range(100, 140))
    whole = proposer([*text, 1, 2, 100]).propose()
    cut = proposer([*text, 1, 2, 100], floor=0.05).propose()
    assert 0 < len(cut.tokens) < len(whole.tokens) == LONGEST
    assert cut.survival == whole.survival[: len(cut.tokens)]
    assert cut.survival[-1] >= 0.05 > whole.survival[len(cut.tokens)]
    assert proposer([*text, 1, 2, 100], floor=1.0).propose().tokens == ()


def test_longer_matches_and_wider_agreement_are_trusted_more() -> None:
    table = np.array(PRIOR)
    assert table.shape == (len(LENGTHS), len(Agreement))
    assert ((table > 0) & (table < 1)).all()
    assert (np.diff(table[:, Agreement.ONE]) > 0).all()
    assert (table[:, Agreement.HALF] < table[:, Agreement.FEW]).all()
    assert (np.diff(table[:, Agreement.HALF :], axis=1) < 0).all()


@pytest.mark.parametrize(
    ("votes", "voters", "agreement"),
    [
        (1, 1, Agreement.ONE),
        (2, 2, Agreement.FEW),
        (3, 3, Agreement.FEW),
        (4, 4, Agreement.ALL),
        (1, 2, Agreement.HALF),
        (2, 5, Agreement.QUARTER),
        (1, 4, Agreement.QUARTER),
        (1, 5, Agreement.LESS),
    ],
)
def test_agreement(votes: int, voters: int, agreement: Agreement) -> None:
    assert Agreement.of(votes, voters) is agreement


def test_buckets_begin_where_they_say() -> None:
    for matched in range(1, 100):
        _, bucket, _ = cell(matched, 1, 1, foreign=False)
        assert LENGTHS[bucket] <= matched
        assert bucket + 1 == len(LENGTHS) or matched < LENGTHS[bucket + 1]


def test_what_is_observed_moves_the_estimate_as_a_beta_mean_with_forgetting() -> None:
    acceptance, at = CopyAcceptance(), cell(5, 1, 1, foreign=False)
    outcomes = np.random.default_rng(3).random(500) < 0.3
    for outcome in outcomes:
        acceptance.observe(StepKind.TEXT, at, bool(outcome))
    ages = np.arange(len(outcomes))[::-1]
    weights = np.exp(ages * math.log1p(-1 / MEMORY))
    expected = (PRIOR_WEIGHT * PRIOR[3][Agreement.ONE] + (weights * outcomes).sum()) / (
        PRIOR_WEIGHT + weights.sum()
    )
    assert acceptance.probability(StepKind.TEXT, at) == pytest.approx(expected, rel=1e-12)
    assert acceptance.probability(StepKind.TOOL_CALL, at) == PRIOR[3][Agreement.ONE]
    assert acceptance.probability(StepKind.TEXT, cell(5, 1, 1, foreign=True)) == PRIOR[3][0]


def test_the_estimate_follows_a_change_and_forgets_the_time_before() -> None:
    acceptance, at = CopyAcceptance(), cell(1, 1, 1, foreign=False)
    for _ in range(5000):
        acceptance.observe(StepKind.TEXT, at, True)
    assert acceptance.probability(StepKind.TEXT, at) > 0.95
    for _ in range(5 * int(MEMORY)):
        acceptance.observe(StepKind.TEXT, at, False)
    assert acceptance.probability(StepKind.TEXT, at) < 0.03


def test_only_what_was_verified_and_reached_is_learnt_from() -> None:
    acceptance = CopyAcceptance()
    copying = CopyProposer(acceptance, floor=0.0)
    copying.append([*range(10, 20), 10, 11])
    proposal = copying.propose(6)
    assert len(proposal.tokens) == 6

    def moved(accepted: int, verified: int | None) -> list[int]:
        """The sign of what an observation does to each token's estimate."""
        before = copying.propose(6).cells
        old = [acceptance.probability(StepKind.TEXT, at) for at in before]
        copying.observe(proposal, accepted, verified)
        new = [acceptance.probability(StepKind.TEXT, at) for at in before]
        return [int(np.sign(b - a)) for a, b in zip(old, new, strict=True)]

    # Matched 2, 3, 4, 5, 6, 7: cells of 4 and 5 are one, as are those of 6 and 7.
    assert moved(0, 0) == [0, 0, 0, 0, 0, 0]
    assert moved(1, 1) == [1, 0, 0, 0, 0, 0]
    assert moved(1, 2) == [1, -1, 0, 0, 0, 0]
    assert moved(0, None) == [-1, 0, 0, 0, 0, 0]
    assert moved(6, None) == [1, 1, 1, 1, 1, 1]
    for accepted, verified in ((2, 1), (-1, 3), (3, 7)):
        with pytest.raises(RequestError, match="copy of 6 tokens"):
            copying.observe(proposal, accepted, verified)


def test_bad_floors_priors_and_ids_are_refused() -> None:
    with pytest.raises(RequestError, match=r"floor is a probability, not 1\.5"):
        CopyProposer(CopyAcceptance(), floor=1.5)
    with pytest.raises(RequestError, match="10 lengths by 6"):
        CopyAcceptance(PRIOR[:3])
    with pytest.raises(RequestError, match="holds probabilities"):
        CopyAcceptance([[math.nan] * 6] * 10)
    with pytest.raises(RequestError, match="at least 0"):
        proposer([1]).append([-1])


def test_a_file_of_8k_tokens_is_copied_in_blocks_around_an_edit() -> None:
    file = np.random.default_rng(8).integers(0, 3000, 4000).tolist()
    edited = [*file[:1000], 4000, 4001, *file[1003:]]
    copying = proposer([*file, 5000, *edited[:3]], floor=0.1)
    done, cycles = 3, 0
    while done < len(edited):
        rest = edited[done:]
        proposal = copying.propose(len(rest))
        held = [a == b for a, b in zip(proposal.tokens, rest, strict=False)]
        accepted = (*held, False).index(False)
        copying.observe(proposal, accepted)
        copying.append(rest[: accepted + 1])
        done, cycles = done + accepted + 1, cycles + 1
    assert len(copying) == 8000
    assert cycles < 4000 / (LONGEST + 1) + 15
