"""What a verifier is given and what it answers: flattened rows of all requests, on one device."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

from dspark_backend.kernels.contract import FLOATS, Masks, describe, expect


class Rule(IntEnum):
    """How a request's drafts are held against the target (DSPARK.md, section 6)."""

    GREEDY = 0  # a draft stands iff it is the argmax
    COUPLED = 1  # a draft stands iff it is the argmax of logits / temperature + G[position]
    REJECTION = 2  # a draft stands with probability min(1, p(x) / q(x)), else (p - q)+ is sampled


class Stream(IntEnum):
    """Which decision a draw feeds: the numbers of :class:`dspark_backend.sampling.noise.Stream`."""

    TARGET = 0
    ACCEPT = 2
    RESIDUAL = 3


@dataclass(frozen=True, slots=True)
class DraftProbabilities:
    """q', which sampled drafts were drawn from, over the drafter's vocabulary.

    ``q`` float32 or float64 [K, Vq]; ``of_row`` int32 [R] is the row of ``q`` that holds for a row
    of logits, -1 where its draft is a function of the context (q' is one-hot). ``columns`` int32
    [V] is the column of ``q`` of each token id, -1 where the drafter cannot say it; None where the
    columns are the token ids.
    """

    q: Tensor
    of_row: Tensor
    columns: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Batch:
    """The rows of B requests, one block of ``l_b + 1`` rows a request: row k of a block chooses the
    token at ``positions[b] + k``, given the block's first k drafts. A request without rows is there
    for the size of the launch: it accepts nothing, and its token is -1.

    ``logits`` [R, V] bfloat16, float16 or float32, after penalties and before the mask and the
    temperature; ``offsets`` int32 [B + 1], request b has the rows ``offsets[b]:offsets[b + 1]``;
    ``drafts`` int32 [R], the token that each row judges (a block's last is not looked at; an id
    outside the vocabulary never stands); ``rules`` int32 [B] of :class:`Rule`; ``temperatures``
    float32 [B], positive, not looked at for greedy requests; ``seeds`` and ``positions`` int64 [B].
    ``longest`` bounds the rows of a block: the host knows it, so that a launch depends on nothing
    that lies on the device. Nothing is written to.
    """

    logits: Tensor
    offsets: Tensor
    drafts: Tensor
    rules: Tensor
    temperatures: Tensor
    seeds: Tensor
    positions: Tensor
    longest: int
    masks: Masks | None = None
    q: DraftProbabilities | None = None

    def __post_init__(self) -> None:
        """Raises ValueError for shapes, dtypes or devices that break the contract. Values lie on
        the device and are not looked at."""
        if self.logits.dim() != 2 or self.logits.dtype not in FLOATS:
            raise ValueError(
                f"logits are [R, V] of bfloat16, float16 or float32, not {describe(self.logits)}"
            )
        if self.logits.shape[1] == 0 or self.logits.stride(1) != 1:
            raise ValueError("rows of logits are contiguous and not empty")
        if self.longest < 1:
            raise ValueError(f"a block has at least one row: longest is {self.longest}")
        rows, vocab = self.logits.shape
        requests = self.offsets.shape[0] - 1
        expect("offsets", self.offsets, self.logits.device, torch.int32, requests + 1)
        expect("drafts", self.drafts, self.logits.device, torch.int32, rows)
        expect("rules", self.rules, self.logits.device, torch.int32, requests)
        expect("temperatures", self.temperatures, self.logits.device, torch.float32, requests)
        expect("seeds", self.seeds, self.logits.device, torch.int64, requests)
        expect("positions", self.positions, self.logits.device, torch.int64, requests)
        if self.masks is not None:
            self.masks.expect(rows, self.logits.device)
        if self.q is not None:
            self._expect_q(self.q, rows, vocab)

    @property
    def requests(self) -> int:
        """B."""
        return self.offsets.shape[0] - 1

    def _expect_q(self, q: DraftProbabilities, rows: int, vocab: int) -> None:
        if q.q.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"q.q is float32 or float64 [K, Vq], not {describe(q.q)}")
        expect("q.q", q.q, self.logits.device, q.q.dtype, *q.q.shape[:2])
        expect("q.of_row", q.of_row, self.logits.device, torch.int32, rows)
        if q.columns is not None:
            expect("q.columns", q.columns, self.logits.device, torch.int32, vocab)
        elif q.q.shape[1] != vocab:
            raise ValueError(
                f"q.q has {q.q.shape[1]} columns for {vocab} token ids: say in q.columns which is "
                "whose"
            )


@dataclass(frozen=True, slots=True)
class Verdict:
    """``accepted`` int32 [B], how many of each request's drafts stand, and ``tokens`` int32 [B],
    the correction or bonus that follows them.

    A token is -1 where the row that should give it has no finite maximum over its legal tokens:
    everything is masked or -inf (a dead grammar, or biases), or there is a NaN or +inf among them
    (a forward pass gone wrong). The host, which learns it a step later, fails that request.
    """

    accepted: Tensor
    tokens: Tensor
