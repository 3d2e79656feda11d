"""The CPU's drafter drafts what the reference drafts, incrementally, and for each session alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dspark_backend.catalog import resolve
from dspark_backend.drafter.calibration import Calibration
from dspark_backend.drafter.checkpoint import Storage, open_drafter, write_drafter
from dspark_backend.drafter.drafter import DSparkDrafter
from dspark_backend.kernels.linear.reference import quantise_weight
from dspark_backend.kv.budget import KVBudget
from dspark_backend.kv.contiguous import SequenceKV
from dspark_backend.speculation.protocol import Anchor
from dspark_backend.target.precision import Precision

MakeDrafter = Callable[..., Any]

VARIANTS: list[dict[str, Any]] = [
    {"family": "llama", "head": "none"},
    {"family": "llama", "head": "vanilla", "draft_vocab": 77},
    {"family": "qwen2", "head": "gated"},
    {"family": "qwen3", "head": "rnn", "draft_vocab": 300, "rank": 5},
    {"family": "qwen2", "head": "rnn", "block_size": 1, "num_layers": 1, "taps": (1,)},
    {
        "family": "llama",
        "head": "vanilla",
        "block_size": 7,
        "hidden_size": 36,
        "intermediate_size": 50,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 10,
        "confidence": False,
    },
]
IDS = [f"{v['family']}-{v['head']}-{i}" for i, v in enumerate(VARIANTS)]
TEMPERATURES = (1.0, 1.3, 0.8, 2.0, 0.5, 1.0, 1.0)
OFFSETS = (0.0, -0.7, 0.4, 0.0, 1.0, 0.0, 0.0)


class Ready:
    """A random drafter as the engine has it, and the reference over the very same numbers."""

    def __init__(self, drafter: Any, folder: Path, precision: Precision) -> None:
        copies = {"embed_tokens.weight": drafter.embedding, "lm_head.weight": drafter.lm_head}
        size = drafter.config.block_size
        calibration = Calibration(
            temperatures=TEMPERATURES[:size], offsets=OFFSETS[:size], data_set="d", samples=1
        )
        write_drafter(
            folder, drafter.config, drafter.state, drafter.d2t, calibration, Storage.INT8, copies
        )
        target = resolve(str(drafter.target_folder))
        files = open_drafter(folder, target.config)
        self.random = drafter
        self.drafter = DSparkDrafter(files, target, 512, precision)
        q, scale = quantise_weight(drafter.lm_head)
        head = q.float() * scale[:, None]
        self.reference = replace(drafter, state=files.state(), lm_head=head).reference()
        self._budget = KVBudget(2**28)

    def features(self, length: int, seed: int = 0) -> torch.Tensor:
        return self.random.features(length, seed).bfloat16().float()

    def context(self, features: torch.Tensor, pieces: int = 1) -> SequenceKV:
        context = SequenceKV(self.drafter.context_shape, self._budget)
        context.reserve(max(1, len(features)))
        for piece in features.tensor_split(pieces):
            self.drafter.extend(context, piece)
        return context


@pytest.fixture
def ready(make_drafter: MakeDrafter, tmp_path: Path) -> Callable[..., Ready]:
    def make(precision: Precision = Precision.INT8X16, **variant: Any) -> Ready:
        return Ready(make_drafter(**variant), tmp_path / "drafter", precision)

    return make


@pytest.mark.parametrize("variant", VARIANTS, ids=IDS)
@pytest.mark.parametrize("length", [0, 1, 61])
def test_drafts_and_survivals_are_those_of_the_reference(
    variant: dict[str, Any], length: int, ready: Callable[..., Ready]
) -> None:
    """Up to a tie: bfloat16 features leave the logits a few hundredths of play."""
    it = ready(**variant)
    features = it.features(length)
    (proposal,) = it.drafter.propose([Anchor(it.context(features), 17)])
    tokens, logits, sure = it.reference.draft(features, 17)
    d2t = it.reference.d2t or list(range(512))
    survival = 1.0
    assert len(proposal.tokens) == len(proposal.survival) == it.drafter.block_size
    for k, (mine, expected) in enumerate(zip(proposal.tokens, tokens, strict=True)):
        if it.random.config.confidence:
            odds = sure[k] / (1 - sure[k])
            survival *= 1 / (1 + odds ** (-1 / TEMPERATURES[k]) * math.exp(-OFFSETS[k]))
        assert proposal.survival[k] == pytest.approx(survival, abs=0.03)
        if mine != expected:
            margin = logits[k, d2t.index(expected)] - logits[k, d2t.index(mine)]
            assert margin < 0.08, k
            break


def test_long_contexts(ready: Callable[..., Ready]) -> None:
    it = ready(family="qwen3", head="rnn")
    features = it.features(300)
    (proposal,) = it.drafter.propose([Anchor(it.context(features), 5)])
    tokens, _, _ = it.reference.draft(features, 5)
    assert proposal.tokens[0] == tokens[0]


@pytest.mark.parametrize("precision", list(Precision))
def test_appending_in_pieces_and_drafting_in_company_change_no_bit(
    precision: Precision, ready: Callable[..., Ready]
) -> None:
    it = ready(precision, family="qwen2", head="rnn")
    contexts = [it.context(it.features(length, seed=length)) for length in (1, 20, 47)]
    anchors = [Anchor(context, 30 + i) for i, context in enumerate(contexts)]
    together = it.drafter.propose(anchors)
    assert together == [it.drafter.propose([anchor])[0] for anchor in anchors]
    pieces = it.context(it.features(47, seed=47), pieces=9)
    assert pieces.length == 47
    for ours, theirs in ((pieces.keys, contexts[2].keys), (pieces.values, contexts[2].values)):
        np.testing.assert_array_equal(ours[:, :, :47], theirs[:, :, :47])


def test_drafting_changes_no_context(ready: Callable[..., Ready]) -> None:
    it = ready(family="llama", head="vanilla")
    context = it.context(it.features(12))
    before = context.keys.copy(), context.values.copy()
    first = it.drafter.propose([Anchor(context, 3)])
    assert context.length == 12
    np.testing.assert_array_equal(context.keys, before[0])
    np.testing.assert_array_equal(context.values, before[1])
    assert it.drafter.propose([Anchor(context, 3)]) == first


def test_a_rolled_back_context_drafts_as_if_it_had_never_gone_on(
    ready: Callable[..., Ready],
) -> None:
    it = ready(family="qwen3", head="gated")
    features = it.features(30)
    context = it.context(features)
    context.truncate(21)
    fresh = it.context(features[:21])
    assert it.drafter.propose([Anchor(context, 9)]) == it.drafter.propose([Anchor(fresh, 9)])
    it.drafter.extend(context, features[21:])
    whole = it.context(features)
    assert it.drafter.propose([Anchor(context, 9)]) == it.drafter.propose([Anchor(whole, 9)])


def test_survival_falls_and_a_drafter_without_the_head_never_says_stop(
    ready: Callable[..., Ready],
) -> None:
    sure = ready(family="llama", head="vanilla")
    (proposal,) = sure.drafter.propose([Anchor(sure.context(sure.features(4)), 3)])
    assert all(
        0 < b <= a <= 1 for a, b in zip((1.0, *proposal.survival), proposal.survival, strict=False)
    )
    blind = ready(family="llama", head="vanilla", confidence=False)
    (proposal,) = blind.drafter.propose([Anchor(blind.context(blind.features(4)), 3)])
    assert proposal.survival == (1.0,) * 5


def test_positions_without_room_are_refused(ready: Callable[..., Ready]) -> None:
    it = ready(family="llama")
    context = SequenceKV(it.drafter.context_shape, KVBudget(2**28))
    with pytest.raises(ValueError, match="no room for 4"):
        it.drafter.extend(context, it.features(4))
    assert it.drafter.propose([]) == []
