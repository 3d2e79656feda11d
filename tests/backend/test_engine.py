"""The engine's loop on a tiny model: steps, sessions, sharing, limits and faults."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dspark_backend.engine import Engine
from dspark_backend.errors import (
    CapacityError,
    ContextLengthError,
    EngineClosedError,
    GrammarError,
    RequestError,
    SessionClosedError,
)
from dspark_backend.events import Finished, Prefilled, StepEvent, Tokens
from dspark_backend.kv.contiguous import SequenceKV
from dspark_backend.request import (
    FinishReason,
    ForcedMode,
    SamplingParams,
    StepOutcome,
    StepRequest,
    Urgency,
)
from dspark_backend.scheduler import Limits

PROMPT = tuple(range(40, 70))
SAMPLED = SamplingParams(temperature=1.0, seed=7)
# Keys and values of one grain: 2 layers, 2 kv heads of width 16, float32.
GRAIN_BYTES = SequenceKV.GRAIN * 2 * 2 * 2 * 16 * 4


@pytest.fixture(scope="module")
def engine(tiny_checkpoint: Callable[..., Path]) -> Iterator[Engine]:
    with Engine.load(tiny_checkpoint("qwen3"), threads=1) as loaded:
        yield loaded


@pytest.fixture
def own_engine(tiny_checkpoint: Callable[..., Path]) -> Iterator[Callable[..., Engine]]:
    """Engines with settings of their own, closed at the end."""
    opened: list[Engine] = []

    def load(**settings: object) -> Engine:
        opened.append(Engine.load(tiny_checkpoint("qwen3"), threads=1, **settings))  # type: ignore[arg-type]
        return opened[-1]

    yield load
    for engine in opened:
        engine.close()


def request(tokens: tuple[int, ...] = PROMPT, count: int = 12, **fields: object) -> StepRequest:
    return StepRequest(tokens, count, ignore_eos=True, **fields)  # type: ignore[arg-type]


def alone(engine: Engine, step: StepRequest) -> StepOutcome:
    with engine.open_session() as session:
        return engine.step(session, step)


def test_a_step_extends_the_log(engine: Engine) -> None:
    with engine.open_session() as session:
        outcome = engine.step(session, request())
        assert session.tokens == PROMPT + outcome.token_ids
        assert outcome.finish_reason is FinishReason.LENGTH
        assert len(outcome.token_ids) == 12
        assert outcome.text == engine.tokenizer.decode(outcome.token_ids)


def test_the_next_step_computes_only_what_is_new(engine: Engine) -> None:
    with engine.open_session() as session:
        first = engine.step(session, request())
        second = engine.step(session, request((5, 6, 7)))
        # The last generated token has no keys yet: it is computed along with the new ones.
        assert second.metrics.prefill_new_tokens == 4
        assert second.metrics.prefill_cached_tokens == len(PROMPT) + 11
        log = PROMPT + first.token_ids + (5, 6, 7)
    assert second.token_ids == alone(engine, request(log)).token_ids


def test_a_new_session_reuses_a_known_beginning(own_engine: Callable[..., Engine]) -> None:
    engine = own_engine()
    fresh = alone(engine, request((*PROMPT, 1, 2)))
    assert fresh.metrics.prefill_cached_tokens == 0
    again = alone(engine, request((*PROMPT, 1, 2)))
    assert again.metrics.prefill_cached_tokens == len(PROMPT) + 1
    assert again.token_ids == fresh.token_ids
    forked = alone(engine, request((*PROMPT, 9, 9)))
    assert forked.metrics.prefill_cached_tokens == len(PROMPT)


@pytest.mark.parametrize("sampling", [SamplingParams(), SAMPLED], ids=["greedy", "sampled"])
def test_company_does_not_change_the_text(engine: Engine, sampling: SamplingParams) -> None:
    prompts = [tuple(range(i, i + 20 + 7 * i)) for i in range(8)]
    requests = [request(p, 10 + i, sampling=sampling) for i, p in enumerate(prompts)]
    expected = [alone(engine, r).token_ids for r in requests]
    sessions = [engine.open_session() for _ in requests]
    handles = [engine.submit(s, r) for s, r in zip(sessions, requests, strict=True)]
    assert [handle.result(60).token_ids for handle in handles] == expected
    for session in sessions:
        session.close()


def test_a_seed_replays_and_another_differs(engine: Engine) -> None:
    texts = [alone(engine, request(sampling=SAMPLED)).token_ids for _ in range(2)]
    other = alone(engine, request(sampling=SamplingParams(temperature=1.0, seed=8)))
    assert texts[0] == texts[1] != other.token_ids


def test_chunked_prefill_changes_nothing(own_engine: Callable[..., Engine]) -> None:
    prompt = tuple(i % 380 for i in range(150))
    small = Limits(decode_rows=2, prefill_rows=7, mixed_rows=3)
    outcomes = [alone(own_engine(limits=x), request(prompt)) for x in (small, Limits())]
    assert outcomes[0].token_ids == outcomes[1].token_ids


def test_fork_continues_from_the_same_place(engine: Engine) -> None:
    with engine.open_session() as session:
        engine.step(session, request())
        twin = session.fork()
        assert twin.tokens == session.tokens
        here = engine.step(session, request((3,)))
        there = engine.step(twin, request((3,)))
        assert here.token_ids == there.token_ids
        assert there.metrics.prefill_new_tokens == 2
        engine.step(twin, request((4,)))
        assert len(twin.tokens) > len(session.tokens)
        twin.close()


def test_rollback_undoes_a_step(engine: Engine) -> None:
    with engine.open_session() as session:
        engine.step(session, request())
        before = session.tokens
        first = engine.step(session, request((8, 9)))
        session.rollback(2 + len(first.token_ids))
        assert session.tokens == before
        assert engine.step(session, request((8, 9))).token_ids == first.token_ids
        with pytest.raises(RequestError, match="cannot roll back"):
            session.rollback(10_000)


def test_events_tell_the_step_in_order(engine: Engine) -> None:
    seen: list[StepEvent] = []
    with engine.open_session() as session:
        handle = engine.submit(session, request(), seen.append)
        pulled = list(handle.events())
    assert pulled == seen
    assert isinstance(seen[0], Prefilled)
    assert isinstance(seen[-1], Finished)
    tokens = [event for event in seen if isinstance(event, Tokens)]
    outcome = seen[-1].outcome
    assert tuple(t for event in tokens for t in event.token_ids) == outcome.token_ids
    assert "".join(event.text for event in tokens) == outcome.text


def test_metrics_add_up_to_the_wall_clock(engine: Engine) -> None:
    m = alone(engine, request()).metrics
    parts = (m.queue_s, m.prefill_s, m.decode_s, m.grammar_s, m.draft_s, m.verify_s, m.overhead_s)
    assert sum(parts) == pytest.approx(m.total_s, rel=0.02)
    assert 0 < m.ttft_s <= m.total_s
    assert (m.new_tokens, m.cycles) == (12, 12)


def test_end_of_turn_ends_the_step_and_not_the_text(engine: Engine) -> None:
    free = alone(engine, request(count=20))
    stop = free.token_ids[3]
    first = free.token_ids.index(stop)
    step = StepRequest(PROMPT, 20, stop_token_ids=(stop,), ignore_eos=True)
    outcome = alone(engine, step)
    assert outcome.finish_reason is FinishReason.STOP
    assert outcome.token_ids == free.token_ids[: first + 1]
    assert outcome.text == engine.tokenizer.decode(free.token_ids[:first])


def test_stop_string_is_cut_out_wherever_it_falls(engine: Engine) -> None:
    text = alone(engine, request(count=30)).text
    stop = text[4:7]
    outcome = alone(engine, request(count=30, stop=("never", stop)))
    assert outcome.finish_reason is FinishReason.STOP_STRING
    assert outcome.text == text[: text.index(stop)]


@pytest.mark.parametrize("forced", list(ForcedMode))
def test_grammar_constrains_every_mode(engine: Engine, forced: ForcedMode) -> None:
    grammar = engine.dialect.compiler.compile_lark('start: "the answer is " ("yes" | "no") "."')
    outcome = alone(engine, request(grammar=grammar, forced=forced, count=60))
    assert outcome.text in ("the answer is yes.", "the answer is no.")
    if forced is ForcedMode.OFF:
        assert set(outcome.metrics.accepted) <= {"model", "forced"}
        assert outcome.metrics.accepted.get("forced", 0) == 0
    else:
        assert outcome.metrics.accepted["forced"] > 0
        assert outcome.metrics.cycles < len(outcome.token_ids)


def test_verified_spans_are_the_text_of_plain_decoding(engine: Engine) -> None:
    grammar = engine.dialect.compiler.compile_lark('start: "abc" /[a-z]{3}/ " = " /[0-9]{4}/ ";"')
    for sampling in (SamplingParams(), SAMPLED):
        modes = [
            alone(engine, request(grammar=grammar, forced=mode, sampling=sampling, count=40))
            for mode in (ForcedMode.OFF, ForcedMode.VERIFY)
        ]
        assert modes[0].token_ids == modes[1].token_ids


def test_length_cuts_a_forced_span(engine: Engine) -> None:
    grammar = engine.dialect.compiler.compile_lark('start: "a rather long forced sentence"')
    outcome = alone(engine, request(grammar=grammar, count=3))
    assert outcome.finish_reason is FinishReason.LENGTH
    assert len(outcome.token_ids) == 3


def test_cancel_ends_within_an_iteration_and_frees_the_session(engine: Engine) -> None:
    with engine.open_session() as session:
        started = threading.Event()
        long = request(count=300)
        handle = engine.submit(session, long, lambda _: started.set())
        assert started.wait(30)
        handle.cancel()
        outcome = handle.result(30)
        assert outcome.finish_reason is FinishReason.CANCELLED
        assert len(outcome.token_ids) < 300
        assert session.tokens == PROMPT + outcome.token_ids
        assert engine.step(session, request((1,))).finish_reason is FinishReason.LENGTH


def test_closing_a_busy_session_gives_its_memory_back(own_engine: Callable[..., Engine]) -> None:
    engine = own_engine()
    session = engine.open_session()
    handle = engine.submit(session, request(count=300))
    session.close()
    assert handle.result(30).finish_reason is FinishReason.CANCELLED
    engine.close()
    assert engine.kv_used_bytes == 0


def test_one_step_at_a_time(engine: Engine) -> None:
    with engine.open_session() as session:
        handle = engine.submit(session, request(count=200))
        with pytest.raises(SessionClosedError, match="in flight"):
            engine.submit(session, request())
        with pytest.raises(SessionClosedError, match="in flight"):
            session.fork()
        handle.cancel()
        handle.result(30)


def test_closed_things_say_so(own_engine: Callable[..., Engine]) -> None:
    engine = own_engine()
    session = engine.open_session()
    session.close()
    with pytest.raises(SessionClosedError, match="closed"):
        engine.submit(session, request())
    engine.close()
    engine.close()
    with pytest.raises(EngineClosedError):
        engine.open_session()


def test_an_engine_nobody_closed_is_closed_at_exit(tiny_checkpoint: Callable[..., Path]) -> None:
    """With a step in flight; a thread left to the interpreter's end could abort the process."""
    program = f"""
import atexit
from dspark_backend.engine import Engine
from dspark_backend.request import StepRequest

atexit.register(lambda: print("running" if engine._thread.is_alive() else "ended"))
engine = Engine.load({str(tiny_checkpoint("qwen3"))!r}, threads=1)
engine.submit(engine.open_session(), StepRequest(tokens=(40, 41), max_new_tokens=400))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.returncode, done.stdout) == (0, "ended\n"), done.stderr


def test_context_limit_raises_and_leaves_the_session_alone(engine: Engine) -> None:
    with engine.open_session() as session:
        engine.step(session, request())
        before = session.tokens
        with pytest.raises(ContextLengthError, match="the context holds 512"):
            engine.step(session, request(count=500))
        assert session.tokens == before


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (StepRequest((), 5), "no tokens"),
        (StepRequest((1,), -1), "max_new_tokens"),
        (StepRequest((1,), 5, deadline_s=float("nan")), "deadline_s"),
        (StepRequest((512,), 5), "outside the vocabulary"),
        (StepRequest((-1,), 5), "outside the vocabulary"),
        (StepRequest((1,), 5, SamplingParams(temperature=-1.0)), "temperature"),
        (StepRequest((1,), 5, stop=("",)), "stop string"),
    ],
    ids=["empty", "length", "deadline", "high-id", "low-id", "temperature", "stop"],
)
def test_bad_requests_never_reach_the_loop(engine: Engine, step: StepRequest, message: str) -> None:
    with engine.open_session() as session:
        with pytest.raises(RequestError, match=message):
            engine.submit(session, step)
        assert session.tokens == ()
        assert engine.step(session, request()).finish_reason is FinishReason.LENGTH


def test_a_failing_step_does_not_disturb_its_neighbour(engine: Engine) -> None:
    expected = alone(engine, request(count=30)).token_ids

    def broken(event: StepEvent) -> None:
        if isinstance(event, Tokens):
            raise GrammarError("died in a callback")

    with engine.open_session() as bad, engine.open_session() as good:
        failing = engine.submit(bad, request(tuple(range(9)), 30), broken)
        healthy = engine.submit(good, request(count=30))
        with pytest.raises(GrammarError, match="died in a callback"):
            failing.result(30)
        assert healthy.result(30).token_ids == expected


def test_what_can_never_fit_fails_at_once(own_engine: Callable[..., Engine]) -> None:
    engine = own_engine(kv_bytes=GRAIN_BYTES)
    with engine.open_session() as session:
        with pytest.raises(CapacityError, match="kv_bytes"):
            engine.submit(session, request(count=SequenceKV.GRAIN))
        assert session.tokens == ()
        assert engine.step(session, request()).finish_reason is FinishReason.LENGTH


def test_a_step_waits_for_memory_that_others_run_in(own_engine: Callable[..., Engine]) -> None:
    engine = own_engine(kv_bytes=2 * GRAIN_BYTES)
    sessions = [engine.open_session() for _ in range(5)]
    requests = [request(tuple(range(i, i + 20)), 30 + i) for i in range(5)]
    expected = [alone(engine, step).token_ids for step in requests]
    handles = [engine.submit(s, r) for s, r in zip(sessions, requests, strict=True)]
    outcomes = [handle.result(60) for handle in handles]
    assert [outcome.token_ids for outcome in outcomes] == expected
    assert outcomes[-1].metrics.queue_s > outcomes[0].metrics.total_s
    assert engine.kv_used_bytes <= 2 * GRAIN_BYTES
    # Whose keys and values were given up computes them again, and goes on as if nothing was.
    assert [len(s.tokens) for s in sessions] == [20 + 30 + i for i in range(5)]
    again = [engine.step(session, request((7, 8))) for session in sessions]
    assert again[0].metrics.prefill_cached_tokens == 0
    log = (*requests[0].tokens, *expected[0], 7, 8)
    assert again[0].token_ids == alone(engine, request(log)).token_ids


def test_idle_sessions_keep_theirs_while_there_is_anything_else(
    own_engine: Callable[..., Engine],
) -> None:
    engine = own_engine(kv_bytes=8 * GRAIN_BYTES)
    sessions = [engine.open_session() for _ in range(6)]
    for i, session in enumerate(sessions):
        engine.step(session, request(tuple(range(i, i + 20))))
    kept = tuple(range(200, 220))
    alone(engine, request(kept))  # a prefix of a closed session: one grain, kept
    engine.step(engine.open_session(), request(tuple(range(100, 120))))
    assert [session.cached_tokens for session in sessions] == [31] * 6
    engine.step(engine.open_session(), request(tuple(range(130, 150))))
    assert [session.cached_tokens for session in sessions] == [31] * 6
    assert alone(engine, request(kept)).metrics.prefill_cached_tokens == 0


def test_who_returns_last_gives_up_first(own_engine: Callable[..., Engine]) -> None:
    engine = own_engine(kv_bytes=3 * GRAIN_BYTES)
    sessions = [engine.open_session() for _ in range(3)]
    for i, session in enumerate(sessions):
        engine.step(session, request(tuple(range(i, i + 20))))
    sessions[0].expect_return(0.5)
    sessions[1].expect_return(3600)
    sessions[2].expect_return(60)
    others = [engine.open_session() for _ in range(2)]
    engine.step(others[0], request(tuple(range(100, 120))))
    assert [session.cached_tokens > 0 for session in sessions] == [True, False, True]
    others[0].expect_return(1)
    engine.step(others[1], request(tuple(range(130, 150))))
    assert [session.cached_tokens > 0 for session in sessions] == [True, False, False]
    with pytest.raises(RequestError, match="0 seconds or more"):
        sessions[0].expect_return(-1)


def test_kept_prefixes_make_room_when_memory_is_short(own_engine: Callable[..., Engine]) -> None:
    engine = own_engine(kv_bytes=2 * GRAIN_BYTES)
    for seed in range(6):
        outcome = alone(engine, request(tuple(range(seed, seed + 20))))
        assert outcome.finish_reason is FinishReason.LENGTH


def test_more_steps_than_may_run_wait_their_turn(own_engine: Callable[..., Engine]) -> None:
    engine = own_engine(limits=Limits(running=2))
    running: set[int] = set()
    most = 0

    def follow(step: int) -> Callable[[StepEvent], None]:
        def on_event(event: StepEvent) -> None:
            nonlocal most
            if isinstance(event, Finished):
                running.discard(step)
            else:
                running.add(step)
                most = max(most, len(running))

        return on_event

    sessions = [engine.open_session() for _ in range(6)]
    handles = [engine.submit(s, request(count=40), follow(i)) for i, s in enumerate(sessions)]
    outcomes = [handle.result(60) for handle in handles]
    assert {outcome.finish_reason for outcome in outcomes} == {FinishReason.LENGTH}
    assert 0 < most <= 2


def test_a_thousand_steps_all_finish(own_engine: Callable[..., Engine]) -> None:
    engine = own_engine(kv_bytes=40 * GRAIN_BYTES)
    handles = []
    for i in range(1000):
        urgency = list(Urgency)[i % 3]
        session = engine.open_session()
        step = request((i % 300, 1 + i % 7, 5), 1 + i % 3, urgency=urgency, deadline_s=i % 11)
        handles.append(engine.submit(session, step))
    outcomes = [handle.result(100) for handle in handles]
    assert [len(outcome.token_ids) for outcome in outcomes] == [1 + i % 3 for i in range(1000)]
    for i in (0, 400, 999):
        expected = alone(engine, request((i % 300, 1 + i % 7, 5), 1 + i % 3))
        assert outcomes[i].token_ids == expected.token_ids


def test_the_urgent_step_is_admitted_first(own_engine: Callable[..., Engine]) -> None:
    engine = own_engine(limits=Limits(running=1))
    ended: list[str] = []

    def ends(name: str) -> Callable[[StepEvent], None]:
        return lambda event: ended.append(name) if isinstance(event, Finished) else None

    started = threading.Event()
    busy = engine.submit(engine.open_session(), request(count=200), lambda _: started.set())
    assert started.wait(30)
    order = {
        "background": {"urgency": Urgency.BACKGROUND},
        "interactive": {},
        "due later": {"deadline_s": 90.0},
        "due soon": {"deadline_s": 30.0},
        "critical": {"urgency": Urgency.CRITICAL},
    }
    handles = [
        engine.submit(engine.open_session(), request(count=2, **fields), ends(name))
        for name, fields in order.items()
    ]
    busy.cancel()
    for handle in handles:
        handle.result(30)
    assert ended == ["critical", "due soon", "due later", "interactive", "background"]


def test_a_prefill_computes_what_the_next_step_then_finds(engine: Engine) -> None:
    expected = alone(engine, request((*PROMPT, 1, 2, 3)))
    with engine.open_session() as session:
        outcome = engine.prefill(session, PROMPT).result(30)
        assert outcome.token_ids == ()
        assert outcome.finish_reason is FinishReason.LENGTH
        assert session.tokens == PROMPT
        assert session.cached_tokens == len(PROMPT)
        step = engine.step(session, request((1, 2, 3)))
    assert step.token_ids == expected.token_ids
    assert step.metrics.prefill_new_tokens == 3


def test_a_step_takes_over_from_a_prefill_wherever_that_is(
    own_engine: Callable[..., Engine],
) -> None:
    engine = own_engine(limits=Limits(decode_rows=2, prefill_rows=8, mixed_rows=4))
    ahead = tuple(i % 380 for i in range(160))
    expected = alone(engine, request((*ahead, 1, 2)))
    engine.close()
    for computed in (0, 8, 80):
        engine = own_engine(limits=Limits(decode_rows=2, prefill_rows=8, mixed_rows=4))
        with engine.open_session() as session:
            with engine.lock:  # the engine cannot go on meanwhile
                prefill = engine.prefill(session, ahead)
                with pytest.raises(SessionClosedError, match="in flight"):
                    session.rollback(1)
                with pytest.raises(SessionClosedError, match="in flight"):
                    session.fork()
                if not computed:
                    handle = engine.submit(session, request((1, 2)))
            if computed:
                while session.cached_tokens < computed:
                    time.sleep(0)
                handle = engine.submit(session, request((1, 2)))
            step = handle.result(30)
            assert prefill.result(30).token_ids == ()
            assert step.token_ids == expected.token_ids
            assert session.tokens == (*ahead, 1, 2, *step.token_ids)
            assert engine.step(session, request((9,))).finish_reason is FinishReason.LENGTH


def test_a_cancelled_prefill_leaves_its_tokens_for_the_next_step(engine: Engine) -> None:
    expected = alone(engine, request((*range(300), 1)))
    with engine.open_session() as session:
        handle = engine.prefill(session, range(300))
        handle.cancel()
        handle.result(30)
        assert session.tokens == tuple(range(300))
        assert engine.step(session, request((1,))).token_ids == expected.token_ids


def test_closing_under_a_prefill_that_was_taken_over(own_engine: Callable[..., Engine]) -> None:
    engine = own_engine()
    session = engine.open_session()
    handles = [engine.prefill(session, range(300)), engine.submit(session, request(count=100))]
    session.close()
    assert {handle.result(30).finish_reason for handle in handles} <= {
        FinishReason.CANCELLED,
        FinishReason.LENGTH,
    }
    left = engine.prefill(engine.open_session(), range(400))
    engine.close()
    left.result(30)
    assert engine.kv_used_bytes == 0


def test_settings_are_checked(tiny_checkpoint: Callable[..., Path]) -> None:
    folder = tiny_checkpoint("qwen3")
    with pytest.raises(RequestError, match="precision 'fp4' is not known"):
        Engine.load(folder, precision="fp4")
    with pytest.raises(RequestError, match="max_context 513"):
        Engine.load(folder, max_context=513)
    with pytest.raises(RequestError, match="threads"):
        Engine.load(folder, threads=0)
