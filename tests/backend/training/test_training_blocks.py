"""Slots are told to predict what follows their anchor, and nothing outside the answer."""

from __future__ import annotations

from collections.abc import Callable

import torch

from dspark_backend.training.blocks import sample_blocks, trainable
from dspark_backend.training.features import DecoderFeatures
from dspark_backend.training.rollout import Rollout


def test_slots_follow_their_anchor_and_end_with_the_answer(
    decoder_features: Callable[..., DecoderFeatures], rollouts: list[Rollout]
) -> None:
    source = decoder_features()
    examples = [source.example(rollouts[0]), source.example(rollouts[11])]
    blocks = sample_blocks(examples, 25, 4, torch.Generator().manual_seed(1))
    seen = 0
    for b, example in enumerate(examples):
        tokens, length = example.tokens.tolist(), len(example.tokens)
        for a, anchor in enumerate(blocks.anchors[b].tolist()):
            real = bool(blocks.valid[b, a, 0])
            assert not real or example.first <= anchor <= length - 2
            for k in range(4):
                at = anchor + 1 + k
                assert bool(blocks.valid[b, a, k]) == (real and at < length)
                if blocks.valid[b, a, k]:
                    seen += 1
                    assert int(blocks.anchor_tokens[b, a]) == tokens[anchor]
                    assert int(blocks.tokens[b, a, k]) == tokens[at]
                    assert int(blocks.previous[b, a, k]) == tokens[at - 1]
                    assert int(blocks.rows[b, a, k]) == at - example.first
        assert torch.equal(blocks.features[b, :length], example.features.float())
    # 20 answer tokens hold 19 anchors: all are drawn, none twice; 31 hold more than are wanted.
    firsts = [len(set(blocks.anchors[b][blocks.valid[b, :, 0]].tolist())) for b in range(2)]
    assert firsts == [19, 25]
    assert seen == int(blocks.valid.sum())


def test_an_answer_of_one_token_has_no_place_for_an_anchor(
    decoder_features: Callable[..., DecoderFeatures], rollouts: list[Rollout]
) -> None:
    short = Rollout("k", "s", rollouts[0].kind, (1, 2, 3), (9,))
    assert not trainable(decoder_features().example(short))
