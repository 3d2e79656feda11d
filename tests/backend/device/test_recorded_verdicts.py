"""Verdicts of steps that are penalised, biased, cut or drawn, replayed: the bits of launched ones,
whatever fills the sizes up that recordings are made for."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from dspark_backend.kernels.contract import Masks
from dspark_backend.kernels.recording import Capture, RecordingCounts, Recordings
from dspark_backend.request import AcceptanceRule, SamplingParams
from dspark_backend.sampling.device import DeviceVerifier, _drawn, _masks, _probabilities
from dspark_backend.sampling.device_padding import padded
from dspark_backend.sampling.device_rewriting import rewriting, rewritten
from dspark_backend.sampling.device_truncation import truncated, truncation
from dspark_backend.sampling.sampler import Sampler
from dspark_backend.sampling.verifier import Question
from dspark_backend.speculation.distribution import Distribution

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
VOCAB = 203
REJECTION = AcceptanceRule.REJECTION


def sampling(kind: str, rng: np.random.Generator) -> SamplingParams:
    """Of a kind, every number another one each time."""
    fields: dict[str, Any] = {"temperature": 0.5 + rng.random(), "seed": int(rng.integers(2**40))}
    if kind in ("cut", "all"):
        fields |= {"top_k": int(rng.integers(1, 30)), "top_p": 0.3 + 0.7 * rng.random()}
        fields |= {"min_p": 0.1 * rng.random()}
    if kind in ("moved", "all"):
        biased = rng.choice(VOCAB, int(rng.integers(1, 5)), replace=False).tolist()
        fields |= {"logit_bias": {token: 4 * rng.standard_normal() for token in biased}}
        fields |= {"repetition_penalty": 1 + rng.random(), "frequency_penalty": rng.random()}
        fields |= {"presence_penalty": rng.random()}
    if kind in ("drawn", "all"):
        fields |= {"acceptance": REJECTION}
    return SamplingParams(**fields)


def block(params: SamplingParams, drafts: int, rng: np.random.Generator) -> Question:
    tokens = rng.integers(0, VOCAB, drafts).tolist()
    drawn: list[Distribution | None] = []
    for token in tokens if params.acceptance is REJECTION else ():
        ids = np.unique(np.append(rng.integers(0, VOCAB, 20), token)).astype(np.uint32)
        p = rng.random(len(ids)) + 1e-3
        drawn.append(Distribution(ids, p / p.sum()) if rng.random() < 0.8 else None)
    words = rng.integers(-(2**31), 2**31, (drafts + 1, -(-VOCAB // 32)), dtype=np.int32)
    words[:, 0] |= 1
    masks = tuple(torch.from_numpy(w) if rng.random() < 0.5 else None for w in words)
    sampler = Sampler(params, rng.integers(0, VOCAB, int(rng.integers(5, 20))).tolist(), VOCAB)
    sampler.observe(*rng.integers(0, VOCAB, 3).tolist())
    return Question(sampler, tuple(tokens), masks, tuple(drawn))


def logits_of(questions: list[Question], rng: np.random.Generator) -> torch.Tensor:
    """Such that most drafts may stand."""
    rows = sum(question.rows for question in questions)
    logits = 2 * rng.standard_normal((rows, VOCAB)).astype(np.float32)
    drafts = [t for question in questions for t in (*question.drafts, 0)]
    logits[np.arange(rows), drafts] += np.where(rng.random(rows) < 0.8, 12.0, 0.0)
    return torch.from_numpy(logits).to(DEVICE)


@pytest.mark.parametrize("kind", ["cut", "moved", "drawn", "all"])
def test_replayed_verdicts_are_those_that_are_launched(kind: str, capture: Capture | None) -> None:
    """Parameters, lengths of lists, rows and requests change from step to step; the sizes that they
    are filled up to hardly do."""
    recordings = Recordings(DEVICE, capture)
    launched, replayed = DeviceVerifier(), DeviceVerifier(recordings)
    rng = np.random.default_rng(3)
    accepted, given = [], []
    for drafts in ((4, 2, 3), (2, 1, 4, 2), (4, 3, 3), (4, 3, 1, 2), (1, 4, 4)):
        asked = [block(sampling(kind, rng), count, rng) for count in drafts]
        logits = logits_of(asked, rng)
        expected = [answer() for answer in launched.ask(logits, asked)]
        answers = replayed.ask(logits, asked)
        logits.fill_(torch.nan)
        given += [answer() for answer in answers]
        accepted += expected
    assert given == accepted
    assert len({verdict.accepted for verdict in accepted}) > 2
    counts = recordings.counts
    assert counts.recorded >= 1
    assert counts.hits >= 2
    assert counts.hits + counts.misses == 5


def judged_logits(arrays: dict[str, Any], logits: torch.Tensor) -> torch.Tensor:
    there = {name: torch.from_numpy(array).to(DEVICE) for name, array in arrays.items()}
    masks = Masks(there["mask_words"], there["mask_of_row"]) if "mask_words" in there else None
    return truncated(rewritten(logits, there), masks, there)


def test_what_sizes_are_filled_up_with_changes_no_bit() -> None:
    rng = np.random.default_rng(5)
    kinds = ["plain", "cut", "moved", "drawn", "all"]
    for _ in range(40):
        shape = rng.integers(0, 5, int(rng.integers(1, 6)))
        asked = [block(sampling(str(rng.choice(kinds)), rng), int(n), rng) for n in shape]
        logits = logits_of(asked, rng)
        for row in rng.choice(len(logits), 1):
            logits[row, int(rng.integers(VOCAB))] = float(rng.choice([np.nan, np.inf, -np.inf]))
        rows = len(logits)
        whole = torch.cat([logits, logits.new_zeros(int(rng.integers(0, 9)), VOCAB)])
        arrays: dict[str, Any] = {"rules": np.zeros(len(asked), np.int32)}
        for part in (_masks, _drawn, rewriting, truncation):
            arrays |= part(asked)
        sized = padded(arrays, len(whole))
        assert sized is not None
        expected, given = judged_logits(arrays, logits), judged_logits(sized, whole)
        assert torch.equal(given[:rows].view(torch.int32), expected.view(torch.int32))
        assert not given[rows:].any()
        if "q" not in arrays:
            continue
        read = []
        for them in (arrays, sized):
            there = {name: torch.from_numpy(them[name]).to(DEVICE) for name in them}
            q = _probabilities(there, VOCAB)
            assert q is not None
            assert q.columns is not None
            every = q.q[q.of_row[:rows].clamp(min=0).long()][:, q.columns.clamp(min=0).long()]
            read.append(torch.where(q.columns >= 0, every, 0.0))
            assert torch.equal(q.of_row[:rows], there["q_of_row"][:rows])
        assert torch.equal(*read)


def test_what_a_recording_would_hold_too_much_of_is_launched(
    capture: Capture | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dspark_backend.sampling.device_padding._CUT", 2)
    recordings = Recordings(DEVICE, capture)
    launched, replayed = DeviceVerifier(), DeviceVerifier(recordings)
    rng = np.random.default_rng(7)
    for step in range(4):
        asked = [block(SamplingParams(temperature=0.9, top_k=5 + step), 2, rng)]
        logits = logits_of(asked, rng)
        expected = [answer() for answer in launched.ask(logits, asked)]
        assert [answer() for answer in replayed.ask(logits, asked)] == expected
    assert recordings.counts == RecordingCounts(misses=4)
    many = {"bias_at": np.zeros((2, 2**18), np.int64), "bias": np.zeros(2**18, np.float32)}
    assert padded({"rules": np.zeros(1, np.int32), **many}, 1) is None
    few = {name: array[..., : 2**16] for name, array in many.items()}
    assert padded({"rules": np.zeros(1, np.int32), **few}, 1) is not None
