"""The device verifier against its reference, and both against the engine's own rules."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from dspark_backend.kernels.contract import Masks
from dspark_backend.kernels.verify import reference
from dspark_backend.kernels.verify.contract import Batch, DraftProbabilities, Rule, Stream
from dspark_backend.kernels.verify.triton import verify
from dspark_backend.sampling import noise
from dspark_backend.sampling.mask import unpack
from dspark_backend.sampling.noise import Noise
from dspark_backend.sampling.verify import verify_coupled, verify_greedy, verify_rejection

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # on the CPU under Triton's interpreter
SIZES = [1, 33, 1000]


def uniforms(vocab: int) -> reference.Uniforms:
    """The engine's noise."""
    ids = np.arange(vocab, dtype=np.uint32)

    def draw(seed: int, stream: Stream, position: int) -> torch.Tensor:
        return torch.from_numpy(Noise(seed, noise.Stream(stream), position).uniform(ids))

    return draw


def make_batch(
    rule: Rule | list[Rule],
    vocab: int,
    lengths: list[int],
    seed: int = 0,
    *,
    dtype: torch.dtype = torch.float32,
    masked: bool = True,
    sampled: bool = True,
    hit: float = 0.9,
) -> Batch:
    """Random rows whose drafts are, with probability ``hit``, what the row would choose."""
    g = torch.Generator().manual_seed(seed)
    offsets = torch.tensor([0, *np.cumsum([n + 1 for n in lengths])], dtype=torch.int32)
    rows, requests = int(offsets[-1]), len(lengths)
    words = torch.randint(-(2**31), 2**31, (3, (vocab + 31) // 32), generator=g).int()
    words[:, 0] |= 1
    of_row = torch.randint(-1, 3, (rows,), generator=g).int()
    q = torch.softmax(torch.randn(rows, vocab, generator=g, dtype=torch.float64), 1)
    is_sampled = torch.rand(rows, generator=g) < 0.8
    q_of_row = torch.where(is_sampled, torch.arange(rows), -1).int()
    batch = Batch(
        logits=(2 * torch.randn(rows, vocab, generator=g)).to(dtype),
        offsets=offsets,
        drafts=torch.randint(0, vocab, (rows,), generator=g).int(),
        rules=torch.tensor(rule if isinstance(rule, list) else [rule] * requests).int(),
        temperatures=torch.rand(requests, generator=g) + 0.3,
        seeds=torch.randint(-(2**63), 2**63 - 1, (requests,), generator=g),
        positions=torch.randint(0, 2**20, (requests,), generator=g),
        longest=max(lengths) + 1,
        masks=Masks(words, of_row) if masked else None,
        q=DraftProbabilities(q, q_of_row) if sampled else None,
    )
    for b in range(requests):
        for row in range(int(offsets[b]), int(offsets[b + 1])):
            if float(torch.rand(1, generator=g)) < hit:
                scores = reference.scaled(batch, b, row)
                if Rule(int(batch.rules[b])) == Rule.COUPLED:
                    position = int(batch.positions[b]) + row - int(offsets[b])
                    scores = scores + noise.coupled_noise(int(batch.seeds[b]), position, vocab)
                batch.drafts[row] = int(scores.argmax())
    return batch


def on_device(batch: Batch) -> Batch:
    def move(value: object) -> object:
        if isinstance(value, torch.Tensor):
            return value.to(DEVICE)
        if isinstance(value, Masks | DraftProbabilities):
            return type(value)(*(move(getattr(value, f)) for f in value.__slots__))
        return value

    return Batch(**{f: move(getattr(batch, f)) for f in Batch.__slots__})


def check(batch: Batch, block: int = 64) -> tuple[list[int], list[int]]:
    expected = reference.verify(batch, uniforms(batch.logits.shape[1]))
    verdict = verify(on_device(batch), block=block)
    assert verdict.accepted.tolist() == expected.accepted.tolist()
    assert verdict.tokens.tolist() == expected.tokens.tolist()
    return expected.accepted.tolist(), expected.tokens.tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab", SIZES)
@pytest.mark.parametrize("rule", list(Rule))
def test_kernels_say_what_the_reference_says(rule: Rule, vocab: int, dtype: torch.dtype) -> None:
    lengths = [3, 16, 0, 1] if vocab > 100 else [0, 3, 16, 1, 7, 2]
    accepted, _ = check(
        make_batch(rule, vocab, lengths, vocab, dtype=dtype), 16 if vocab < 100 else 512
    )
    assert max(accepted) > 0


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("sampled", [True, False])
def test_rules_share_a_launch(masked: bool, sampled: bool) -> None:
    rules = [Rule.REJECTION, Rule.GREEDY, Rule.COUPLED] * 2
    check(make_batch(rules, 77, [2, 0, 5, 4, 1, 0], 5, masked=masked, sampled=sampled))


@pytest.mark.parametrize("rule", list(Rule))
def test_a_real_vocabulary(rule: Rule) -> None:
    check(make_batch(rule, 49_152, [2, 1], 3), block=4096)


@pytest.mark.parametrize("seed", range(4))
def test_the_reference_says_what_the_engine_says(seed: int) -> None:
    """Rows after mask and temperature, given to the loop's own rules."""
    vocab, lengths = 40, [0, 3, 5, 2]
    for rule in Rule:
        batch = make_batch(rule, vocab, lengths, seed)
        verdict = reference.verify(batch, uniforms(vocab))
        for b, n in enumerate(lengths):
            first = int(batch.offsets[b])
            rows = torch.stack([engine_row(batch, b, first + k) for k in range(n + 1)])
            drafts = batch.drafts[first : first + n].tolist()
            key = {"seed": int(batch.seeds[b]), "position": int(batch.positions[b])}
            if rule == Rule.GREEDY:
                expected = verify_greedy(rows, drafts)
            elif rule == Rule.COUPLED:
                expected = verify_coupled(rows, drafts, **key)
            else:
                expected = verify_rejection(
                    torch.softmax(rows.double(), 1), drafts, engine_q(batch, first, n), **key
                )
            assert int(verdict.accepted[b]) == expected.accepted
            assert int(verdict.tokens[b]) == expected.next_token


def engine_row(batch: Batch, b: int, row: int) -> torch.Tensor:
    assert batch.masks is not None
    x = batch.logits[row].clone()
    if int(batch.rules[b]) != Rule.GREEDY:
        x /= batch.temperatures[b]
    mask_row = int(batch.masks.of_row[row])
    if mask_row >= 0:
        x[torch.from_numpy(~unpack(batch.masks.words[mask_row], len(x)))] = -torch.inf
    return x


def engine_q(batch: Batch, first: int, n: int) -> torch.Tensor:
    assert batch.q is not None
    q = torch.zeros(n, batch.logits.shape[1], dtype=torch.float64)
    for k in range(n):
        q_row = int(batch.q.of_row[first + k])
        if q_row >= 0:
            q[k] = batch.q.q[q_row]
        else:
            q[k, int(batch.drafts[first + k])] = 1.0
    return q


@pytest.mark.parametrize("rule", list(Rule))
def test_rows_without_a_usable_maximum_give_no_token(rule: Rule) -> None:
    """All masked, all -inf, a legal NaN, a legal +inf; and forbidden ones do no harm."""
    batch = make_batch(rule, 40, [0] * 6, masked=False, sampled=False)
    words = torch.tensor([[0, 0], [1 << 3, 0], [-1, 0]], dtype=torch.int32)
    of_row = torch.tensor([0, -1, -1, -1, 1, 2], dtype=torch.int32)
    batch.logits[1] = -torch.inf
    batch.logits[2, 7], batch.logits[3, 39] = torch.nan, torch.inf
    batch.logits[4], batch.logits[4, 3], batch.logits[5, 33] = torch.nan, -1e30, torch.nan
    batch.logits[5, :32], batch.logits[5, 31] = -3e38, 3e38
    batch = replace(batch, masks=Masks(words, of_row), temperatures=torch.ones(6))
    _, tokens = check(batch, 16)
    assert tokens == [-1, -1, -1, -1, 3, 31]


def test_equal_logits_go_to_the_lowest_legal_id() -> None:
    batch = make_batch(Rule.GREEDY, 130, [1], sampled=False)
    batch.logits[:] = 2.5
    batch.drafts[0] = 70
    masks = Masks(torch.tensor([[0, 0, -64, 0, 0]]).int(), torch.tensor([0, -1]).int())
    assert check(replace(batch, masks=masks), 32) == ([1], [0])


def over_columns(batch: Batch, dtype: torch.dtype) -> tuple[Batch, Batch]:
    """The batch with q' over a third of the tokens, in columns of their own and spread over all;
    most drafts are among them."""
    assert batch.q is not None
    vocab = batch.logits.shape[1]
    g = torch.Generator().manual_seed(vocab)
    ids = torch.randperm(vocab, generator=g)[: max(1, vocab // 3)]  # columns in any order
    columns = torch.full((vocab,), -1, dtype=torch.int32)
    columns[ids] = torch.arange(len(ids), dtype=torch.int32)
    q = (batch.q.q[:, ids] / batch.q.q[:, ids].sum(dim=1, keepdim=True)).to(dtype)
    spread = torch.zeros(len(q), vocab, dtype=dtype)
    spread[:, ids] = q
    among = ids[torch.randint(0, len(ids), (len(batch.drafts),), generator=g)]
    drafts = torch.where(torch.rand(len(among), generator=g) < 0.8, among, batch.drafts).int()
    of_row = batch.q.of_row
    return (
        replace(batch, drafts=drafts, q=DraftProbabilities(q, of_row, columns)),
        replace(batch, drafts=drafts, q=DraftProbabilities(spread, of_row)),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("vocab", [1, 33, 500])
def test_a_reduced_draft_vocabulary_is_the_whole_one_with_zeros(
    vocab: int, dtype: torch.dtype
) -> None:
    rules = [Rule.REJECTION, Rule.COUPLED, Rule.REJECTION, Rule.REJECTION]
    for seed in range(3):
        batch = make_batch(rules, vocab, [4, 2, 0, 7], seed, masked=seed > 0)
        reduced, spread = over_columns(batch, dtype)
        assert check(reduced, 64) == check(spread, 64)


@pytest.mark.parametrize("masked", [True, False])
def test_float32_probabilities_are_taken_as_they_are(masked: bool) -> None:
    batch = make_batch(Rule.REJECTION, 77, [2, 0, 5, 4, 1, 6], 5, masked=masked)
    assert batch.q is not None
    narrow = DraftProbabilities(batch.q.q.float(), batch.q.of_row)
    accepted, _ = check(replace(batch, q=narrow))
    assert max(accepted) > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("reduced", [False, True])
def test_rejection_follows_the_target(reduced: bool, dtype: torch.dtype) -> None:
    """DSPARK.md, section 6: the first token of a block is a sample of p, whatever q and the mask
    are; chi-squared over 300 seeds. Sampling p after a rejection instead fails this."""
    vocab, draws = 5, 300
    p = torch.tensor([0.55, 0.2, 0.15, 0.1, 0.0], dtype=torch.float64)
    q = torch.tensor([0.05, 0.1, 0.5, 0.15, 0.2], dtype=torch.float64)
    columns = None
    if reduced:  # the drafter cannot say token 1, and its columns are in an order of their own
        q = torch.tensor([0.1, 0.0, 0.5, 0.2, 0.2], dtype=torch.float64)
        columns = torch.tensor([2, -1, 0, 3, 1]).int()
    known = q if columns is None else q[torch.tensor([2, 4, 0, 3])]
    drafts = torch.multinomial(
        q, draws, replacement=True, generator=torch.Generator().manual_seed(1)
    )
    rows = torch.stack([drafts, torch.zeros_like(drafts)], 1).reshape(-1).int()
    batch = Batch(
        logits=torch.cat([p[:4].log(), torch.tensor([3.0])]).float().repeat(2 * draws, 1),
        offsets=torch.arange(0, 2 * draws + 1, 2).int(),
        drafts=rows,
        rules=torch.full((draws,), int(Rule.REJECTION)).int(),
        temperatures=torch.ones(draws),
        seeds=torch.arange(draws),
        positions=torch.full((draws,), 9),
        longest=2,
        masks=Masks(torch.tensor([[0b01111]]).int(), torch.zeros(2 * draws).int()),
        q=DraftProbabilities(known[None].to(dtype), torch.zeros(2 * draws).int(), columns),
    )
    verdict = verify(on_device(batch), block=8)
    first = torch.where(verdict.accepted.cpu() > 0, drafts, verdict.tokens.cpu())
    observed = torch.bincount(first.long(), minlength=vocab).double()
    assert chi_squared(observed, p * draws) < 16.3  # 3 degrees of freedom, one in a thousand
    # The wrong rule: a fallen draft is replaced by a sample of p. The test must see it.
    falls = 1 - torch.minimum(p, q).sum()
    wrong = (torch.minimum(p, q) + falls * p) * draws
    assert chi_squared(wrong, p * draws) > 16.3


def chi_squared(observed: torch.Tensor, expected: torch.Tensor) -> float:
    possible = expected > 0
    assert observed[~possible].sum() == 0
    return float(((observed - expected)[possible] ** 2 / expected[possible]).sum())
