"""A model session that asks the journal first and the model second."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from dspark_agent.errors import JournalError
from dspark_agent.journal.entries import ModelOutput, TokenLog, fingerprint, growth
from dspark_agent.journal.record import RunRecord
from dspark_agent.messages import ModelRequest, ModelResponse, TextPart, ToolCallPart
from dspark_agent.models.base import (
    CallChunk,
    CallEnd,
    CallStart,
    Emit,
    ModelSession,
    ModelTurn,
    TextChunk,
)

OpenModel = Callable[[TokenLog], Awaitable[ModelSession]]
"""Opens the model's side, resuming a token log (or none)."""


@dataclass(frozen=True, slots=True)
class _Mark:
    said: int
    heard: int
    step: int
    log: TokenLog
    live: ModelSession | None
    live_mark: object


class RecordedSession(ModelSession):
    """One conversation whose responses are in a journal, or go there.

    The model is opened at the first turn that the journal does not have, from the token log that
    the recorded turns left, if they are ``log_owner``'s. The first turn is that of ``step``;
    ``said`` are the messages, ``log`` the tokens, that the conversation begins with. A fork has no
    ``record``; marks of what it was forked from are its own, too.
    """

    def __init__(
        self,
        record: RunRecord | None,
        open_model: OpenModel,
        *,
        step: int,
        said: Sequence[ModelRequest | ModelResponse],
        log: TokenLog,
        log_owner: str,
    ) -> None:
        self._record = record
        self._open_model = open_model
        self._log_owner = log_owner
        self._said = list(said)
        self._log = log
        self._step = step
        self._live: ModelSession | None = None
        self._origin: ModelSession | None = None
        self._heard = 0

    @property
    def token_log(self) -> TokenLog:
        return self._log

    @property
    def context_window(self) -> int | None:
        return None if self._live is None else self._live.context_window

    @property
    def is_recorded(self) -> bool:
        """Whether the journal has the next turn."""
        return self._known() is not None

    def _known(self) -> ModelOutput | None:
        return None if self._record is None else self._record.find(ModelOutput, self._step)

    async def step(
        self, messages: Sequence[ModelRequest | ModelResponse], turn: ModelTurn, emit: Emit
    ) -> ModelResponse:
        request = fingerprint(messages, turn)
        known = self._known()
        if known is None:
            output = await self._ask(messages, turn, emit, request)
            heard = len(self._said) + len(messages) + 1
        else:
            self._check(known, request)
            await self._leave()
            await _emit_again(known.response, emit)
            output, heard = known, 0
        self._said += [*messages, output.response]
        self._heard = heard
        self._log = output.log_after(self._log, self._log_owner)
        self._step += 1
        return output.response

    async def _ask(
        self,
        messages: Sequence[ModelRequest | ModelResponse],
        turn: ModelTurn,
        emit: Emit,
        request: str,
    ) -> ModelOutput:
        live = await self.live()
        response = await live.step([*self._said[self._heard :], *messages], turn, emit)
        kept, tokens = growth(self._log, live.token_log)
        output = ModelOutput(
            step=self._step,
            request=request,
            response=response,
            log_owner=self._log_owner,
            kept=kept,
            tokens=tokens,
        )
        if self._record is not None:
            await self._record.write(output)
        return output

    async def live(self) -> ModelSession:
        """The model's side, opened if it was not."""
        if self._live is None:
            self._live = await self._open_model(self._log)
            self._heard = len(self._said) if self._log else 0
        return self._live

    async def anticipate(self, calls: Sequence[ToolCallPart], turn: ModelTurn) -> None:
        if self._live is not None:
            await self._live.anticipate(calls, turn)

    def _check(self, known: ModelOutput, request: str) -> None:
        assert self._record is not None
        if known.request != request:
            raise JournalError(
                f"{self._record.where}: what the model is asked in step {self._step} is not what "
                "it was asked when its answer was recorded: the agent's code (tools, output type, "
                "the steps taken) has changed; go on with the code that began the run, or begin "
                "another"
            )

    async def _leave(self) -> None:
        """Close the model's side, which has not heard what is recorded."""
        live, self._live, self._heard = self._live, None, 0
        if live is not None:
            await live.close()

    def mark(self) -> object:
        live_mark = None if self._live is None else self._live.mark()
        return _Mark(len(self._said), self._heard, self._step, self._log, self._live, live_mark)

    async def rollback(self, mark: object) -> None:
        assert isinstance(mark, _Mark)
        del self._said[mark.said :]
        self._step, self._log = mark.step, mark.log
        own = mark.live is not None and (mark.live is self._live or mark.live is self._origin)
        if self._live is not None and own:
            await self._live.rollback(mark.live_mark)
            self._heard = mark.heard
        else:
            await self._leave()

    async def fork(self) -> ModelSession:
        """A copy that is not recorded: what it is used for (a summary, a tool) is, as a whole."""
        child = RecordedSession(
            None,
            self._open_model,
            step=self._step,
            said=self._said,
            log=self._log,
            log_owner=self._log_owner,
        )
        if self._live is not None:
            child._live, child._origin = await self._live.fork(), self._live
            child._heard = self._heard
        return child

    async def close(self) -> None:
        await self._leave()


async def _emit_again(response: ModelResponse, emit: Emit) -> None:
    """The events of a recorded response: each part whole."""
    index = 0
    for part in response.parts:
        if isinstance(part, TextPart):
            if part.content:
                await emit(TextChunk(part.content))
            continue
        await emit(CallStart(index, part.tool_name))
        await emit(CallChunk(index, part.args_json()))
        await emit(CallEnd(index, part))
        index += 1
