"""Drafting that runs ahead of the host: what is written is what plain decoding writes, whatever
stands of the drafts, and the draft contexts are right all the way. Under Triton's interpreter where
there is no GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from dspark_backend.ahead.device import DeviceFlights
from dspark_backend.ahead.protocol import Plan, Start
from dspark_backend.catalog import ModelFiles, resolve
from dspark_backend.drafter.checkpoint import open_drafter, write_drafter
from dspark_backend.drafter.device import DeviceDrafter
from dspark_backend.engine import Engine
from dspark_backend.events import StepEvent, Tokens
from dspark_backend.kernels.recording import Capture, RecordingCounts, Recordings
from dspark_backend.kv.budget import KVShape
from dspark_backend.kv.paged import PagedContext, PagedKV, paged_context
from dspark_backend.kv.pages import PagePool
from dspark_backend.parts import Parts, device_parts
from dspark_backend.request import (
    FinishReason,
    ForcedMode,
    SamplingParams,
    StepRequest,
)
from dspark_backend.sampling.verify import Acceptance
from dspark_backend.scheduler import Limits
from dspark_backend.speculation.arbiter import Arbiter
from dspark_backend.speculation.policies import Fixed
from dspark_backend.speculation.protocol import Anchor, Proposal
from dspark_backend.speculation.signals import Signals
from dspark_backend.target.batch import Batch, Rows
from dspark_backend.target.device import DeviceDecoder
from dspark_backend.target.device_load import load_device_decoder
from dspark_backend.target.paged_rows import PagedRows
from running_ahead import DEVICE, outcomes

BLOCK = 4
PROMPTS = [tuple(range(10 + 7 * i, 17 + 9 * i)) for i in range(3)]
COUPLED = SamplingParams(temperature=1.0, seed=11)
SMALL = {"draft_vocab": 100, "block_size": 3, "num_layers": 1}


class Told:
    """Drafts the texts that it was told, wrong from a chosen place on, for both loops.

    Its context keeps the first feature of every position in the pages: one that was not written, or
    written from other tokens, matches no text, which is an error here.
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

    def learn(self, text: Sequence[int]) -> None:
        storage = self._target.storage(None, 128 * self._target.kv_shape.bytes_per_token)
        kv = storage.new()
        kv.reserve(len(text))
        with torch.inference_mode():
            features = self._target.forward(Batch([Rows(kv, list(text), 0)]), self.taps).features
        self._texts.append((list(text), features[:, 0].clone()))

    def extend(self, context: Any, features: torch.Tensor) -> None:
        mine = paged_context(context)
        at = torch.arange(mine.length, mine.length + len(features))
        mine.reserve(mine.length + len(features))
        pages = torch.tensor(mine.owner.pages)[at // 64]
        self._layer(mine.owner.pool)[pages, 0, at % 64, 0] = features[:, 0]
        mine.length += len(features)

    def read(self, rows: PagedRows, features: torch.Tensor) -> None:
        places = rows.places
        self._layer(rows.pool)[places.pages.long(), 0, places.slots.long(), 0] = features[:, 0]

    def propose(self, anchors: Sequence[Anchor]) -> list[Proposal]:
        return [self._propose(paged_context(a.context), a.token) for a in anchors]

    def _propose(self, context: PagedContext, token: int) -> Proposal:
        table = torch.tensor(context.owner.pages)
        return self.proposal(
            np.array(self._block(context.owner.pool, table, context.length, token))
        )

    def blocks(self, rows: PagedRows, first: torch.Tensor) -> torch.Tensor:
        starts, tokens = rows.starts.tolist(), first.tolist()
        made = [
            self._block(rows.pool, table.cpu().long(), at, token)
            for table, at, token in zip(rows.table, starts, tokens, strict=True)
        ]
        return torch.tensor(made, dtype=torch.float64, device=first.device)

    def proposal(self, block: NDArray[np.float64]) -> Proposal:
        drafts = [int(token) for token in block[:BLOCK] if token >= 0]
        return Proposal(tuple(drafts), tuple(block[BLOCK : BLOCK + len(drafts)].tolist()), "told")

    def _block(self, pool: PagePool, table: torch.Tensor, at: int, token: int) -> list[float]:
        positions = torch.arange(at)
        seen = self._layer(pool)[table[positions // 64], 0, positions % 64, 0]
        survival = [0.9**k for k in range(1, BLOCK + 1)]
        for text, features in self._texts:
            if at < len(text) and text[at] == token and torch.equal(seen, features[:at]):
                drafts = [*text[at + 1 : at + 1 + BLOCK], *[-1.0] * BLOCK][:BLOCK]
                right = self.right(at)
                wrong = [(draft + 1) % 384 if draft >= 0 else draft for draft in drafts[right:]]
                return [*drafts[:right], *wrong, *survival]
        if not any(torch.equal(seen[: len(text)], features) for text, features in self._texts):
            self.problems.append(f"no text, nor what follows one, has this context of {at}")
        return [*[-1.0] * BLOCK, *survival]

    def _layer(self, pool: PagePool) -> torch.Tensor:
        return pool.keys[self._target.config.num_layers]


def request(index: int = 0, count: int = 9, **fields: Any) -> StepRequest:
    return StepRequest(PROMPTS[index], count, **{"ignore_eos": True, **fields})


@pytest.fixture(scope="module")
def files(tiny_checkpoint: Callable[..., Path]) -> ModelFiles:
    return resolve(str(tiny_checkpoint("qwen3", num_hidden_layers=1)))


@pytest.fixture(scope="module")
def plain(files: ModelFiles) -> Iterator[Engine]:
    parts = device_parts(files, "fp32", 256, None, DEVICE)
    with Engine(files, parts, 1, 2**21, Limits()) as engine:
        yield engine


class Fast:
    """An engine that runs ahead with drafts of what plain decoding writes."""

    def __init__(self, parts: Parts, files: ModelFiles, plain: Engine) -> None:
        assert isinstance(parts.target, DeviceDecoder)
        self.told = Told(parts.target)
        self.flights = DeviceFlights(parts.target, self.told)
        parts = replace(parts, drafter=self.told, flights=self.flights)
        options = {"signals": Signals.drafts_alone()}
        self.engine = Engine(files, parts, 1, 2**22, Limits(), Fixed(BLOCK), **options)
        self.plain = plain

    def expect(self, *steps: StepRequest) -> list[tuple[int, ...]]:
        """What plain decoding writes where nothing stops it; the drafts know it, and some tokens
        more."""
        longer = [
            replace(s, max_new_tokens=s.max_new_tokens + BLOCK, stop=(), stop_token_ids=())
            for s in steps
        ]
        written = [outcome.token_ids for outcome in outcomes(self.plain, longer)]
        for step, tokens in zip(steps, written, strict=True):
            self.told.learn([*step.tokens, *tokens])
        return [tokens[:-BLOCK] for tokens in written]


@pytest.fixture
def fast(files: ModelFiles, plain: Engine) -> Iterator[Fast]:
    it = Fast(device_parts(files, "fp32", 256, None, DEVICE), files, plain)
    with it.engine:
        yield it
    assert it.told.problems == []
    assert it.engine.kv_used_bytes == 0


@pytest.mark.parametrize(
    ("accepted", "sampling"),
    [(0, COUPLED), (2, SamplingParams()), (BLOCK, COUPLED)],
    ids=["none, coupled", "two, greedy", "all, coupled"],
)
def test_every_acceptance_length_writes_the_plain_text(
    fast: Fast, sampling: SamplingParams, accepted: int
) -> None:
    # Where nothing stands, blocks that were all taken for committed would soon run out of a page.
    prompt = tuple(range(9, 16 if accepted else 53))
    step = StepRequest(prompt, 9, sampling, ignore_eos=True)
    (expected,) = fast.expect(step)
    fast.told.right = lambda position: accepted
    (given,) = outcomes(fast.engine, [step])
    assert given.token_ids == expected
    assert given.metrics.cycles == 1 + -(-8 // (accepted + 1))
    assert given.metrics.accepted.get("told", 0) == 9 - given.metrics.cycles


def test_sessions_with_different_lengths_share_their_cycles(fast: Fast) -> None:
    steps = [request(i, 6 + 3 * i, sampling=s) for i, s in enumerate((COUPLED, SamplingParams()))]
    expected = fast.expect(*steps)
    fast.told.right = lambda position: position % (BLOCK + 1)
    given = outcomes(fast.engine, steps)
    assert [o.token_ids for o in given] == expected


def test_pages_end_inside_a_block(fast: Fast) -> None:
    step = StepRequest(tuple(range(9, 69)), 11, ignore_eos=True)
    (expected,) = fast.expect(step)
    fast.told.right = lambda position: 1 + position % BLOCK
    assert outcomes(fast.engine, [step])[0].token_ids == expected


def test_a_session_goes_on_after_an_end_inside_a_block(fast: Fast) -> None:
    """What lies past the end is not its session's, and its draft context is as long as it is."""
    (whole,) = fast.expect(request(0, 12))
    end = next(i for i in range(4, 12) if whole[i] not in whole[:i])
    stopped = request(0, 12, stop_token_ids=(whole[end],))
    with fast.engine.open_session() as session:
        outcome = fast.engine.step(session, stopped)
        assert outcome.finish_reason is FinishReason.STOP
        assert outcome.token_ids == whole[: end + 1]
        assert session.kv.draft is not None
        cached = session.cached_tokens  # takes the lock: the cycle is through
        assert session.kv.draft.length == session.kv.length == cached
        session.rollback(2)
        with session.fork() as twin:
            rest = StepRequest((whole[end - 1],), 12 - end, ignore_eos=True)
            for branch in (session, twin):
                outcome = fast.engine.step(branch, rest)
                assert outcome.token_ids == whole[end:]
                assert outcome.metrics.accepted["told"] > 0


@pytest.mark.parametrize(
    ("forced", "right"),
    [
        (ForcedMode.OFF, 2),
        (ForcedMode.VERIFY, BLOCK),
        pytest.param(ForcedMode.OFF, 0, marks=pytest.mark.slow),
        pytest.param(ForcedMode.OFF, BLOCK, marks=pytest.mark.slow),
        pytest.param(ForcedMode.VERIFY, 0, marks=pytest.mark.slow),
    ],
)
def test_drafts_under_a_grammar_write_the_plain_text(
    fast: Fast, forced: ForcedMode, right: int
) -> None:
    """Drafts that it does not allow fall, and so does what says something else than the model; the
    contexts are right all the same. In company with a text that has no grammar."""
    grammar = fast.plain.dialect.compiler.compile_lark('start: /[a-z]{20,24}/ ", stop."')
    steps = [
        StepRequest(PROMPTS[0], 40, COUPLED, grammar=grammar, forced=forced),
        request(1, 24, sampling=replace(COUPLED, seed=4)),
    ]
    expected = [o.token_ids for o in outcomes(fast.plain, steps)]
    # Where the grammar is through, the drafts go on with what the model would say without it.
    after = [replace(steps[0], tokens=(*steps[0].tokens, *expected[0]), grammar=None), steps[1]]
    tails = [o.token_ids[: BLOCK + 1] for o in outcomes(fast.plain, after)]
    for step, tokens, tail in zip(steps, expected, (tails[0], ()), strict=True):
        fast.told.learn([*step.tokens, *tokens, *tail])
    fast.told.right = lambda position: right
    given = outcomes(fast.engine, steps)
    assert [o.token_ids for o in given] == expected
    for outcome in given:
        accepted = outcome.metrics.accepted.get("told", 0)
        assert accepted > outcome.metrics.cycles if right == BLOCK else accepted >= right
    assert fast.flights.cycles > 2


def test_a_step_whose_drafts_cannot_be_laid_down_ends_and_leaves_its_session_whole(
    fast: Fast, monkeypatch: pytest.MonkeyPatch
) -> None:
    (expected,) = fast.expect(request(0, 9))
    plainly = Arbiter.drafted
    fails = [True]

    def once(*given: Any) -> Any:
        if fails and fast.flights.cycles:
            fails.clear()
            raise RuntimeError("no survival is known")
        return plainly(*given)

    monkeypatch.setattr(Arbiter, "drafted", once)
    fast.told.right = lambda position: 1
    with fast.engine.open_session() as session:
        with pytest.raises(RuntimeError, match="no survival"):
            fast.engine.step(session, request(0, 9))
        written = session.tokens[len(PROMPTS[0]) :]
        assert written == expected[: len(written)]
        assert session.cached_tokens < len(session.tokens)
        session.rollback(1)
        rest = StepRequest(written[-1:], 9 - len(written), ignore_eos=True)
        assert fast.engine.step(session, rest).token_ids == expected[len(written) :]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_whoever_comes_and_goes_writes_the_plain_text(fast: Fast, seed: int) -> None:
    """Steps of all kinds that begin in the middle of others, some of which are cancelled."""
    rng = np.random.default_rng(seed)
    steps = []
    for number in range(9):
        sampling = SamplingParams(temperature=float(rng.integers(0, 2)), seed=number)
        if number == 3:
            sampling = replace(sampling, repetition_penalty=1.2)
        prompt = tuple(rng.integers(5, 300, int(rng.integers(3, 14))).tolist())
        steps.append(StepRequest(prompt, int(rng.integers(5, 24)), sampling, ignore_eos=True))
    for number in (1, 5):
        end = outcomes(fast.plain, steps[number : number + 1])[0].token_ids[-2:][0]
        steps[number] = replace(steps[number], stop_token_ids=(end,))
    fast.expect(*steps)
    expected = outcomes(fast.plain, steps)
    fast.told.right = lambda position: position * 7 % (BLOCK + 1)
    waiting, handles = [*enumerate(steps)], {}

    def come() -> None:
        number, step = waiting.pop(0)
        handles[number] = fast.engine.submit(fast.engine.open_session(), step, on_event)

    def on_event(event: StepEvent) -> None:
        if isinstance(event, Tokens) and waiting and rng.random() < 0.1:
            come()
        if len(handles) == 8 and number_cancelled in handles:
            handles[number_cancelled].cancel()

    number_cancelled = 7
    while waiting:
        come()
        for handle in [*handles.values()]:
            handle.wait()
    for number, right in enumerate(expected):
        given = handles[number].result(300)
        if given.finish_reason is FinishReason.CANCELLED:
            assert number == number_cancelled
            assert right.token_ids[: len(given.token_ids)] == given.token_ids
        else:
            assert (given.token_ids, given.finish_reason) == (right.token_ids, right.finish_reason)
    assert fast.flights.cycles > 5
    for session in [*fast.engine._sessions]:
        session.close()


class Alone:
    """Sequences of a decoder with a drafter from disk, and what a flight of them brings."""

    def __init__(self, random: Any, folder: Path) -> None:
        write_drafter(folder, random.config, random.state, random.d2t)
        files = resolve(str(random.target_folder))
        self.target = load_device_decoder(files, torch.float32, 256, DEVICE)
        self.drafter = DeviceDrafter(open_drafter(folder, files.config), self.target)

    def sequences(self, lengths: Sequence[int]) -> list[PagedKV]:
        storage = self.target.storage(self.drafter.context_shape, 2**21)
        kvs = [storage.new() for _ in lengths]
        for kv, length in zip(kvs, lengths, strict=True):
            kv.reserve(length + 40)
            self.compute(kv, range(7, 7 + length))
        return kvs

    def compute(self, kv: PagedKV, tokens: Sequence[int]) -> torch.Tensor:
        """Commit ``tokens``; the logits after the last of them."""
        assert kv.draft is not None
        made = self.target.forward(Batch([Rows(kv, tokens, 1)]), self.drafter.taps)
        kv.length += len(tokens)
        self.drafter.extend(kv.draft, made.features)
        return made.logits[0]

    def flown(
        self, kvs: Sequence[PagedKV], plans: Sequence[Plan], recordings: Recordings | None = None
    ) -> list[list[tuple[Acceptance, Proposal]]]:
        """What each cycle brings, read when the next one has been launched."""
        flights = DeviceFlights(self.target, self.drafter, recordings)
        samplings = (SamplingParams(), COUPLED, COUPLED)
        starts = [Start(kv, 5 + i, samplings[i]) for i, kv in enumerate(kvs)]
        flight = flights.begin(starts)
        landings = [flight.launch(plans[0])]
        brought = []
        for plan in plans[1:]:
            landings.append(flight.launch(plan))
            brought.append(landings.pop(0).read())
        brought.append(landings[0].read())
        return [[(each.answer(), each.proposal) for each in cycle] for cycle in brought]


@pytest.mark.parametrize("head", ["vanilla", pytest.param("rnn", marks=pytest.mark.slow)])
def test_drafts_are_those_of_the_synchronous_cycle(
    head: str, make_drafter: Callable[..., Any], tmp_path: Path
) -> None:
    alone = Alone(make_drafter("qwen3", head=head, **SMALL), tmp_path / "d")
    with torch.inference_mode():
        plans = [Plan((0,), (2, 0)), Plan((0, 1), (0, 3)), Plan((1,), (0, 1))]
        brought = alone.flown(alone.sequences((5, 11)), plans)
        for place, kv in enumerate(alone.sequences((5, 11))):
            token = 5 + place
            for plan, cycle in zip(plans, brought, strict=True):
                acceptance, proposal = cycle[place]
                assert kv.draft is not None
                (expected,) = alone.drafter.propose([Anchor(kv.draft, token)])
                assert (proposal == expected) if place in plan.drafting else not proposal.tokens
                tokens = [token, *expected.tokens[: acceptance.accepted]]
                logits = alone.compute(kv, tokens)
                token = acceptance.next_token
                if place == 0:
                    assert token == int(logits.argmax())


MIXTURES = {
    "alone": ((9,), [Plan((0,), (n,)) for n in (2, 3, 2, 3)]),
    "in company": (
        (5, 62, 30),
        [
            *(Plan((0, 2), lengths) for lengths in ((2, 0, 1), (1, 0, 2), (0, 0, 2), (3, 0, 0))),
            *(Plan((0, 1), (1, 2, 0)), Plan.plain(3)),
        ],
    ),
}


@pytest.mark.parametrize("mixture", ["alone", pytest.param("in company", marks=pytest.mark.slow)])
def test_recorded_cycles_are_those_that_are_launched(
    mixture: str, make_drafter: Callable[..., Any], tmp_path: Path, capture: Capture | None
) -> None:
    """Of any mixture that is as large; and nothing in a cycle waits for the device."""
    alone = Alone(make_drafter("qwen3", **SMALL), tmp_path / "d")
    recordings = Recordings(DEVICE, capture)
    lengths, plans = MIXTURES[mixture]
    with torch.inference_mode():
        expected = alone.flown(alone.sequences(lengths), plans)
        given = alone.flown(alone.sequences(lengths), plans, recordings)
    assert given == expected
    plain = sum(not plan.drafting for plan in plans)
    counts = RecordingCounts(hits=len(plans) - 2 - plain, misses=2 + plain, recorded=1)
    assert recordings.counts == counts


def test_what_there_is_no_room_for_is_not_launched(
    make_drafter: Callable[..., Any], tmp_path: Path
) -> None:
    alone = Alone(make_drafter("qwen3", **SMALL), tmp_path / "d")
    with torch.inference_mode():
        (kv,) = alone.sequences((20,))
        flight = DeviceFlights(alone.target, alone.drafter).begin([Start(kv, 5, COUPLED)])
        with pytest.raises(ValueError, match="66 positions may be used: room for 64 reserved"):
            flight.launch(Plan((0,), (45,)))


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_drafter_from_disk_changes_no_token(
    temperature: float, make_drafter: Callable[..., Any], tmp_path: Path
) -> None:
    random = make_drafter("qwen3", **SMALL)
    write_drafter(tmp_path / "drafter", random.config, random.state, random.d2t)
    files = resolve(str(random.target_folder))
    sampling = SamplingParams(temperature=temperature, seed=5)
    steps = [request(i, 5 + i, sampling=sampling) for i in range(2)]
    parts = device_parts(files, "fp32", 256, None, DEVICE)
    with Engine(files, parts, 1, 2**22, Limits()) as plain:
        expected = [o.token_ids for o in outcomes(plain, steps)]
    parts = device_parts(files, "fp32", 256, tmp_path / "drafter", DEVICE, ahead=True)
    options = {"signals": Signals.drafts_alone()}
    with Engine(files, parts, 1, 2**22, Limits(), Fixed(2), **options) as engine:
        given = outcomes(engine, steps)
        assert [o.token_ids for o in given] == expected
        assert all(o.metrics.proposed["dspark"] > 2 for o in given)
    assert engine.kv_used_bytes == 0
