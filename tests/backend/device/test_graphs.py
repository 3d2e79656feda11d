"""Recorded passes: which are replayed, and that a replay reads all that changes from its own
tensors. Recording itself is CUDA's; where there is no GPU, a recording runs its function again."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from dspark_backend.catalog.files import open_checkpoint
from dspark_backend.kernels.recording import (
    Capture,
    Piece,
    RecordingCounts,
    Recordings,
    Tensors,
    bucket,
)
from dspark_backend.kernels.upload import Mailbox
from dspark_backend.kv.paged import paged
from dspark_backend.kv.sequence import KV
from dspark_backend.target.batch import Batch, Rows
from dspark_backend.target.device_load import load_device_decoder
from dspark_backend.target.graphs import GraphedDecoder

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def graphed(tiny_checkpoint: Callable[..., Path], capture: Capture | None) -> GraphedDecoder:
    files = open_checkpoint("tiny", tiny_checkpoint("qwen3"))
    decoder = load_device_decoder(files, torch.float32, 512, DEVICE)
    return GraphedDecoder(decoder, Recordings(DEVICE, capture, most=2))


def filled(graphed: GraphedDecoder, lengths: Sequence[int]) -> list[KV]:
    storage = graphed.storage(None, 2**21)
    made: list[KV] = []
    for seed, length in enumerate(lengths):
        kv = storage.new()
        kv.reserve(length + 40)
        if not made:  # whatever is read without having been written shows
            for memory in (paged(kv).pool.keys, paged(kv).pool.values):
                memory.fill_(torch.nan)
        tokens = np.random.default_rng(seed).integers(0, 380, length).tolist()
        graphed.decoder.forward(Batch([Rows(kv, tokens, 0)]))
        kv.length = length
        made.append(kv)
    return made


def bits(values: torch.Tensor) -> torch.Tensor:
    """A copy that equals itself, NaN included."""
    return values.clone().view(torch.int32)


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
    assert graphed.recordings.counts == RecordingCounts(hits=4, misses=2, recorded=1)


def test_another_shape_is_another_recording_and_few_are_kept(graphed: GraphedDecoder) -> None:
    (kv,) = filled(graphed, (9,))
    for count in (1, 2, 3, 1):
        for _ in range(3):
            graphed.forward(Batch([Rows(kv, (5,) * count, 1)]))
    # A shape whose recording left is seen anew.
    assert graphed.recordings.counts == RecordingCounts(hits=4, misses=8, recorded=4)
    graphed.forward(Batch([Rows(kv, (5, 5, 5), 1)]))
    assert graphed.recordings.counts.hits == 5


def test_passes_of_one_bucket_share_a_recording(graphed: GraphedDecoder) -> None:
    """Three sequences or four, eleven rows or sixteen, with and without logits of all of them."""
    kvs = filled(graphed, (5, 61, 70, 3))
    pool = paged(kvs[0]).pool
    for counts in ((2, 2, 7), (3, 2, 7, 4), (5, 5, 5), (1, 1, 8, 6), (2, 3, 4, 7), (6, 6, 4)):
        rows = [Rows(kv, range(9, 9 + n), 1) for kv, n in zip(kvs, counts, strict=False)]
        expected = graphed.decoder.forward(Batch(rows), (0,))
        before = bits(pool.keys[:, : pool.scratch])
        given = graphed.forward(Batch(rows), (0,))
        assert torch.equal(given.logits, expected.logits)
        assert torch.equal(given.features, expected.features)
        assert torch.equal(bits(pool.keys[:, : pool.scratch]), before), "padding is nobody's"
    assert graphed.recordings.counts == RecordingCounts(hits=4, misses=2, recorded=1)


def test_what_is_too_large_is_launched(
    graphed: GraphedDecoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dspark_backend.target.graphs.ROWS", 3)
    (kv,) = filled(graphed, (9,))
    for _ in range(4):
        graphed.forward(Batch([Rows(kv, (5,) * 4, 1)]))
    assert graphed.recordings.counts == RecordingCounts(misses=4)


def test_where_recording_fails_passes_are_launched(
    graphed: GraphedDecoder, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(run: Callable[[], Tensors]) -> tuple[Callable[[], object], Tensors]:
        raise RuntimeError("operation not permitted when stream is capturing")

    graphed = GraphedDecoder(graphed.decoder, Recordings(DEVICE, broken))
    (kv,) = filled(graphed, (9,))
    batch = Batch([Rows(kv, (5,), 1)])
    expected = graphed.decoder.forward(batch).logits
    with caplog.at_level(logging.ERROR):
        for _ in range(4):
            assert torch.equal(graphed.forward(batch).logits, expected)
    assert graphed.recordings.counts == RecordingCounts(misses=4, failed=1)
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


def test_sizes_of_recordings_are_few_and_close_above() -> None:
    sizes = [bucket(count) for count in range(257)]
    assert sizes[:10] == [0, 1, 2, 4, 4, 8, 8, 8, 8, 16]
    assert all(count <= size <= max(2 * count, count + 31) for count, size in enumerate(sizes))
    assert all(bucket(size) == size for size in sizes)
    assert len(set(sizes)) == 18


def test_a_replay_reads_its_own_tensors_and_gives_new_ones(capture: Capture | None) -> None:
    recordings = Recordings(DEVICE, capture)

    def weighted(there: Mapping[str, torch.Tensor]) -> Tensors:
        return (there["x"] * there["weights"][:, None]).sum(0), there["x"] + 1

    given, expected = [], []
    for step in range(5):
        x = torch.full((3 - step % 2, 2), float(step + 1), device=DEVICE)
        weights = np.array([1.0, 10.0, 100.0, 1000.0], np.float32) + step
        total, more = recordings.run("w", weighted, {"weights": weights}, {"x": Piece(x, 4)})
        expected.append((x * torch.from_numpy(weights[: len(x), None]).to(DEVICE)).sum(0))
        assert more[: len(x)].equal(x + 1)
        given.append(total)
        x.fill_(torch.nan)  # what the recording was made of, or an earlier replay read
        weights.fill(np.nan)
    assert all(a.equal(b) for a, b in zip(given, expected, strict=True))
    assert recordings.counts == RecordingCounts(hits=3, misses=2, recorded=1)
    # Another dtype, another key, another width: none of them is served by it.
    other = torch.ones(3, 2, dtype=torch.float64, device=DEVICE)
    for key, piece in (("v", Piece(other.float(), 4)), ("w", Piece(other, 4))):
        recordings.run(key, weighted, {"weights": np.ones(4, np.float32)}, {"x": piece})
    recordings.run("w", weighted, {"weights": np.ones(3, np.float32)}, {"x": Piece(other, 3)})
    assert recordings.counts == RecordingCounts(hits=3, misses=5, recorded=1)


def test_where_one_kind_cannot_be_recorded_others_are(capture: Capture | None) -> None:
    recordings = Recordings(DEVICE, capture)
    for step in range(1, 5):
        (one,) = recordings.run(("a", 1), lambda t: (t["x"] * float(t["x"][0]),), ones(step))
        (two,) = recordings.run(("b", 1), lambda t: (t["x"] + 1,), ones(step))
        assert (one[0], two[0]) == (step * step, step + 1)
    assert recordings.counts == RecordingCounts(hits=2, misses=6, recorded=1, failed=1)
    for _ in range(3):
        recordings.run(("a", 2), lambda t: (t["x"],), ones(1))
    assert recordings.counts.recorded == 1


def ones(value: float) -> dict[str, np.ndarray]:
    return {"x": np.full(3, value)}


def test_recordings_read_pieces_of_one_shape_in_one_place(capture: Capture | None) -> None:
    recordings = Recordings(DEVICE, capture, most=2)

    def run(key: int, rows: int, value: float) -> torch.Tensor:
        piece = Piece(torch.full((rows, 2), value, device=DEVICE), 8)
        (made,) = recordings.run(key, lambda t: (t["x"] * key,), {}, {"x": piece})
        return made[:, 0]

    for step in range(4):
        for key in (1, 2):
            rows, value = 8 - step - key, float(10 * step + key)
            assert run(key, rows, value).tolist() == [key * value] * rows + [0.0] * (8 - rows)
    first, second = recordings._kept.values()
    assert first.pieces["x"] is second.pieces["x"]
    assert len(recordings._places) == 1
    del first, second
    for key in (3, 4):  # these read none, and take the place of those that do
        for _ in range(3):
            recordings.run(key, lambda t: (t["x"],), ones(1))
    assert not recordings._places


def test_what_is_remembered_of_shapes_is_bounded(capture: Capture | None) -> None:
    recordings = Recordings(DEVICE, capture, most=1)
    for size in range(500):
        recordings.run("x", lambda there: (there["a"],), {"a": np.zeros(size)})
    assert len(recordings._seen) <= 65
    assert not recordings._kept
