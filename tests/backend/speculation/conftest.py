"""Grammars over the tiny tokenizer, an engine whose drafter is a Markov chain, and how well
outcomes follow a distribution."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dspark_backend.catalog.files import ModelFiles, open_checkpoint
from dspark_backend.engine import Engine
from dspark_backend.grammar.compile import Grammar, GrammarCompiler
from dspark_backend.kv.budget import KVShape
from dspark_backend.kv.contiguous import SequenceKV
from dspark_backend.parts import Parts
from dspark_backend.sampling.choose import sample
from dspark_backend.sampling.noise import Noise, Stream
from dspark_backend.sampling.verifier import HostVerifier
from dspark_backend.scheduler import Limits
from dspark_backend.speculation.candidate import BudgetPolicy
from dspark_backend.speculation.distribution import Distribution
from dspark_backend.speculation.protocol import Anchor, Proposal
from dspark_backend.speculation.vocabulary import DraftVocabulary
from dspark_backend.target.load import load_decoder
from dspark_backend.target.precision import Precision

VOCAB = 512
SPOKEN = (70, 71, 72, 73, 74)  # as in the tests: the only tokens that a bias leaves probable


@pytest.fixture(scope="session")
def tiny_files(tiny_checkpoint: Callable[..., Path]) -> ModelFiles:
    return open_checkpoint("tiny", tiny_checkpoint("qwen3"))


@pytest.fixture(scope="session")
def lark(tiny_files: ModelFiles) -> Callable[[str], Grammar]:
    """Compiles a grammar for the tiny model, whose vocabulary is 512."""
    compiler = GrammarCompiler(tiny_files.tokenizer(), vocab_size=512)
    return compiler.compile_lark


@pytest.fixture(scope="session")
def sigmas() -> Callable[[Iterable[Any], Mapping[Any, float]], float]:
    """How far outcomes are from their probabilities: a chi-squared statistic as standard deviations
    of a normal variable (Wilson and Hilferty 1931). What is expected less than five times is
    pooled; an outcome that cannot be is infinitely far."""

    def distance(outcomes: Iterable[Any], probabilities: Mapping[Any, float]) -> float:
        counts = Counter(outcomes)
        if any(probabilities.get(outcome, 0.0) == 0.0 for outcome in counts):
            return math.inf
        total = sum(counts.values())
        seen: Counter[Any] = Counter()
        wanted: Counter[Any] = Counter()
        for outcome, p in probabilities.items():
            cell = outcome if p * total >= 5 else "rare"
            seen[cell] += counts[outcome]
            wanted[cell] += p * total  # type: ignore[assignment]
        statistic = sum((seen[c] - wanted[c]) ** 2 / wanted[c] for c in wanted if wanted[c])
        freedom = len(wanted) - 1
        spread = 2 / (9 * freedom)
        return ((statistic / freedom) ** (1 / 3) - (1 - spread)) / math.sqrt(spread)

    return distance


class MarkovDrafter:
    """Logits of each slot are a fixed random function of the token before it, and so is its
    confidence: 0.9 or 0.1. ``masked`` drafts ask the guide, where there is one; the others are
    drawn from a q over ``SPOKEN`` that knows no grammar."""

    taps = (0,)
    block_size = 4
    context_shape = KVShape(layers=1, kv_heads=1, head_dim=1)

    def __init__(self, *, masked: bool = True) -> None:
        rng = np.random.default_rng(5)
        self._logits = (1.5 * rng.standard_normal((VOCAB, VOCAB))).astype(np.float32)
        self._sure = np.where(np.arange(VOCAB) % 2, 0.9, 0.1)
        self._vocabulary = DraftVocabulary.whole(VOCAB)
        self._masked = masked
        self.seed = 0
        self.proposals: list[tuple[Anchor, Proposal]] = []

    def extend(self, context: SequenceKV, features: torch.Tensor) -> None:
        context.length += len(features)

    def propose(self, anchors: Sequence[Anchor]) -> list[Proposal]:
        made = [self._masked_block(a) if self._masked else self._free_block(a) for a in anchors]
        self.proposals += zip(anchors, made, strict=True)
        return made

    def _masked_block(self, anchor: Anchor) -> Proposal:
        if anchor.guide is None:
            return self._greedy_block(anchor)
        last, slots, sure = (anchor.token, *anchor.known)[-1], [], []
        for _ in range(self.block_size - len(anchor.known)):
            slot = anchor.guide.choose(self._logits[last], self._vocabulary)
            if slot is None:
                break
            slots.append(slot)
            sure.append(slot.confidence(float(self._sure[last])))
            last = slot.token
        return Proposal(
            tuple(slot.token for slot in slots),
            tuple(np.cumprod(sure).tolist()),
            "markov",
            tuple(slot.mask_width for slot in slots),
            tuple(slot.forced for slot in slots),
            tuple(slot.distribution for slot in slots),
        )

    def _greedy_block(self, anchor: Anchor) -> Proposal:
        last, drafts = (anchor.token, *anchor.known)[-1], []
        for _ in range(self.block_size - len(anchor.known)):
            last = SPOKEN[int(self._logits[last, list(SPOKEN)].argmax())]
            drafts.append(last)
        return Proposal(tuple(drafts), (1.0,) * len(drafts), "markov")

    def _free_block(self, anchor: Anchor) -> Proposal:
        last, drafts, drawn = (anchor.token, *anchor.known)[-1], [], []
        for slot in range(len(anchor.known), self.block_size):
            q = np.zeros(VOCAB)
            weights = np.exp(self._logits[last, list(SPOKEN)].astype(np.float64))
            q[list(SPOKEN)] = weights / weights.sum()
            noise = Noise(self.seed, Stream.DRAFT, anchor.context.length, slot)
            last = sample(torch.from_numpy(q), noise)
            drafts.append(last)
            drawn.append(Distribution(np.arange(VOCAB, dtype=np.uint32), q))
        return Proposal(tuple(drafts), (1.0,) * len(drafts), "markov", (), (), tuple(drawn))


MakeEngine = Callable[..., tuple[Engine, MarkovDrafter]]


@pytest.fixture
def speculative(tiny_files: ModelFiles) -> Iterator[MakeEngine]:
    opened: list[Engine] = []

    def load(policy: BudgetPolicy | None = None, **options: Any) -> tuple[Engine, MarkovDrafter]:
        decoder = load_decoder(tiny_files, Precision.INT8, 512)
        drafter = MarkovDrafter(**options)
        limits = Limits(running=1 if options else 64)
        parts = Parts(decoder, HostVerifier(), drafter, Precision.INT8)
        opened.append(Engine(tiny_files, parts, 1, 2**28, limits, policy))
        return opened[-1], drafter

    yield load
    for engine in opened:
        engine.close()
