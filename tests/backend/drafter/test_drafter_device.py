"""The device's drafter, in float32, drafts what the reference drafts: under Triton's interpreter
where there is no GPU."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dspark_backend.catalog import ModelFiles, resolve
from dspark_backend.drafter.calibration import Calibration
from dspark_backend.drafter.chain import Chain
from dspark_backend.drafter.checkpoint import open_drafter, write_drafter
from dspark_backend.drafter.device import DeviceDrafter
from dspark_backend.errors import ModelFormatError
from dspark_backend.grammar.compile import GrammarCompiler
from dspark_backend.kv.paged import PagedContext, PagedKV
from dspark_backend.request import AcceptanceRule, SamplingParams
from dspark_backend.sampling.drafting import SampledDrafts
from dspark_backend.sampling.sampler import Sampler
from dspark_backend.speculation.guide import ChainGuide, Likeliest
from dspark_backend.speculation.protocol import Anchor, Proposal
from dspark_backend.speculation.trail import Trail
from dspark_backend.target.device_load import load_device_decoder

MakeDrafter = Callable[..., Any]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CALL = 'start: "call " /[a-z]{2,5}/ " with " /[0-9]{2,4}/ ", then " ("stop" | "go") "."'
VARIANTS: list[dict[str, Any]] = [
    {"family": "llama", "head": "none"},
    {"family": "llama", "head": "vanilla", "draft_vocab": 77},
    {"family": "qwen3", "head": "vanilla", "block_size": 7, "confidence": False},
    {"family": "qwen2", "head": "gated"},
    {"family": "qwen3", "head": "rnn", "draft_vocab": 300, "rank": 5},
]
IDS = [f"{v['family']}-{v['head']}-{i}" for i, v in enumerate(VARIANTS)]
TEMPERATURES = (1.0, 1.3, 0.8, 2.0, 0.5, 1.0, 1.0)
OFFSETS = (0.0, -0.7, 0.4, 0.0, 1.1, -0.2, 0.3)


class Ready:
    """A random drafter as the engine has it, and the reference over the very same numbers."""

    def __init__(self, random: Any, folder: Path, dtype: torch.dtype) -> None:
        copies = {"embed_tokens.weight": random.embedding, "lm_head.weight": random.lm_head}
        size = random.config.block_size
        calibration = Calibration(
            temperatures=TEMPERATURES[:size], offsets=OFFSETS[:size], data_set="d", samples=1
        )
        state = random.state
        write_drafter(folder, random.config, state, random.d2t, calibration, target_copies=copies)
        self.files: ModelFiles = resolve(str(random.target_folder))
        self.target = load_device_decoder(self.files, dtype, 512, DEVICE)
        self.drafter = DeviceDrafter(open_drafter(folder, self.files.config), self.target)
        self.random, self.reference = random, random.reference()
        position = self.target.kv_shape.bytes_per_token
        position += self.drafter.context_shape.bytes_per_token
        self.storage = self.target.storage(self.drafter.context_shape, 1024 * position)

    def features(self, length: int, seed: int = 0) -> torch.Tensor:
        features: torch.Tensor = self.random.features(length, seed)
        return features

    def context(self, features: torch.Tensor, pieces: int = 1) -> PagedContext:
        kv: PagedKV = self.storage.new()
        kv.reserve(len(features) + self.drafter.block_size)
        assert kv.draft is not None
        for piece in features.tensor_split(pieces):
            kv.length += len(piece)
            self.drafter.extend(kv.draft, piece.to(DEVICE))
        return kv.draft


@pytest.fixture
def ready(make_drafter: MakeDrafter, tmp_path: Path) -> Callable[..., Ready]:
    def make(dtype: torch.dtype = torch.float32, **variant: Any) -> Ready:
        return Ready(make_drafter(**variant), tmp_path / "drafter", dtype)

    return make


def assert_agrees(
    it: Ready, proposal: Proposal, features: torch.Tensor, known: tuple[int, ...] = ()
) -> None:
    tokens, _, sure = it.reference.draft(features, 17, known)
    assert list(proposal.tokens) == tokens[len(known) :]
    survival = 1.0
    for k, mine in enumerate(proposal.survival, start=len(known)):
        if it.random.config.confidence:
            logit = math.log(sure[k] / (1 - sure[k])) / TEMPERATURES[k] + OFFSETS[k]
            survival *= 1 / (1 + math.exp(-logit))
        assert mine == pytest.approx(survival, abs=1e-3)


@pytest.mark.parametrize("variant", VARIANTS, ids=IDS)
@pytest.mark.parametrize("length", [0, 1, 70])  # the last block goes on in the next page
def test_drafts_and_survivals_are_those_of_the_reference(
    variant: dict[str, Any], length: int, ready: Callable[..., Ready]
) -> None:
    it = ready(**variant)
    features = it.features(length)
    (proposal,) = it.drafter.propose([Anchor(it.context(features), 17)])
    assert_agrees(it, proposal, features)


@pytest.mark.parametrize("known", [(40,), (40, 3, 77)], ids=len)
@pytest.mark.parametrize("variant", VARIANTS, ids=IDS)
def test_known_tokens_fill_the_first_slots(
    variant: dict[str, Any], known: tuple[int, ...], ready: Callable[..., Ready]
) -> None:
    it = ready(**variant)
    features = it.features(23)
    (proposal,) = it.drafter.propose([Anchor(it.context(features), 17, known)])
    assert_agrees(it, proposal, features, known)


@pytest.mark.parametrize("variant", VARIANTS, ids=IDS)
def test_a_guided_block_is_that_of_the_reference_with_every_token_tried(
    variant: dict[str, Any], ready: Callable[..., Ready]
) -> None:
    it = ready(**variant)
    matcher = GrammarCompiler(it.files.tokenizer(), vocab_size=512).compile_lark(CALL).matcher()

    def legal(tokens: list[int]) -> list[int]:
        here = matcher.fork()
        here.accept(tokens)
        span = [] if here.is_terminated else here.forced()
        return span[:1] or [v for v in range(512) if here.fork().accepts_prefix([v])]

    features = it.features(23)
    guide = ChainGuide(Trail(matcher.fork(), canonical=True), 9, Likeliest())
    (proposal,) = it.drafter.propose([Anchor(it.context(features), 17, (), guide)])
    tokens, _, _ = it.reference.draft(features, 17, (), legal)
    assert list(proposal.tokens) == tokens
    assert len(proposal.forced) == len(tokens) > 0


def slot_by_slot(it: Ready, anchors: list[Anchor]) -> list[Proposal]:
    """Guided blocks with every slot's logits copied before its guide is asked."""
    stage = it.drafter._stage
    rows = it.drafter._lay_out(anchors).on(DEVICE)
    hidden = it.drafter._parallel(rows, rows.extra["ids"])
    count, size, _ = hidden.shape
    base = stage._weights.head(hidden.flatten(0, 1)).view(count, size, -1)
    chains = [Chain(anchor) for anchor in anchors]
    tokens = np.array([anchor.token for anchor in anchors])
    drafts, sure, state = np.empty((count, size), np.int64), np.ones((count, size)), None
    for k in range(size):
        before = torch.from_numpy(tokens).to(DEVICE)
        row, previous, state = stage._slots.after(hidden[:, k], base[:, k], before, state)
        confidence = stage._slots.confidence(hidden[:, k], previous, k).tolist()
        tokens = np.empty_like(tokens)
        for i, chain in enumerate(chains):
            logits = row[i].cpu().numpy()
            likeliest = int(stage._vocabulary.ids[logits.argmax()])
            tokens[i], sure[i, k] = chain.take(
                k, logits, likeliest, confidence[i], stage._vocabulary
            )
        drafts[:, k] = tokens
    survival = np.cumprod(sure, axis=1)
    return [chain.proposal(drafts[i], survival[i]) for i, chain in enumerate(chains)]


