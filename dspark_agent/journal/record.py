"""One run and its journal: what is in it is not done again, what is done is put in."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any, TypeVar

import anyio
import anyio.to_thread
from pydantic import ValidationError

from dspark_agent.deferred import DeferredToolResults
from dspark_agent.errors import JournalError
from dspark_agent.history import History
from dspark_agent.journal.base import Journal, RunLog
from dspark_agent.journal.calls import CallLedger
from dspark_agent.journal.entries import (
    ENTRY,
    FORMAT,
    Compacted,
    Decided,
    Instructions,
    JournalEntry,
    ModelOutput,
    RunBegun,
    RunEnded,
    StepEnded,
    ToolBegun,
    ToolEnded,
)
from dspark_agent.messages import (
    ModelRequest,
    ModelResponse,
    RetryPromptPart,
    ToolCallPart,
    ToolReturnPart,
)
from dspark_agent.step import StepResult

T = TypeVar("T")


class RunRecord:
    """The journal of one run, while the run goes on.

    ``given`` are decisions about calls that wait or were interrupted. ``interrupted`` are the
    calls that had begun in an earlier process and were run again in this one.
    """

    def __init__(
        self, log: RunLog, entries: Sequence[JournalEntry], given: DeferredToolResults | None
    ) -> None:
        self._log = log
        self._limiter = anyio.CapacityLimiter(1)
        self._entries: dict[object, JournalEntry] = {_key(entry): entry for entry in entries}
        self.given = given or DeferredToolResults()
        self.interrupted: list[ToolCallPart] = []

    @property
    def where(self) -> str:
        """The store and the run, for error messages."""
        return self._log.where

    def find(self, kind: type[T], *place: object) -> T | None:
        """The entry of that kind (at that step, or call), if it has been written."""
        entry = self._entries.get((kind, *place))
        return entry if isinstance(entry, kind) else None

    async def write(self, entry: JournalEntry) -> None:
        """Append ``entry``; a cancellation waits until it is written.

        Raises:
            JournalError: it is no JSON, or could not be written.
        """
        try:
            text = entry.model_dump_json()
        except ValueError as error:  # pydantic's own is one, and bytes that are no text another
            raise JournalError(f"{self.where}: {_named(entry)} is no JSON: {error}") from error
        with anyio.CancelScope(shield=True):
            await anyio.to_thread.run_sync(self._log.append, text, limiter=self._limiter)
        # What is used from here on is what a resumed run would read.
        self._entries[_key(entry)] = ENTRY.validate_json(text)

    # -- the run -------------------------------------------------------------------------------

    async def begin(self, begun: RunBegun | None) -> tuple[str | None, History]:
        """Write that the run begins. The prompt and the history that it begins, or began, with.

        ``begun`` None stands for whatever it began with.

        Raises:
            JournalError: there is no such run, or it began with something else.
        """
        known = self.find(RunBegun)
        if known is None:
            if begun is None:
                raise JournalError(f"{self.where}: there is no such run to resume")
            await self.write(begun)
            return begun.prompt, begun.history
        if begun is not None and begun.prompt != known.prompt:
            raise JournalError(
                f"{self.where}: the run began with the prompt {known.prompt!r}, not with "
                f"{begun.prompt!r}; give another run its own run_id"
            )
        if begun is not None and _parts(begun.history) != _parts(known.history):
            raise JournalError(
                f"{self.where}: the run began with another message_history; give another run its "
                "own run_id"
            )
        return known.prompt, known.history

    async def end(self) -> None:
        """Write that the run has its output."""
        if self.find(RunEnded) is None:
            await self.write(RunEnded())

    # -- steps ---------------------------------------------------------------------------------

    def calls_of(self, step: int, *, approved: bool = False) -> CallLedger:
        """The ledger of a step's calls: of those run at once, or of those approved later."""
        return CallLedger(self, step, approved)

    def refusal(self, step: int) -> StepEnded | None:
        """The end of a step that is taken again, if that was recorded."""
        known = self.find(StepEnded, step)
        return None if known is None or known.retry_reason is None else known

    async def step_ends(
        self, result: StepResult[Any], told: tuple[ToolReturnPart | RetryPromptPart, ...] = ()
    ) -> StepResult[Any]:
        """Write that a step is over; one that was over before has its metrics of then.

        ``told`` is what the model reads about calls of output tools.

        Raises:
            JournalError: the step was refused now and not then.
        """
        known = self.find(StepEnded, result.index)
        if known is None:
            known = StepEnded(
                step=result.index,
                retry_reason=result.retry_reason,
                told=told,
                metrics=result.metrics,
            )
            await self.write(known)
        if known.retry_reason != result.retry_reason:
            raise JournalError(
                f"{self.where}: step {result.index} is refused now ({result.retry_reason}) and was "
                "not when it was recorded: the output type or a validator has changed; go on with "
                "the code that began the run, or begin another"
            )
        return replace(result, metrics=known.metrics)

    # -- decisions -----------------------------------------------------------------------------

    def decisions(self, step: int, waiting: Sequence[ToolCallPart]) -> DeferredToolResults | None:
        """What was, or is now, decided about the calls of ``step`` that wait; None for nothing."""
        known = self.find(Decided, step)
        return self.given.about(waiting) if known is None else known.results

    async def decide(self, step: int, results: DeferredToolResults) -> None:
        """Write what is decided about the calls of ``step``, unless that is written."""
        if self.find(Decided, step) is None:
            await self.write(Decided(step=step, results=results))


