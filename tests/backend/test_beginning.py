"""Steps that begin alike: the beginning is computed once, and nothing else changes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dspark_backend.beginning import WORTH_WAITING
from dspark_backend.engine import Engine
from dspark_backend.events import Finished, Prefilled, StepEvent
from dspark_backend.handle import StepHandle
from dspark_backend.request import FinishReason, StepOutcome, StepRequest, Urgency
from dspark_backend.scheduler import Limits
from dspark_backend.session import Session

SHARED = tuple(40 + i % 50 for i in range(300))
# Few rows a pass, so that a beginning takes many of them and steps can be submitted meanwhile.
SLOW = Limits(decode_rows=4, prefill_rows=8, mixed_rows=8)


@pytest.fixture
def engine(tiny_checkpoint: Callable[..., Path]) -> Iterator[Engine]:
    with Engine.load(tiny_checkpoint("qwen3"), threads=1, limits=SLOW) as loaded:
        yield loaded


class Crowd:
    """Steps on sessions of their own that begin in one pass: the engine's lock is held while they
    are submitted."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.sessions: list[Session] = []

    def submit(
        self, *prompts: tuple[int, ...], urgency: tuple[Urgency, ...] = ()
    ) -> list[StepHandle]:
        wanted = urgency or (Urgency.INTERACTIVE,) * len(prompts)
        self.sessions += [self.engine.open_session() for _ in prompts]
        with self.engine.lock:
            return [
                self.engine.submit(session, StepRequest(prompt, 6, ignore_eos=True, urgency=each))
                for session, prompt, each in zip(
                    self.sessions[-len(prompts) :], prompts, wanted, strict=True
                )
            ]

    def close(self) -> None:
        for session in self.sessions:
            session.close()


@pytest.fixture
def crowd(engine: Engine) -> Iterator[Crowd]:
    crowd = Crowd(engine)
    yield crowd
    crowd.close()


def alone(tiny_checkpoint: Callable[..., Path], prompt: tuple[int, ...]) -> StepOutcome:
    """The same step on an engine that has seen nothing else."""
    with Engine.load(tiny_checkpoint("qwen3"), threads=1) as other, other.open_session() as session:
        return other.step(session, StepRequest(prompt, 6, ignore_eos=True))


def computed(handles: list[StepHandle]) -> list[int]:
    return [handle.result().metrics.prefill_new_tokens for handle in handles]


def test_a_beginning_is_computed_once(crowd: Crowd, tiny_checkpoint: Callable[..., Path]) -> None:
    prompts = [(*SHARED, 100 + i, 7, 9) for i in range(5)]
    handles = crowd.submit(*prompts)
    assert computed(handles) == [303, 3, 3, 3, 3]
    for handle, prompt in zip(handles, prompts, strict=True):
        assert handle.result().token_ids == alone(tiny_checkpoint, prompt).token_ids


def test_the_longest_of_several_beginnings_is_waited_for(crowd: Crowd) -> None:
    short, middle = (*SHARED[:100], 1, 2, 3), (*SHARED[:200], 4, 5)
    handles = crowd.submit(short, middle, (*SHARED[:200], 6, 7), SHARED)
    assert computed(handles) == [103, 102, 2, 100]


def test_a_short_beginning_is_not_waited_for(crowd: Crowd) -> None:
    shared = SHARED[: WORTH_WAITING - 1]
    handles = crowd.submit((*shared, 1, 2), (*shared, 3, 4))
    assert computed(handles) == [len(shared) + 2] * 2


def test_a_step_without_its_like_passes_those_who_wait(engine: Engine) -> None:
    over: list[int] = []

    def noting(place: int) -> Callable[[StepEvent], None]:
        return lambda event: over.append(place) if isinstance(event, Finished) else None

    with engine.open_session() as a, engine.open_session() as b, engine.open_session() as c:
        prompts = [(*SHARED, 1), (*SHARED, 2), (40, 41, 42)]
        with engine.lock:
            handles = [
                engine.submit(session, StepRequest(prompt, 2, ignore_eos=True), noting(place))
                for place, (session, prompt) in enumerate(zip((a, b, c), prompts, strict=True))
            ]
        for handle in handles:
            handle.result()
    assert over.index(2) < over.index(1)


@pytest.mark.parametrize("ending", ["cancelled", "failed", "closed"])
def test_whoever_computes_may_go_away(
    engine: Engine, tiny_checkpoint: Callable[..., Path], ending: str
) -> None:
    """The others compute the beginning themselves: once, from where it was left."""
    reached = threading.Event()
    prompts = [(*SHARED, 1), (*SHARED, 2), (*SHARED, 3)]

    with engine.open_session() as first, engine.open_session() as b, engine.open_session() as c:

        def on_event(event: StepEvent) -> None:
            reached.set()
            if ending == "failed" and isinstance(event, Prefilled):
                raise RuntimeError("the one who computes fails")

        with engine.lock:
            leader = engine.submit(first, StepRequest(prompts[0], 6, ignore_eos=True), on_event)
            others = [
                engine.submit(session, StepRequest(prompt, 6, ignore_eos=True))
                for session, prompt in ((b, prompts[1]), (c, prompts[2]))
            ]
        if ending == "cancelled":
            leader.cancel()
            assert leader.result().finish_reason is FinishReason.CANCELLED
        elif ending == "closed":
            first.close()
        else:
            assert reached.wait(60)
            with pytest.raises(RuntimeError, match="fails"):
                leader.result()
        for handle, prompt in zip(others, prompts[1:], strict=True):
            assert handle.result().token_ids == alone(tiny_checkpoint, prompt).token_ids
        assert computed(others)[1] == 1


def test_nobody_waits_for_a_less_urgent_step(crowd: Crowd) -> None:
    prompts = [(*SHARED, 1), (*SHARED, 2)]
    urgency = (Urgency.BACKGROUND, Urgency.INTERACTIVE)
    background, interactive = crowd.submit(*prompts, urgency=urgency)
    # The urgent one is admitted first and leads; the other way round it would wait.
    assert computed([interactive, background]) == [301, 1]


def test_who_waits_can_be_cancelled_and_closed(crowd: Crowd) -> None:
    leader, second, third = crowd.submit((*SHARED, 1), (*SHARED, 2), (*SHARED, 3))
    second.cancel()
    assert second.result().finish_reason is FinishReason.CANCELLED
    crowd.sessions[2].close()
    assert third.result().finish_reason is FinishReason.CANCELLED
    assert len(leader.result().token_ids) == 6


def test_closing_the_engine_ends_who_waits(tiny_checkpoint: Callable[..., Path]) -> None:
    engine = Engine.load(tiny_checkpoint("qwen3"), threads=1, limits=SLOW)
    crowd = Crowd(engine)
    handles = crowd.submit((*SHARED, 1), (*SHARED, 2))
    engine.close()
    assert {handle.result().finish_reason for handle in handles} <= {
        FinishReason.CANCELLED,
        FinishReason.LENGTH,
    }
