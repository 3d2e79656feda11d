"""Slots that are guessed for guides: what is replayed decides as what is launched does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch

from dspark_backend.catalog import resolve
from dspark_backend.drafter import device_guided
from dspark_backend.drafter.checkpoint import open_drafter, write_drafter
from dspark_backend.drafter.device import DeviceDrafter
from dspark_backend.grammar.compile import GrammarCompiler
from dspark_backend.kernels.recording import Capture, Recordings, bucket
from dspark_backend.kernels.upload import upload
from dspark_backend.request import AcceptanceRule, SamplingParams
from dspark_backend.sampling.drafting import SampledDrafts
from dspark_backend.sampling.sampler import Sampler
from dspark_backend.speculation.guide import ChainGuide, Choice, Likeliest
from dspark_backend.speculation.protocol import Anchor, Proposal
from dspark_backend.speculation.trail import Trail
from dspark_backend.target.device_load import load_device_decoder

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
VOCAB = 512
GRAMMARS = (
    'start: "call " /[a-z]{2,5}/ " with " /[0-9]{2,4}/',
    "start: /[a-b]{9}/",
    r"start: /(.|\n)*/",
    'start: ("ab" | "ac") /[0-9]/',
)
REJECTING = SamplingParams(temperature=1.2, seed=4, acceptance=AcceptanceRule.REJECTION)


class Guided:
    """The sequential stage of a random drafter, and guided anchors."""

    def __init__(self, random: Any, folder: Path) -> None:
        write_drafter(folder, random.config, random.state, random.d2t)
        files = resolve(str(random.target_folder))
        target = load_device_decoder(files, torch.float32, 64, DEVICE)
        self.stage = DeviceDrafter(open_drafter(folder, files.config), target)._stage
        self.shape = (random.config.block_size, random.config.shape.hidden_size)
        compiler = GrammarCompiler(files.tokenizer(), vocab_size=VOCAB)
        self.grammars = [compiler.compile_lark(source) for source in GRAMMARS]

    def anchors(self, step: int) -> list[Anchor]:
        made = []
        for i in range(3 + step % 2):
            canonical = (step + i) % 3 > 0
            grammar = self.grammars[(2 * step + i) % 4]
            trail = Trail(grammar.matcher(canonical=canonical), canonical=canonical)
            known = (40, 3)[: (step + i) % 3]
            choice: Choice = Likeliest()
            if step % 4 == 3:
                choice = SampledDrafts(Sampler(REJECTING, (17,), VOCAB), 3, len(known))
            guide = ChainGuide(None if i == step % 5 else trail, 2 + (step + 3 * i) % 7, choice)
            made.append(Anchor(cast(Any, None), 20 + 7 * step + i, known, guide))
        return made

    def proposals(
        self, step: int, hidden: torch.Tensor, recordings: Recordings | None = None
    ) -> list[tuple[Proposal, list[Any]]]:
        anchors = self.anchors(step)
        groups = self.stage.groups(anchors)
        size = bucket if recordings else int
        there = upload(self.stage.arrays(anchors, groups, size), DEVICE)
        made = self.stage.chained(hidden, there)
        return [comparable(p) for p in self.stage.proposals(anchors, groups, made, recordings)]


def comparable(proposal: Proposal) -> tuple[Proposal, list[Any]]:
    drawn = [q and (q.ids.tolist(), q.probabilities.tolist()) for q in proposal.distributions]
    return replace(proposal, distributions=()), drawn


@pytest.fixture
def guided(make_drafter: Callable[..., Any], tmp_path: Path) -> Callable[..., Guided]:
    return lambda **variant: Guided(make_drafter(**variant), tmp_path / "drafter")


@pytest.mark.parametrize(
    "variant",
    [
        {"family": "qwen3", "head": "vanilla", "draft_vocab": 300},
        {"family": "qwen3", "head": "rnn", "rank": 5},
        {"family": "llama", "head": "none"},
    ],
    ids=["vanilla", "rnn", "none"],
)
def test_guessing_by_replays_changes_no_block(
    variant: dict[str, Any],
    guided: Callable[..., Guided],
    capture: Capture | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nor a bit of what comes back for any slot, and so no round of guesses."""
    it = guided(**variant)
    came: list[torch.Tensor] = []
    guess = device_guided.GuidedBlocks.guess

    def seen(blocks: device_guided.GuidedBlocks) -> Any:
        made = guess(blocks)
        came.extend(tensor.clone() for tensor in made)
        return made

    monkeypatch.setattr(device_guided.GuidedBlocks, "guess", seen)
    recordings = Recordings(DEVICE, capture)
    generator = torch.Generator().manual_seed(3)
    drafts = 0
    for step in range(24):
        hidden = torch.randn(3 + step % 2, *it.shape, generator=generator).to(DEVICE)
        expected = it.proposals(step, hidden)
        launched, came[:] = [*came], []
        assert it.proposals(step, hidden.clone(), recordings) == expected
        assert all(torch.equal(a, b) for a, b in zip(launched, came, strict=True))
        came.clear()
        drafts += sum(len(proposal.tokens) for proposal, _ in expected)
    assert drafts > 100
    counts = recordings.counts
    assert counts.hits > counts.misses
    # For four blocks: one to 32 slots that are asked for, with masks and without.
    assert counts.recorded <= 10


def test_many_guesses_are_launched(
    guided: Callable[..., Guided], capture: Capture | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    it = guided(family="qwen3", head="rnn")
    rng = np.random.default_rng(0)
    hidden = [
        torch.from_numpy(rng.standard_normal((3 + step % 2, *it.shape))).float().to(DEVICE)
        for step in range(8)
    ]
    expected = [it.proposals(step, own) for step, own in enumerate(hidden)]
    asked: dict[bool, set[int]] = {True: set(), False: set()}
    guessed = device_guided.guessed

    def seen(slots: Any, there: Any, first: int = 0, states: Any = None) -> Any:
        asked[states is None].add(len(there["asked"]))
        return guessed(slots, there, first, states)

    monkeypatch.setattr(device_guided, "guessed", seen)
    monkeypatch.setattr(device_guided, "_MOST", 4 * VOCAB * 4)
    recordings = Recordings(DEVICE, capture)
    given = [it.proposals(step, own, recordings) for step, own in enumerate(hidden)]
    assert given == expected
    # A block's later rounds, of fewer slots, are replayed after one that was launched.
    assert max(asked[True]) == 4
    assert min(asked[False]) > 4
    assert recordings.counts.hits > 0
