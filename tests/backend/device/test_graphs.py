"""Recorded passes: which are replayed, and that a replay reads all that changes from its own
tensors. Recording itself is CUDA's; where there is no GPU, a recording runs its function again."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from dspark_backend.catalog.files import open_checkpoint
from dspark_backend.kernels.upload import Mailbox
from dspark_backend.kv.sequence import KV
from dspark_backend.target.batch import Batch, Rows
from dspark_backend.target.device_load import load_device_decoder
from dspark_backend.target.graphs import GraphCounts, GraphedDecoder
from dspark_backend.target.protocol import Pass

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def again(run: Callable[[], Pass]) -> tuple[Callable[[], object], Pass]:
    """As a CUDA graph: nothing that ``run`` gives is kept but the place of its results."""
    result = run()
    result.logits.fill_(torch.nan)
    result.features.fill_(torch.nan)

    def replay() -> None:
        there = run()
        result.logits.copy_(there.logits)
        result.features.copy_(there.features)

    return replay, result


CAPTURE = None if DEVICE.type == "cuda" else again


@pytest.fixture
def graphed(tiny_checkpoint: Callable[..., Path]) -> GraphedDecoder:
    files = open_checkpoint("tiny", tiny_checkpoint("qwen3"))
    decoder = load_device_decoder(files, torch.float32, 512, DEVICE)
    return GraphedDecoder(decoder, CAPTURE, most=2)


def filled(graphed: GraphedDecoder, lengths: Sequence[int]) -> list[KV]:
    storage = graphed.storage(None, 2**21)
    made = []
    for seed, length in enumerate(lengths):
        kv = storage.new()
        kv.reserve(length + 40)
        tokens = np.random.default_rng(seed).integers(0, 380, length).tolist()
        graphed.decoder.forward(Batch([Rows(kv, tokens, 0)]))
        kv.length = length
        made.append(kv)
    return made


def test_a_replay_gives_the_bits_of_a_pass(graphed: GraphedDecoder) -> None:
    kvs = filled(graphed, (5, 61))
    before: list[tuple[torch.Tensor, torch.Tensor]] = []
    for step in range(6):  # the second sequence goes on in its next page
        batch = Batch([Rows(kv, (40 + step, 7 * i), 2 - i) for i, kv in enumerate(kvs)])
        expected = graphed.decoder.forward(batch, (0,))
        given = graphed.forward(batch, (0,))
        assert torch.equal(given.logits, expected.logits)
        assert torch.equal(given.features, expected.features)
        before.append((given.logits, given.logits.clone()))
        for kv in kvs:
            kv.length += 2
    # What an earlier pass gave is its own.
    assert all(torch.equal(logits, then) for logits, then in before)
    assert len({float(then[0, 0]) for _, then in before}) == 6
    assert graphed.counts == GraphCounts(hits=4, misses=2, recorded=1)


def test_another_shape_is_another_recording_and_few_are_kept(graphed: GraphedDecoder) -> None:
    (kv,) = filled(graphed, (9,))
    for count in (1, 2, 3, 1):
        for _ in range(3):
            graphed.forward(Batch([Rows(kv, (5,) * count, 1)]))
    # A shape whose recording left is seen anew.
    assert graphed.counts == GraphCounts(hits=4, misses=8, recorded=4)
    graphed.forward(Batch([Rows(kv, (5, 5, 5), 1)]))
    assert graphed.counts.hits == 5


def test_what_is_too_large_is_launched(
    graphed: GraphedDecoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dspark_backend.target.graphs.ROWS", 3)
    (kv,) = filled(graphed, (9,))
    for _ in range(4):
        graphed.forward(Batch([Rows(kv, (5,) * 4, 1)]))
    assert graphed.counts == GraphCounts(misses=4)


def test_where_recording_fails_passes_are_launched(
    graphed: GraphedDecoder, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(run: Callable[[], Pass]) -> tuple[Callable[[], object], Pass]:
        raise RuntimeError("operation not permitted when stream is capturing")

    graphed = GraphedDecoder(graphed.decoder, broken)
    (kv,) = filled(graphed, (9,))
    batch = Batch([Rows(kv, (5,), 1)])
    expected = graphed.decoder.forward(batch).logits
    with caplog.at_level(logging.ERROR):
        for _ in range(4):
            assert torch.equal(graphed.forward(batch).logits, expected)
    assert graphed.counts == GraphCounts(misses=4)
    assert caplog.text.count("could not be recorded") == 1


def test_a_mailbox_takes_what_fits_and_nothing_else() -> None:
    arrays = {"a": np.arange(3, dtype=np.int32), "b": np.ones((2, 2)), "c": np.zeros(0, np.int64)}
    box = Mailbox(arrays, DEVICE)
    a = box.tensors["a"]
    box.refill({**arrays, "a": np.array([7, 8, 9], np.int32), "b": np.full((2, 2), 5.0)})
    assert a.tolist() == [7, 8, 9]
    assert box.tensors["b"].tolist() == [[5.0, 5.0], [5.0, 5.0]]
    for wrong in (
        {**arrays, "a": np.arange(4, dtype=np.int32)},
        {**arrays, "a": np.arange(3)},
        {**arrays, "d": np.ones(1)},
        {"a": arrays["a"], "b": arrays["b"]},
    ):
        with pytest.raises(ValueError, match="fit in here"):
            box.refill(wrong)
