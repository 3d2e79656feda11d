"""The drafter under guides and after known tokens: against the reference in float64, and in the
engine, where nothing that it drafts changes a token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dspark_backend.catalog import resolve
from dspark_backend.drafter.checkpoint import Storage, open_drafter, write_drafter
from dspark_backend.drafter.drafter import DSparkDrafter
from dspark_backend.engine import Engine
from dspark_backend.grammar.compile import Grammar, GrammarCompiler
from dspark_backend.kernels.linear.reference import quantise_weight
from dspark_backend.kv.budget import KVBudget
from dspark_backend.kv.contiguous import SequenceKV
from dspark_backend.request import AcceptanceRule, ForcedMode, SamplingParams, StepRequest
from dspark_backend.speculation.guide import ChainGuide, Likeliest
from dspark_backend.speculation.policies import Fixed, Threshold
from dspark_backend.speculation.protocol import Anchor, Proposal
from dspark_backend.speculation.signals import Signals
from dspark_backend.speculation.trail import Trail

MakeDrafter = Callable[..., Any]

CALL = 'start: "call " /[a-z]{2,5}/ " with " /[0-9]{2,4}/ ", then " ("stop" | "go") "."'
VARIANTS: list[dict[str, Any]] = [
    {"family": "llama", "head": "none"},
    {"family": "qwen2", "head": "vanilla", "draft_vocab": 260},
    {"family": "qwen3", "head": "gated"},
    {"family": "qwen3", "head": "rnn", "draft_vocab": 300, "rank": 5},
]
IDS = [f"{v['family']}-{v['head']}" for v in VARIANTS]


class Ready:
    """A random drafter as the engine has it, and the float64 reference over the same numbers."""

    def __init__(self, random: Any, folder: Path) -> None:
        copies = {"embed_tokens.weight": random.embedding, "lm_head.weight": random.lm_head}
        write_drafter(folder, random.config, random.state, random.d2t, None, Storage.INT8, copies)
        target = resolve(str(random.target_folder))
        files = open_drafter(folder, target.config)
        self.drafter = DSparkDrafter(files, target, 512)
        q, scale = quantise_weight(random.lm_head)
        head = q.float() * scale[:, None]
        exact = replace(random, state=files.state(), lm_head=head).reference()
        exact.weights = {name: tensor.double() for name, tensor in exact.weights.items()}
        self.reference = exact
        self.features = random.features(23).bfloat16().float()
        self.context = SequenceKV(self.drafter.context_shape, KVBudget(2**28))
        self.context.reserve(len(self.features))
        self.drafter.extend(self.context, self.features)
        tokenizer = target.tokenizer()
        self.grammar: Grammar = GrammarCompiler(tokenizer, vocab_size=512).compile_lark(CALL)


@pytest.fixture(scope="module")
def ready(
    make_drafter: MakeDrafter, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Ready]:
    def make(**variant: Any) -> Ready:
        return Ready(make_drafter(**variant), tmp_path_factory.mktemp("d") / "drafter")

    return make


def agrees(it: Ready, proposal: Proposal, expected: tuple[Any, Any, Any], known: int) -> int:
    """Tokens up to a tie, which the rounding of int8 and bfloat16 may settle otherwise."""
    tokens, logits, _ = expected
    ids = it.reference.d2t or list(range(512))
    assert len(proposal.tokens) <= it.drafter.block_size - known
    for k, (mine, theirs) in enumerate(zip(proposal.tokens, tokens[known:], strict=False)):
        if mine != theirs:
            row = logits[known + k]
            assert row[ids.index(theirs)] - row[ids.index(mine)] < 0.08
            return k
    assert len(proposal.tokens) == len(tokens) - known
    return len(proposal.tokens)


@pytest.mark.parametrize("known", [(), (40,), (40, 3, 77), (5, 6, 7, 8)], ids=len)
@pytest.mark.parametrize("variant", VARIANTS, ids=IDS)
def test_known_tokens_fill_the_first_slots(
    variant: dict[str, Any], known: tuple[int, ...], ready: Callable[..., Ready]
) -> None:
    """What follows sees them: by the Markov head, and by the confidence head."""
    it = ready(**variant)
    expected = it.reference.draft(it.features.double(), 17, known)
    (proposal,) = it.drafter.propose([Anchor(it.context, 17, known)])
    same = agrees(it, proposal, expected, len(known))
    survival = np.cumprod(expected[2][len(known) :])
    assert proposal.survival[: same + 1] == pytest.approx(survival[: same + 1], abs=0.03)
    assert proposal.mask_width == proposal.forced == proposal.distributions == ()


@pytest.mark.parametrize("written", [0, 1, 3], ids="after {}".format)
@pytest.mark.parametrize("canonical", [True, False])
@pytest.mark.parametrize("variant", VARIANTS, ids=IDS)
def test_a_guided_block_is_that_of_the_reference_with_every_token_tried(
    variant: dict[str, Any], canonical: bool, written: int, ready: Callable[..., Ready]
) -> None:
    it = ready(**variant)
    matcher = it.grammar.matcher(canonical=canonical)
    rng = np.random.default_rng(written)
    for _ in range(written):
        options = [v for v in range(512) if matcher.fork().accepts_prefix([v])]
        matcher.accept([int(rng.choice(options))])

    def legal(tokens: list[int]) -> list[int]:
        here = matcher.fork()
        here.accept(tokens)
        if here.is_terminated:
            return []
        span = here.forced() if canonical else []
        return span[:1] or [v for v in range(512) if here.fork().accepts_prefix([v])]

    guide = ChainGuide(Trail(matcher.fork(), canonical=canonical), 9, Likeliest())
    (proposal,) = it.drafter.propose([Anchor(it.context, 17, (), guide)])
    expected = it.reference.draft(it.features.double(), 17, (), legal)
    same = agrees(it, proposal, expected, 0)
    ids = it.reference.d2t or list(range(512))
    survival, sure = [], 1.0
    for k in range(same):
        path = list(proposal.tokens[:k])
        allowed = legal(path)
        assert proposal.tokens[k] in allowed
        assert proposal.mask_width[k] == len(allowed)
        assert proposal.forced[k] == (canonical and bool(at(matcher, path).forced()))
        weights = expected[1][k].softmax(0)
        mass = float(sum(w for w, v in zip(weights, ids, strict=True) if v in allowed))
        c = expected[2][k]
        sure *= 1.0 if len(allowed) == 1 else c * mass / (c * mass + 1 - c)
        survival.append(sure)
    assert proposal.survival[:same] == pytest.approx(survival, abs=0.03)


def at(matcher: Any, path: Sequence[int]) -> Any:
    here = matcher.fork()
    here.accept(path)
    return here


def test_certain_tokens_do_not_lower_the_survival(ready: Callable[..., Ready]) -> None:
    it = ready(family="llama", head="vanilla")
    trail = Trail(it.grammar.matcher(), canonical=True)
    guide = ChainGuide(trail, 9, Likeliest())
    (proposal,) = it.drafter.propose([Anchor(it.context, 17, (), guide)])
    steps = zip((1.0, *proposal.survival), proposal.survival, proposal.mask_width, strict=False)
    widths = [width for before, after, width in steps if before == after]
    assert proposal.forced[0]
    assert widths
    assert set(widths) == {1}


def test_company_changes_no_bit(ready: Callable[..., Ready]) -> None:
    """Plain, known and guided anchors in one call: each as if it were alone."""
    it = ready(family="qwen3", head="rnn", draft_vocab=300, rank=5)

    def anchors() -> list[Anchor]:
        guide = ChainGuide(Trail(it.grammar.matcher(), canonical=True), 9, Likeliest())
        free = ChainGuide(
            Trail(it.grammar.matcher(canonical=False), canonical=False), 9, Likeliest()
        )
        return [
            Anchor(it.context, 17),
            Anchor(it.context, 18, (4, 5)),
            Anchor(it.context, 19, (4,), guide),
            Anchor(it.context, 20, (), free),
        ]

    together = it.drafter.propose(anchors())
    alone = [it.drafter.propose([anchor])[0] for anchor in anchors()]
    assert together == alone


def test_known_tokens_that_fill_the_block_are_refused(ready: Callable[..., Ready]) -> None:
    it = ready(family="llama")
    with pytest.raises(ValueError, match="no slot left"):
        it.drafter.propose([Anchor(it.context, 17, (1, 2, 3, 4, 5))])


SAMPLINGS = {
    "greedy": SamplingParams(),
    "coupled": SamplingParams(temperature=1.0, seed=11),
    "penalised": SamplingParams(temperature=0.7, seed=3, top_k=40, repetition_penalty=1.3),
}


@pytest.mark.parametrize("forced", list(ForcedMode))
@pytest.mark.parametrize("head", ["none", "rnn"])
def test_guided_speculation_writes_what_plain_decoding_writes(
    head: str,
    forced: ForcedMode,
    make_drafter: MakeDrafter,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    random = make_drafter("qwen3", head=head, draft_vocab=300)
    folder = tmp_path / "drafter"
    write_drafter(folder, random.config, random.state, random.d2t, storage=Storage.INT8)
    seen: list[tuple[Anchor, Proposal]] = []
    propose = DSparkDrafter.propose

    def recorded(self: DSparkDrafter, anchors: Sequence[Anchor]) -> list[Proposal]:
        proposals = propose(self, anchors)
        seen.extend(zip(anchors, proposals, strict=True))
        return proposals

    monkeypatch.setattr(DSparkDrafter, "propose", recorded)

    def texts(engine: Engine) -> list[tuple[int, ...]]:
        grammar = engine.dialect.compiler.compile_lark(CALL)
        steps = [
            StepRequest(tuple(range(5 + i, 40 + i)), 30, sampling, grammar, forced)
            for sampling in SAMPLINGS.values()
            for i in range(3)
        ]
        sessions = [engine.open_session() for _ in steps]
        handles = [engine.submit(s, step) for s, step in zip(sessions, steps, strict=True)]
        outcomes = [handle.result(60) for handle in handles]
        for session in sessions:
            session.close()
        return [outcome.token_ids for outcome in outcomes]

    with Engine.load(random.target_folder, threads=1, speculation=False) as plain:
        expected = texts(plain)
    assert not seen
    for policy in (Fixed(5), Fixed(2), Threshold(5, 0.3)):
        options = {"drafter": folder, "policy": policy, "signals": Signals.drafts_alone()}
        with Engine.load(random.target_folder, threads=1, **options) as fast:
            seen.clear()  # loading measures what drafting costs
            assert texts(fast) == expected
    assert all(anchor.guide is not None for anchor, _ in seen)
    assert any(proposal.tokens for _, proposal in seen)
    assert any(anchor.known for anchor, _ in seen) == (forced is ForcedMode.CANONICAL)


def test_rejection_with_the_real_chain_keeps_to_the_grammar(
    make_drafter: MakeDrafter, tmp_path: Path
) -> None:
    random = make_drafter("qwen3", head="rnn", draft_vocab=300)
    folder = tmp_path / "drafter"
    write_drafter(folder, random.config, random.state, random.d2t, storage=Storage.INT8)
    rejection = SamplingParams(temperature=1.0, acceptance=AcceptanceRule.REJECTION)
    options = {"drafter": folder, "policy": Fixed(5), "signals": Signals.drafts_alone()}
    with Engine.load(random.target_folder, threads=1, **options) as engine:
        grammar = engine.dialect.compiler.compile_lark(CALL)
        for seed in range(12):
            sampling = replace(rejection, seed=seed)
            step = StepRequest(
                tuple(range(5, 40)), 40, sampling, grammar, list(ForcedMode)[seed % 3]
            )
            with engine.open_session() as session:
                outcome = engine.step(session, step)
            matcher = grammar.matcher(canonical=False)
            matcher.accept(outcome.token_ids)
            assert matcher.is_accepting
            assert outcome.metrics.proposed["dspark"] > 0