def comparable(proposal: Proposal) -> tuple[Proposal, list[Any]]:
    drawn = [q and (q.ids.tolist(), q.probabilities.tolist()) for q in proposal.distributions]
    return replace(proposal, distributions=()), drawn


class Waits:
    """Counts copies from the device."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        copy = torch.Tensor.cpu

        def counted(tensor: torch.Tensor) -> torch.Tensor:
            self.count += 1
            return copy(tensor)

        monkeypatch.setattr(torch.Tensor, "cpu", counted)

    def of(self, run: Callable[[], Any]) -> int:
        before = self.count
        run()
        return self.count - before


GRAMMARS = {
    "call": CALL,
    "words": "start: /[a-z ]{1,40}/",
    "anything": r"start: /(.|\n)*/",
    "forced": 'start: "a long text that nobody chose" /[a-z]/',
    "short": 'start: ("ab" | "ac") /[0-9]/',
}


@pytest.mark.parametrize("variant", VARIANTS, ids=IDS)
def test_guessing_ahead_changes_no_guided_block(
    variant: dict[str, Any], ready: Callable[..., Ready], monkeypatch: pytest.MonkeyPatch
) -> None:
    it = ready(**variant)
    contexts = [it.context(it.features(length, seed=length)) for length in (3, 11)]
    compiler = GrammarCompiler(it.files.tokenizer(), vocab_size=512)
    rejecting = SamplingParams(temperature=1.2, seed=4, acceptance=AcceptanceRule.REJECTION)

    def anchors(written: int, *, sampled: bool) -> list[Anchor]:
        made = []
        for place, (source, canonical) in enumerate(product(GRAMMARS.values(), (True, False))):
            matcher = compiler.compile_lark(source).matcher(canonical=canonical)
            rng = np.random.default_rng(place)
            for _ in range(written):
                options = [v for v in range(512) if matcher.fork().accepts_prefix([v])]
                if options:
                    matcher.accept([int(rng.choice(options))])
            known = (40, 3)[: place % 3]
            choice = (
                SampledDrafts(Sampler(rejecting, (17,), 512), 3, len(known))
                if sampled
                else Likeliest()
            )
            guide = ChainGuide(Trail(matcher, canonical=canonical), 2 + 3 * (place % 3), choice)
            made.append(Anchor(contexts[place % 2], 20 + place, known, guide))
        return made

    waits = Waits(monkeypatch)
    size = it.drafter.block_size
    for written, sampled in ((0, False), (1, False), (2, True)):
        expected = slot_by_slot(it, anchors(written, sampled=sampled))
        made: list[Proposal] = []
        count = waits.of(
            lambda w=written, s=sampled, m=made: m.extend(it.drafter.propose(anchors(w, sampled=s)))
        )
        assert list(map(comparable, made)) == list(map(comparable, expected))
        # A wait for each slot, as before, is the worst of it.
        assert count <= size
        assert any(proposal.tokens for proposal in made)


def test_a_guide_that_takes_what_was_guessed_costs_no_wait_of_its_own(
    ready: Callable[..., Ready], monkeypatch: pytest.MonkeyPatch
) -> None:
    it = ready(family="qwen3", head="rnn", block_size=7)
    context = it.context(it.features(9))
    compiler = GrammarCompiler(it.files.tokenizer(), vocab_size=512)

    def guide(source: str | None, room: int = 9, *, canonical: bool = True) -> ChainGuide:
        if source is None:
            return ChainGuide(None, room, Likeliest())
        matcher = compiler.compile_lark(source).matcher(canonical=canonical)
        return ChainGuide(Trail(matcher, canonical=canonical), room, Likeliest())

    waits = Waits(monkeypatch)

    def of(*anchors: Anchor) -> int:
        return waits.of(lambda: it.drafter.propose(anchors))

    # Each of these waited seven times, once for every slot.
    assert of(Anchor(context, 5, (), guide(None))) == 1
    assert of(Anchor(context, 5, (), guide(GRAMMARS["forced"]))) == 0
    assert of(Anchor(context, 5, (), guide(GRAMMARS["words"], room=1))) == 1
    # And this one eight times, with the copy of the blocks that nobody guides.
    assert (
        of(Anchor(context, 5), Anchor(context, 6, (), guide(None)), Anchor(context, 7, (3,))) == 1
    )
    # A surprise in a slot costs the wait for the slots after it.
    trail = guide('start: /[a-z]/ "-then nothing but what is forced here"')
    assert of(Anchor(context, 5, (), trail)) == 1
    narrow = guide("start: /[a-b]{9}/", canonical=False)
    assert 1 < of(Anchor(context, 5, (), narrow)) <= 7


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_appending_in_pieces_and_drafting_in_company_change_no_bit(
    dtype: torch.dtype, ready: Callable[..., Ready]
) -> None:
    it = ready(dtype, family="qwen2", head="vanilla")
    contexts = [it.context(it.features(length, seed=length)) for length in (1, 20, 47)]
    guided = ChainGuide(None, 3, Likeliest())
    anchors = [Anchor(context, 30 + i) for i, context in enumerate(contexts)]
    anchors[1] = Anchor(contexts[1], 31, (7, 8))
    together = it.drafter.propose(anchors)
    assert together == [it.drafter.propose([anchor])[0] for anchor in anchors]
    first = Anchor(contexts[0], 30, (), guided)
    assert it.drafter.propose([first, *anchors[1:]])[1:] == together[1:]
    pieces = it.context(it.features(47, seed=47), pieces=9)
    assert pieces.length == 47
    for mine, theirs in zip(pieces.owner.pages, contexts[2].owner.pages, strict=True):
        for pages in (pieces.owner.pool.keys[4:], pieces.owner.pool.values[4:]):
            assert torch.equal(pages[:, mine, :, :47], pages[:, theirs, :, :47])


def test_drafting_writes_behind_the_context_and_nowhere_else(ready: Callable[..., Ready]) -> None:
    it = ready(family="llama", head="vanilla")
    context, other = it.context(it.features(12)), it.context(it.features(9, seed=1))
    pool = context.owner.pool
    pool.keys[:, 5:] = pool.values[:, 5:] = 7.0
    pool.keys[:4] = pool.values[:4] = 3.0  # the target's own
    before = pool.keys.clone(), pool.values.clone()
    first = it.drafter.propose([Anchor(context, 3)])
    assert context.length == 12
    (page,) = context.owner.pages
    for now, then in zip((pool.keys, pool.values), before, strict=True):
        changed = (now != then).any(dim=(2, 4))
        changed[4:, page, 12 : 12 + it.drafter.block_size] = False
        assert not changed.any()
    assert it.drafter.propose([Anchor(context, 3)]) == first
    assert other.length == 9


def test_the_targets_own_embedding_and_head_serve_where_there_are_no_copies(
    make_drafter: MakeDrafter, tmp_path: Path
) -> None:
    random = make_drafter("qwen3", draft_vocab=77)
    folders = tmp_path / "bare", tmp_path / "copied"
    files = resolve(str(random.target_folder))
    head = files.tensors().get("lm_head.weight")[random.d2t]
    copies = {
        "embed_tokens.weight": files.tensors().get("model.embed_tokens.weight"),
        "lm_head.weight": head,
    }
    write_drafter(folders[0], random.config, random.state, random.d2t)
    write_drafter(folders[1], random.config, random.state, random.d2t, target_copies=copies)
    target = load_device_decoder(files, torch.float32, 512, DEVICE)
    made = []
    for folder in folders:
        drafter = DeviceDrafter.load(folder, target)
        kv = target.storage(drafter.context_shape, 2**20).new()
        kv.reserve(20)
        kv.length = 9
        drafter.extend(kv.draft, random.features(9).to(DEVICE))
        made.append(drafter.propose([Anchor(kv.draft, 5)]))
    assert made[0] == made[1]


def test_what_does_not_fit_is_refused(
    make_drafter: MakeDrafter, ready: Callable[..., Ready], tmp_path: Path
) -> None:
    it = ready(family="llama")
    with pytest.raises(ValueError, match="no slot left"):
        it.drafter.propose([Anchor(it.context(it.features(3)), 5, tuple(range(5)))])
    narrow = make_drafter("llama", num_key_value_heads=1)
    write_drafter(tmp_path / "narrow", narrow.config, narrow.state, None)
    with pytest.raises(ModelFormatError, match="do not fit into the pages"):
        DeviceDrafter.load(tmp_path / "narrow", it.target)


def test_a_slot_without_a_maximum_ends_the_block(ready: Callable[..., Ready]) -> None:
    it = ready(family="llama", head="vanilla")
    features = it.features(6)
    (whole,) = it.drafter.propose([Anchor(it.context(features), 17)])
    # W1 of the second draft: the third slot reads it.
    sequential = it.drafter._weights.sequential
    assert sequential is not None
    sequential.w1[whole.tokens[1]] = torch.nan
    (cut,) = it.drafter.propose([Anchor(it.context(features), 17)])
    ends = list(whole.tokens).index(whole.tokens[1]) + 1
    assert cut.tokens == whole.tokens[:ends]
    assert len(cut.survival) == ends
    assert np.isfinite(cut.survival).all()
