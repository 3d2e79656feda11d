"""What a session is inside: its conversation with the model, and the guards around every turn."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any, Generic
from uuid import uuid4

import anyio

from dspark_agent import budget
from dspark_agent.budget import Budget
from dspark_agent.context import Cancellation, DepsT, RunContext
from dspark_agent.conversation import Conversation
from dspark_agent.declaration import Declaration
from dspark_agent.errors import DeadlineExceeded, RunCancelled, SessionClosedError, UserError
from dspark_agent.history import History
from dspark_agent.limits import RunUsage, UsageLimits
from dspark_agent.messages import SystemPromptPart, UserPromptPart
from dspark_agent.models.base import Model, ModelSession
from dspark_agent.observer import Watch
from dspark_agent.relay import EventHandler
from dspark_agent.settings import ModelSettings
from dspark_agent.step import UNSET, StepPlan, StepResult
from dspark_agent.turn import TurnTaker, call_with_ctx


@dataclass(frozen=True, slots=True)
class Work:
    """A stretch of work under limits: a session's step, a run, a step of a run."""

    budgets: tuple[Budget, ...]
    cancellation: Cancellation


class Core(Generic[DepsT]):
    """One conversation of one agent with one model."""

    def __init__(
        self,
        declaration: Declaration[DepsT],
        model: Model,
        *,
        deps: DepsT,
        settings: ModelSettings | None = None,
        limits: UsageLimits | None = None,
        on_event: EventHandler | None = None,
    ) -> None:
        declaration.check_deps(deps)
        self.declaration = declaration
        self.model = model
        self.deps = deps
        self.settings = settings
        self.limits = limits
        self.on_event = on_event
        self.runner = declaration.runner()
        self.watch = Watch(
            declaration.name,
            model.name,
            model.provider,
            uuid4().hex,
            tuple(declaration.observers),
        )
        self.conversation = Conversation()
        self.usage = RunUsage()
        self._budgets: tuple[Budget, ...] = ()
        self._model_session: ModelSession | None = None
        self._token_log: tuple[int, ...] | None = None
        self._busy = False

    # -- open, copy, close ---------------------------------------------------------------------

    async def open(self, history: History) -> None:
        """Open the model's side; go on from ``history`` (from its token log where that fits)."""
        resumes = history.resumes(self.model.name, tuple(self.runner.tools))
        widest = self.plan().turn
        token_log = history.token_log if resumes else None
        model_session = await self.model.open(widest, token_log=token_log)
        sent = history.logged_messages if resumes else 0
        self._start(model_session, Conversation(messages=list(history.messages), sent=sent))

    async def fork(self) -> Core[DepsT]:
        """An independent copy of the conversation, which shares the model's work so far."""
        with self._exclusive():
            model_session = await self.model_session.fork()
        child = Core(
            self.declaration,
            self.model,
            deps=self.deps,
            settings=self.settings,
            limits=self.limits,
            on_event=self.on_event,
        )
        child._start(model_session, self.conversation.copy())
        return child

    def _start(self, model_session: ModelSession, conversation: Conversation) -> None:
        self._model_session = model_session
        self.conversation = conversation
        if self.limits is not None:
            self._budgets = (Budget.begin(self.limits, self.usage),)

    async def close(self) -> None:
        """Free the model's side; the history stays readable. Idempotent."""
        if self._model_session is not None:
            self._token_log = self._model_session.token_log
        model_session, self._model_session = self._model_session, None
        if model_session is not None:
            with anyio.CancelScope(shield=True):
                await model_session.close()

    @property
    def is_open(self) -> bool:
        return self._model_session is not None

    @property
    def model_session(self) -> ModelSession:
        """The model's side.

        Raises:
            SessionClosedError: it was not opened, or is closed.
        """
        if self._model_session is None:
            raise SessionClosedError("the session is not open; use it inside `async with`")
        return self._model_session

    def history(self) -> History:
        """The conversation as a value that serialises."""
        opened = self._model_session
        return History(
            messages=tuple(self.conversation.messages),
            model_name=self.model.name,
            tool_names=tuple(self.runner.tools),
            token_log=self._token_log if opened is None else opened.token_log,
            logged_messages=self.conversation.sent,
        )

    async def rollback(self, conversation: Conversation, model_mark: object) -> None:
        """Go back to a copy of the conversation and the model's mark of the same moment."""
        with self._exclusive():
            await self.model_session.rollback(model_mark)
            self.conversation = conversation.copy()

    # -- guards --------------------------------------------------------------------------------

    @contextmanager
    def work(self, limits: UsageLimits | None, outer: Work | None = None) -> Iterator[Work]:
        """Work under ``limits``, within those of ``outer`` (or the session's).

        Raises:
            DeadlineExceeded: the deadline passed inside.
            RunCancelled: :meth:`RunContext.cancel` was called inside.
        """
        budgets = self._budgets if outer is None else outer.budgets
        if limits is not None:
            budgets = (*budgets, Budget.begin(limits, self.usage))
        with anyio.CancelScope(deadline=budget.deadline(budgets)) as scope:
            cancellation = Cancellation(scope) if outer is None else outer.cancellation
            yield Work(budgets, cancellation)
        if outer is None and cancellation.reason is not None:
            raise RunCancelled(cancellation.reason)
        if scope.cancelled_caught:
            first = min(budgets, key=lambda b: b.deadline)
            raise DeadlineExceeded(first.limits.wall_seconds or 0.0)

    @asynccontextmanager
    async def whole_or_not_at_all(self) -> AsyncIterator[None]:
        """What happens inside is undone when it raises (cancellation included)."""
        with self._exclusive():
            before, model_mark = self.conversation.copy(), self.model_session.mark()
            try:
                yield
            except BaseException:
                self.conversation = before
                with anyio.CancelScope(shield=True):
                    await self.model_session.rollback(model_mark)
                raise

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        if self._busy:
            raise SessionClosedError(
                "the session has a step in flight: await it first, or fork() the session"
            )
        self._busy = True
        try:
            yield
        finally:
            self._busy = False

    # -- turns ---------------------------------------------------------------------------------

    def plan(
        self,
        *,
        output_type: Any = UNSET,
        tools: Sequence[str] | None = None,
        tool_choice: str | None = None,
        args: Mapping[str, Any] | None = None,
        settings: ModelSettings | None = None,
        retries: int | None = None,
    ) -> StepPlan:
        """The plan of a step: see :meth:`Declaration.plan`."""
        return self.declaration.plan(
            output_type=output_type,
            tools=tools,
            tool_choice=tool_choice,
            args=args,
            settings=(
                self.model.settings,
                self.declaration.settings,
                self.settings,
                settings,
            ),
            retries=retries,
        )

    def context(self, work: Work) -> RunContext[DepsT]:
        """The run as the agent's functions see it now."""
        return RunContext(
            deps=self.deps,
            messages=tuple(self.conversation.messages),
            usage=self.usage,
            run_step=len(self.conversation.steps),
            max_retries=self.declaration.output_retries,
            deadline=budget.deadline(work.budgets),
            cancellation=work.cancellation,
        )

    async def ask(self, prompt: str | None, work: Work) -> None:
        """Add the instructions (before anything was said) and ``prompt`` to the conversation.

        Raises:
            UserError: there is nothing the model has to answer.
        """
        if self.conversation.has_open_calls:
            raise UserError(
                "the history ends with tool calls that have no results; add their ToolReturnParts "
                "or leave the last response out"
            )
        if not self.conversation.messages:
            texts = [
                text if isinstance(text, str) else await call_with_ctx(text, self.context(work))
                for text in self.declaration.instructions
            ]
            system = "\n\n".join(text for text in texts if text)
            if system:
                self.conversation.ask(SystemPromptPart(content=system))
        if prompt is not None:
            self.conversation.ask(UserPromptPart(content=prompt))
        elif not self.conversation.has_news:
            raise UserError("nothing to answer: the model had the last word; give a prompt")

    async def take(self, plan: StepPlan, work: Work, attempt: int) -> StepResult[Any]:
        """One turn: see :meth:`TurnTaker.take`."""
        taker = TurnTaker(self.model_session, self.runner, self.on_event, self.usage, self.watch)
        return await taker.take(
            self.conversation,
            plan,
            ctx=self.context(work),
            budgets=work.budgets,
            attempt=attempt,
        )