def _key(entry: JournalEntry) -> tuple[object, ...]:
    match entry:
        case ToolBegun() | ToolEnded():
            return type(entry), entry.step, entry.approved, entry.index
        case Instructions() | ModelOutput() | StepEnded() | Decided():
            return type(entry), entry.step
        case Compacted():
            return Compacted, entry.number
        case RunBegun() | RunEnded():
            return (type(entry),)


def _named(entry: JournalEntry) -> str:
    if isinstance(entry, ToolEnded):
        name = getattr(entry.outcome, "tool_name", None)
        return f"what tool {name!r} returned in step {entry.step}"
    return f"the entry {entry.kind!r}"


def _parts(history: History) -> list[Any]:
    """A history's content, without the times at which it was said."""
    messages: Sequence[ModelRequest | ModelResponse] = history.messages
    return [part.model_dump(mode="json") for message in messages for part in message.parts]


@asynccontextmanager
async def recorded(
    journal: Journal | None, run_id: str | None, given: DeferredToolResults | None
) -> AsyncIterator[RunRecord | None]:
    """The record of a run in its journal, for as long as it goes on; None without a journal.

    Raises:
        JournalLockedError: somebody else is writing the run.
        JournalError: the journal cannot be read.
    """
    if journal is None or run_id is None:
        yield None
        return
    log = await _unhurried(lambda: journal.open(run_id))
    try:
        yield RunRecord(log, _parsed(log.where, await _unhurried(log.read)), given)
    finally:
        await _unhurried(log.close)


async def _unhurried(function: Callable[[], T]) -> T:
    """Call a journal's method in a thread; a cancellation waits for its end."""
    with anyio.CancelScope(shield=True):
        done = await anyio.to_thread.run_sync(function)
    return done  # noqa: RET504 - inside, a type checker would fear that the scope swallows it


def _parsed(where: str, texts: Sequence[str]) -> list[JournalEntry]:
    entries: list[JournalEntry] = []
    for number, text in enumerate(texts, start=1):
        try:
            entries.append(ENTRY.validate_json(text))
        except ValidationError as error:
            raise JournalError(
                f"{where}: entry {number} is not one that this version reads (format {FORMAT}): "
                f"{error}"
            ) from error
    return entries
