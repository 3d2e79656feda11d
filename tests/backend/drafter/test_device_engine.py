"""The engine on a device, in float32, writes what the CPU's engine and transformers write, with
speculation and without: under Triton's interpreter where there is no GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from dspark_backend.catalog import ModelFiles, resolve
from dspark_backend.drafter.checkpoint import write_drafter
from dspark_backend.engine import Engine
from dspark_backend.errors import DeviceError, RequestError
from dspark_backend.grammar.compile import Grammar
from dspark_backend.kv.budget import KVShape
from dspark_backend.kv.paged import PagedContext, paged_context
from dspark_backend.parts import Parts, device_parts
from dspark_backend.request import AcceptanceRule, ForcedMode, SamplingParams, StepRequest
from dspark_backend.scheduler import Limits
from dspark_backend.speculation.candidate import BudgetPolicy
from dspark_backend.speculation.policies import Fixed
from dspark_backend.speculation.protocol import Anchor, Proposal
from dspark_backend.speculation.signals import Signals
from dspark_backend.target.batch import Batch, Rows
from dspark_backend.target.device import DeviceDecoder

MakeDrafter = Callable[..., Any]
TinyCheckpoint = Callable[..., Path]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BLOCK = 4
PROMPTS = [tuple(range(10 + 7 * i, 22 + 9 * i)) for i in range(4)]
SAMPLINGS = {
    "greedy": SamplingParams(),
    "coupled": SamplingParams(temperature=1.0, seed=11),
    "processed": SamplingParams(
        temperature=0.7, seed=3, top_k=40, top_p=0.95, repetition_penalty=1.3, logit_bias={5: 1.0}
    ),
}


def device_engine(
    files: ModelFiles,
    drafter: Any = None,
    policy: BudgetPolicy | None = None,
    kv_bytes: int = 2**23,
    **options: Any,
) -> Engine:
    """``drafter`` is a checkpoint's folder, or a drafter that makes itself of the target."""
    folder = drafter if isinstance(drafter, Path) else None
    parts = device_parts(files, "fp32", 512, folder, DEVICE)
    if drafter is not None and folder is None:
        parts = Parts(parts.target, parts.verifier, drafter(parts.target), parts.precision)
    return Engine(files, parts, 1, kv_bytes, Limits(), policy, **options)


def texts(engine: Engine, steps: Sequence[StepRequest]) -> list[tuple[int, ...]]:
    """All steps at once."""
    sessions = [engine.open_session() for _ in steps]
    handles = [engine.submit(s, step) for s, step in zip(sessions, steps, strict=True)]
    written = [handle.result(300).token_ids for handle in handles]
    for session in sessions:
        session.close()
    return written


def request(index: int = 0, count: int = 14, **fields: Any) -> StepRequest:
    return StepRequest(PROMPTS[index], count, ignore_eos=True, **fields)


@pytest.fixture(scope="module")
def files(tiny_checkpoint: TinyCheckpoint) -> ModelFiles:
    return resolve(str(tiny_checkpoint("qwen3")))


@pytest.fixture(scope="module")
def cpu(files: ModelFiles) -> Iterator[Engine]:
    with Engine.load(files.folder, precision="fp32", threads=1, speculation=False) as engine:
        yield engine


@pytest.fixture(scope="module")
def plain(files: ModelFiles) -> Iterator[Engine]:
    with device_engine(files) as engine:
        yield engine


def test_greedy_text_is_that_of_transformers(files: ModelFiles, plain: Engine) -> None:
    oracle = AutoModelForCausalLM.from_pretrained(files.folder, dtype=torch.float32).eval()
    for index, ours in enumerate(texts(plain, [request(i) for i in range(3)])):
        prompt = torch.tensor([PROMPTS[index]])
        with torch.no_grad():
            whole = oracle.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=14,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
        assert ours == tuple(whole[0, prompt.shape[1] :].tolist())


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
def test_plain_text_is_that_of_the_cpu(
    cpu: Engine, plain: Engine, sampling: SamplingParams
) -> None:
    steps = [request(i, sampling=sampling) for i in range(2)]
    assert texts(plain, steps) == texts(cpu, steps)


def test_plain_text_by_rejection_is_that_of_the_cpu(cpu: Engine, plain: Engine) -> None:
    sampling = SamplingParams(temperature=0.9, seed=2, acceptance=AcceptanceRule.REJECTION)
    assert texts(plain, [request(sampling=sampling)]) == texts(cpu, [request(sampling=sampling)])


def test_a_step_writes_the_same_whoever_shares_the_batch(plain: Engine) -> None:
    steps = [request(i, 6 + 3 * i, sampling=s) for i, s in enumerate(SAMPLINGS.values())]
    assert texts(plain, steps) == [texts(plain, [step])[0] for step in steps]


def grammar(engine: Engine) -> Grammar:
    source = 'start: "call " /[a-z]{2,3}/ " with " /[0-9]{2,3}/ ", stop."'
    return engine.dialect.compiler.compile_lark(source)


