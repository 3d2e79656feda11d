"""Drafts and verdicts that are replayed are those that are launched: whatever changes between two
calls of a recording is read from its own tensors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dspark_backend.catalog import resolve
from dspark_backend.drafter.checkpoint import open_drafter, write_drafter
from dspark_backend.drafter.device import DeviceDrafter
from dspark_backend.engine import Engine
from dspark_backend.errors import RequestError
from dspark_backend.grammar.compile import GrammarCompiler
from dspark_backend.kernels.recording import Capture, RecordingCounts, Recordings
from dspark_backend.parts import device_parts
from dspark_backend.request import AcceptanceRule, SamplingParams, StepRequest
from dspark_backend.sampling.device import DeviceVerifier
from dspark_backend.sampling.sampler import Sampler
from dspark_backend.sampling.verifier import Question
from dspark_backend.scheduler import Limits
from dspark_backend.speculation.distribution import Distribution
from dspark_backend.speculation.guide import ChainGuide, Likeliest
from dspark_backend.speculation.policies import Fixed
from dspark_backend.speculation.protocol import Anchor
from dspark_backend.speculation.signals import Signals
from dspark_backend.speculation.trail import Trail
from dspark_backend.target.device_load import load_device_decoder

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
VOCAB = 512


@pytest.mark.parametrize("head", ["vanilla", pytest.param("rnn", marks=pytest.mark.slow)])
def test_drafts_and_contexts_are_those_that_are_launched(
    head: str, make_drafter: Callable[..., Any], tmp_path: Path, capture: Capture | None
) -> None:
    random = make_drafter("qwen3", head=head, draft_vocab=300)
    write_drafter(tmp_path / "drafter", random.config, random.state, random.d2t)
    files = resolve(str(random.target_folder))
    target = load_device_decoder(files, torch.float32, 512, DEVICE)
    opened = open_drafter(tmp_path / "drafter", files.config)
    recordings = Recordings(DEVICE, capture)
    launched, replayed = DeviceDrafter(opened, target), DeviceDrafter(opened, target, recordings)
    storage = target.storage(launched.context_shape, 2**21)
    compiler = GrammarCompiler(files.tokenizer(), vocab_size=VOCAB)
    grammar = compiler.compile_lark('start: "call " /[a-z]{2,5}/ " with " /[0-9]{2,4}/')
    kvs = [[storage.new() for _ in range(4)] for _ in range(2)]
    rng = np.random.default_rng(0)

    def anchors(own: list[Any], step: int) -> list[Anchor]:
        made = [
            Anchor(kv.draft, 7 * step + i, (3, 9 + step)[: (i + step) % 3])
            for i, kv in enumerate(own)
        ]
        if step % 3 == 2:
            guide = ChainGuide(Trail(grammar.matcher(), canonical=True), 9, Likeliest())
            made[1] = Anchor(own[1].draft, 5 + step, (), guide)
        return made[: 3 + step % 2]

    for step in range(10):
        for i in range(4):
            count = int(rng.integers(1, 8)) if step else 60
            features = random.features(count, seed=4 * step + i).to(DEVICE)
            for drafter, own in ((launched, kvs[0]), (replayed, kvs[1])):
                own[i].reserve(own[i].length + count + launched.block_size)
                own[i].length += count
                drafter.extend(own[i].draft, features.clone())
        expected = launched.propose(anchors(kvs[0], step))
        assert replayed.propose(anchors(kvs[1], step)) == expected
    pool = storage.pool
    for ours, theirs in zip(*kvs, strict=True):
        assert ours.draft.length == theirs.draft.length
        for at in range(ours.length):
            mine, other = ours.pages[at // 64], theirs.pages[at // 64]
            for stored in (pool.keys, pool.values):
                assert torch.equal(stored[4:, mine, :, at % 64], stored[4:, other, :, at % 64])
    assert recordings.counts.hits > recordings.counts.misses
    assert 4 <= recordings.counts.recorded <= 16


def questions(rng: np.random.Generator, count: int, *, plain: bool) -> list[Question]:
    made = []
    for number in range(count):
        draws = int(rng.integers(0, 4))
        drafts = tuple(rng.integers(0, VOCAB, draws).tolist())
        sampling = [
            SamplingParams(),
            SamplingParams(temperature=0.9, seed=number),
            SamplingParams(temperature=1.4, seed=3, acceptance=AcceptanceRule.REJECTION),
        ][int(rng.integers(0, 3))]
        if not plain:
            sampling = SamplingParams(temperature=1.0, top_k=9, repetition_penalty=1.2)
        masks = None
        if rng.random() < 0.5:
            words = rng.integers(-(2**31), 2**31, (draws + 1, VOCAB // 32), dtype=np.int32)
            masks = tuple(torch.from_numpy(row) for row in words)
        distributions: tuple[Distribution | None, ...] = ()
        if not plain and drafts:
            certain = Distribution(np.array(drafts[:1], np.uint32), np.ones(1))
            distributions = (certain,) + (None,) * (draws - 1)
        sampler = Sampler(sampling, [1, 2, 3 + number], VOCAB)
        made.append(Question(sampler, drafts, masks, distributions))
    return made


def test_verdicts_are_those_that_are_launched(capture: Capture | None) -> None:
    recordings = Recordings(DEVICE, capture)
    launched, replayed = DeviceVerifier(), DeviceVerifier(recordings)
    rng = np.random.default_rng(1)
    for step in range(40):
        asked = questions(rng, 1 + step % 4, plain=step % 10 != 9)
        rows = sum(question.rows for question in asked)
        logits = torch.from_numpy(3 * rng.standard_normal((rows, VOCAB)).astype(np.float32))
        drafts = [t for question in asked for t in (*question.drafts, 0)]
        wanted = rng.random(rows) < 0.7  # so that some drafts stand
        logits[torch.from_numpy(wanted), torch.tensor(drafts)[torch.from_numpy(wanted)]] += 9.0
        logits = logits.to(DEVICE)
        expected = [answer() for answer in launched.ask(logits, asked)]
        given = replayed.ask(logits, asked)
        logits.fill_(torch.nan)
        assert [answer() for answer in given] == expected
    counts = recordings.counts
    assert counts.hits > 10
    assert counts.recorded < counts.hits
    assert counts.misses == 40 - counts.hits


def test_an_engine_that_replays_writes_what_one_that_launches_does(
    make_drafter: Callable[..., Any], tmp_path: Path, capture: Capture | None
) -> None:
    """Of a drafter from disk, with grammars and every rule, in any company."""
    random = make_drafter("qwen3", draft_vocab=300)
    write_drafter(tmp_path / "drafter", random.config, random.state, random.d2t)
    files = resolve(str(random.target_folder))
    samplings = [
        SamplingParams(),
        SamplingParams(temperature=1.0, seed=11),
        SamplingParams(temperature=0.7, seed=3, top_k=40, repetition_penalty=1.3),
    ]

    def texts(recordings: Recordings | None) -> list[tuple[int, ...]]:
        folder = tmp_path / "drafter"
        parts = device_parts(files, "fp32", 256, folder, DEVICE, recordings)
        options = {"signals": Signals.drafts_alone()}
        with Engine(files, parts, 1, 2**22, Limits(), Fixed(3), **options) as engine:
            source = 'start: "call " /[a-z]{2,3}/ " with " /[0-9]{2,3}/'
            grammar = engine.dialect.compiler.compile_lark(source)
            steps = [
                StepRequest(tuple(range(9 + 7 * i, 20 + 8 * i)), 6, sampling, ignore_eos=True)
                for i, sampling in enumerate(samplings)
            ]
            steps.append(StepRequest(tuple(range(40, 50)), 9, SamplingParams(), grammar))
            sessions = [engine.open_session() for _ in steps]
            handles = [engine.submit(s, step) for s, step in zip(sessions, steps, strict=True)]
            return [handle.result(600).token_ids for handle in handles]

    recordings = Recordings(DEVICE, capture)
    assert texts(recordings) == texts(None)
    assert recordings.counts.hits > 0
    assert recordings.counts.recorded > 0


def test_what_waits_for_the_device_cannot_be_recorded(capture: Capture | None) -> None:
    """Else the tests above would not notice."""
    recordings = Recordings(DEVICE, capture)
    for wait in (lambda x: x[x > 0], lambda x: x * float(x[0]), lambda x: x.nonzero()):
        failing = Recordings(DEVICE, capture)
        for _ in range(4):
            failing.run("x", lambda there, w=wait: (w(there["a"]),), {"a": np.ones(3)})
        assert failing.counts == RecordingCounts(misses=4, failed=1)
    for _ in range(4):
        recordings.run("x", lambda there: (there["a"] * 2,), {"a": np.ones(3)})
    assert recordings.counts == RecordingCounts(hits=2, misses=2, recorded=1)


def test_one_engine_keeps_a_bounded_number_of_recordings(capture: Capture | None) -> None:
    recordings = Recordings(DEVICE, capture, most=2)
    verifier = DeviceVerifier(recordings)
    for count in (1, 2, 3, 1):
        for _ in range(3):
            asked = [Question(Sampler(SamplingParams(), [1], VOCAB))] * count
            verifier.ask(torch.ones(count, VOCAB, device=DEVICE), asked)
    assert len(recordings._kept) == 2
    assert recordings.counts == RecordingCounts(hits=4, misses=8, recorded=4)


def test_graphs_on_the_cpu_are_refused(tiny_checkpoint: Callable[..., Path]) -> None:
    with pytest.raises(RequestError, match="graphs are a GPU's: load with device='cuda'"):
        Engine.load(tiny_checkpoint("qwen3"), graphs=True)
