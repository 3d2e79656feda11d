"""Fixtures for training: rollouts of a tiny target and a small drafter for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dspark_backend.catalog import ModelFiles, resolve
from dspark_backend.drafter.config import DrafterConfig, HeadType
from dspark_backend.drafter.model import DraftModel
from dspark_backend.request import StepKind
from dspark_backend.target.precision import Precision
from dspark_backend.training.features import DecoderFeatures
from dspark_backend.training.rollout import Rollout
from dspark_backend.training.warm_start import warm_start

TAPS = (0, 1, 2)


@pytest.fixture(scope="session")
def tiny_files(tiny_checkpoint: Callable[..., Path]) -> ModelFiles:
    return resolve(str(tiny_checkpoint("llama", num_hidden_layers=4)))


@pytest.fixture(scope="session")
def rollouts() -> list[Rollout]:
    """Twelve rollouts of a very regular language, so that a drafter can learn it at once."""
    made = []
    for seed in range(12):
        start = 40 + 7 * seed
        answer = tuple(start + (i * i) % 11 for i in range(20 + seed))
        made.append(Rollout(f"key{seed}", "counting", StepKind.TEXT, (5, 6, 7 + seed), answer))
    return made


@pytest.fixture
def draft_model(tiny_files: ModelFiles) -> Callable[..., DraftModel]:
    """``draft_model(head="rnn", d2t=...)``: warm-started, float32, always the same."""

    def make(head: str = "vanilla", d2t: torch.Tensor | None = None, **fields: Any) -> DraftModel:
        config = DrafterConfig.for_target(
            tiny_files.config,
            **{
                "num_layers": 2,
                "block_size": 4,
                "mask_token_id": 1,
                "target_layer_ids": TAPS,
                "head": HeadType(head),
                "markov_rank": 8,
                "draft_vocab_size": None if d2t is None else len(d2t),
                **fields,
            },
        )
        store = tiny_files.tensors()
        head_rows = store.get("lm_head.weight").float()
        model = DraftModel(
            config,
            store.get("model.embed_tokens.weight").float(),
            head_rows if d2t is None else head_rows[d2t],
            max_positions=128,
        )
        warm_start(model, store)
        return model

    return make


@pytest.fixture
def decoder_features(tiny_files: ModelFiles) -> Callable[..., DecoderFeatures]:
    def make(
        d2t: torch.Tensor | None = None, precision: Precision = Precision.INT8X16
    ) -> DecoderFeatures:
        return DecoderFeatures(tiny_files, precision, TAPS, d2t, max_tokens=512)

    return make