class OracleDrafter:
    """Drafts the true continuation of texts it was told, wrong from a chosen place on.

    Its context keeps the first feature of every position in the pages, so a context that was not
    written, or written from other tokens, matches no text: that is an error here.
    """

    taps = (0,)
    block_size = BLOCK

    def __init__(self, target: DeviceDecoder) -> None:
        self._target = target
        shape = target.kv_shape
        self.context_shape = KVShape(1, shape.kv_heads, shape.head_dim, shape.itemsize)
        self._texts: list[tuple[list[int], torch.Tensor]] = []
        self.right: Callable[[int], int] = lambda position: BLOCK
        self.problems: list[str] = []
        self.blocks = 0

    def learn(self, text: Sequence[int]) -> None:
        room = (len(text) + 64) * self._target.kv_shape.bytes_per_token
        kv = self._target.storage(None, room).new()
        kv.reserve(len(text))
        features = self._target.forward(Batch([Rows(kv, list(text), 0)]), self.taps).features
        self._texts.append((list(text), features[:, 0].clone()))

    def _kept(self, context: PagedContext, positions: range) -> tuple[torch.Tensor, ...]:
        pages = torch.tensor(context.owner.pages)
        at = torch.tensor(positions, dtype=torch.long)
        layer = context.owner.pool.keys[self._target.config.num_layers]
        return layer, pages[at // 64], at % 64

    def extend(self, context: Any, features: torch.Tensor) -> None:
        mine = paged_context(context)
        end = mine.length + len(features)
        mine.reserve(end)
        layer, pages, slots = self._kept(mine, range(mine.length, end))
        layer[pages, 0, slots, 0] = features[:, 0]
        mine.length = end

    def propose(self, anchors: Sequence[Anchor]) -> list[Proposal]:
        self.blocks += len(anchors)
        return [self._propose(anchor) for anchor in anchors]

    def _propose(self, anchor: Anchor) -> Proposal:
        context = paged_context(anchor.context)
        at = context.length
        layer, pages, slots = self._kept(context, range(at))
        seen = layer[pages, 0, slots, 0]
        for text, features in self._texts:
            block = text[at + 1 : at + 1 + BLOCK]
            known = len(anchor.known)
            if torch.equal(seen, features[:at]) and text[at] == anchor.token:
                if block[:known] != list(anchor.known):
                    continue
                right = max(self.right(at), known)
                drafts = block[known:right] + [(token + 1) % 384 for token in block[right:]]
                return Proposal(tuple(drafts), (1.0,) * len(drafts), "oracle")
        self.problems.append(f"no text has this context of {at} positions")
        return Proposal((), (), "oracle")


class Fast:
    """A device engine with an oracle that knows what plain decoding writes."""

    def __init__(self, files: ModelFiles, plain: Engine) -> None:
        made: list[OracleDrafter] = []

        def make(target: DeviceDecoder) -> OracleDrafter:
            made.append(OracleDrafter(target))
            return made[0]

        self.engine = device_engine(files, make, Fixed(BLOCK))
        (self.oracle,) = made
        self._plain = plain

    def expect(self, *steps: StepRequest) -> list[tuple[int, ...]]:
        written = texts(self._plain, steps)
        for step, text in zip(steps, written, strict=True):
            with torch.inference_mode():
                self.oracle.learn([*step.tokens, *text])
        return written


@pytest.fixture
def fast(files: ModelFiles, plain: Engine) -> Iterator[Fast]:
    it = Fast(files, plain)
    with it.engine:
        yield it
    assert it.oracle.problems == []
    assert it.engine.kv_used_bytes == 0


@pytest.mark.parametrize("accepted", [0, 2, BLOCK])
@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
def test_every_acceptance_length_writes_the_plain_text(
    fast: Fast, sampling: SamplingParams, accepted: int
) -> None:
    step = request(sampling=sampling)
    expected = fast.expect(step)
    fast.oracle.right = lambda position: accepted
    with fast.engine.open_session() as session:
        outcome = fast.engine.step(session, step)
    assert [outcome.token_ids] == expected
    assert outcome.metrics.cycles == pytest.approx(1 + 13 / (accepted + 1), abs=1.01)


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
def test_sessions_with_different_lengths_share_their_passes(
    fast: Fast, sampling: SamplingParams
) -> None:
    steps = [request(i, 8 + 2 * i, sampling=sampling) for i in range(4)]
    expected = fast.expect(*steps)
    fast.oracle.right = lambda position: position % (BLOCK + 1)
    assert texts(fast.engine, steps) == expected


@pytest.mark.parametrize("forced", list(ForcedMode))
@pytest.mark.parametrize("sampling", list(SAMPLINGS.values())[:2], ids=list(SAMPLINGS)[:2])
def test_grammar_and_drafts_share_a_block(
    fast: Fast, cpu: Engine, plain: Engine, sampling: SamplingParams, forced: ForcedMode
) -> None:
    fields = {"sampling": sampling, "forced": forced, "count": 40}
    step = request(grammar=grammar(plain), **fields)
    expected = fast.expect(step)
    assert texts(cpu, [request(grammar=grammar(cpu), **fields)]) == expected
    fast.oracle.right = lambda position: 1 + position % BLOCK
    with fast.engine.open_session() as session:
        outcome = fast.engine.step(session, request(grammar=grammar(fast.engine), **fields))
    assert [outcome.token_ids] == expected
    assert outcome.text.endswith(", stop.")


def test_fork_rollback_and_prefix_hits_bring_the_draft_context_along(fast: Fast) -> None:
    prompt = tuple(range(20, 90))  # more than a page
    whole = StepRequest(prompt, 20, ignore_eos=True)
    (text,) = fast.expect(whole)
    with fast.engine.open_session() as session:
        fast.engine.step(session, StepRequest(prompt, 12, ignore_eos=True))
        session.rollback(6)
        used = fast.engine.kv_used_bytes
        twin = session.fork()
        assert fast.engine.kv_used_bytes == used
        rest = StepRequest((text[6],), 9, ignore_eos=True)
        for branch in (session, twin):
            outcome = fast.engine.step(branch, rest)
            assert outcome.token_ids == text[7:16]
            assert outcome.metrics.accepted["oracle"] >= 6
        twin.close()
    with fast.engine.open_session() as again:
        outcome = fast.engine.step(again, whole)
        assert outcome.metrics.prefill_cached_tokens == len(prompt) - 1
        assert outcome.token_ids == text
        assert outcome.metrics.accepted["oracle"] >= 14


def test_steps_wait_for_memory_and_none_dies_of_it(files: ModelFiles, plain: Engine) -> None:
    position = 2 * 2 * 2 * 16 * 4
    steps = [request(i, 6) for i in range(4)]
    expected = texts(plain, steps)
    with device_engine(files, kv_bytes=2 * 64 * position) as engine:
        assert texts(engine, steps) == expected
        assert engine.kv_used_bytes <= 2 * 64 * position


@pytest.mark.parametrize("head", ["vanilla", pytest.param("rnn", marks=pytest.mark.slow)])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_drafter_from_disk_changes_no_token(
    head: str, temperature: float, make_drafter: MakeDrafter, tmp_path: Path
) -> None:
    random = make_drafter("qwen3", head=head, draft_vocab=200)
    write_drafter(tmp_path / "drafter", random.config, random.state, random.d2t)
    files = resolve(str(random.target_folder))
    steps = [
        request(i, 8, sampling=SamplingParams(temperature=temperature, seed=5)) for i in range(2)
    ]
    with Engine.load(files.folder, precision="fp32", threads=1, speculation=False) as plain:
        expected = texts(plain, steps)
        constrained = request(2, 20, grammar=grammar(plain))
        expected += texts(plain, [constrained])
    options = {"signals": Signals.drafts_alone()}
    with device_engine(files, tmp_path / "drafter", Fixed(3), **options) as engine:
        own = [*steps, request(2, 20, grammar=grammar(engine))]
        sessions = [engine.open_session() for _ in own]
        handles = [engine.submit(s, step) for s, step in zip(sessions, own, strict=True)]
        outcomes = [handle.result(300) for handle in handles]
        assert [outcome.token_ids for outcome in outcomes] == expected
        assert all(outcome.metrics.proposed.get("dspark", 0) > 0 for outcome in outcomes)


def test_sampled_drafts_are_judged_by_rejection(make_drafter: MakeDrafter, tmp_path: Path) -> None:
    """That the text follows the distribution, the kernel's own tests show."""
    random = make_drafter("qwen3", draft_vocab=200)
    write_drafter(tmp_path / "drafter", random.config, random.state, random.d2t)
    files = resolve(str(random.target_folder))
    sampling = SamplingParams(temperature=2.5, seed=1, acceptance=AcceptanceRule.REJECTION)
    steps = [request(0, 12, sampling=sampling), request(1, 8)]
    options = {"signals": Signals.drafts_alone()}
    with device_engine(files, tmp_path / "drafter", Fixed(3), **options) as engine:
        sessions = [engine.open_session() for _ in steps]
        handles = [engine.submit(s, step) for s, step in zip(sessions, steps, strict=True)]
        sampled, _ = outcomes = [handle.result(300) for handle in handles]
        assert [len(outcome.token_ids) for outcome in outcomes] == [12, 8]
        assert 0 < sampled.metrics.accepted["dspark"] < sampled.metrics.proposed["dspark"]


def test_a_device_that_is_not_there_is_refused(tiny_checkpoint: TinyCheckpoint) -> None:
    folder = tiny_checkpoint("qwen3")
    with pytest.raises(RequestError, match="device 'tpu' is not known; choose cpu, cuda"):
        Engine.load(folder, device="tpu")
    expected = "torch" if DEVICE.type == "cpu" else "there are"
    with pytest.raises(DeviceError, match=expected):
        Engine.load(folder, device="cuda:99")


def test_a_precision_of_the_cpu_is_refused(files: ModelFiles) -> None:
    with pytest.raises(RequestError, match="'int8' runs on the CPU; on a GPU choose one of bf16"):
        device_parts(files, "int8", 512, None, DEVICE)
