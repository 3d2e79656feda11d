"""What a session is inside: its conversation with the model, and the guards around every turn."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Generic, TypeVar
from uuid import uuid4

import anyio

from dspark_agent import budget
from dspark_agent.budget import Budget
from dspark_agent.calling import call_with_ctx
from dspark_agent.compacting import compact, make_room
from dspark_agent.context import Cancellation, DepsT, RunContext
from dspark_agent.conversation import Conversation
from dspark_agent.declaration import Declaration
from dspark_agent.deferred import DeferredToolResults
from dspark_agent.errors import (
    ContextLengthError,
    DeadlineExceeded,
    RunCancelled,
    SessionClosedError,
    UserError,
)
from dspark_agent.events import CompactionReason
from dspark_agent.guards import check_guards
from dspark_agent.history import History
from dspark_agent.journal.entries import Instructions, RunBegun
from dspark_agent.journal.record import RunRecord
from dspark_agent.journal.session import RecordedSession
from dspark_agent.limits import RunUsage, UsageLimits
from dspark_agent.messages import SystemPromptPart, UserPromptPart
from dspark_agent.models.base import Model, ModelSession, ModelTurn
from dspark_agent.observer import Watch
from dspark_agent.relay import EventHandler
from dspark_agent.settings import ModelSettings
from dspark_agent.settling import settle
from dspark_agent.step import UNSET, StepKind, StepPlan, StepResult
from dspark_agent.trace import StepTrace
from dspark_agent.turn import TurnTaker

if TYPE_CHECKING:
    from dspark_agent.session import Session

T = TypeVar("T")


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
        record: RunRecord | None = None,
        parent: RunContext[Any] | None = None,
    ) -> None:
        declaration.check_deps(deps)
        self.declaration = declaration
        self.model = model
        self.deps = deps
        self.settings = settings
        self.limits = limits
        self.on_event = on_event
        self.record = record
        self.runner = declaration.runner()
        self.watch = Watch(
            declaration.name,
            model.name,
            model.provider,
            uuid4().hex,
            tuple(declaration.observers),
        )
        self.conversation = Conversation()
        self.usage = RunUsage.part_of(None if parent is None else parent.usage)
        self._parent = parent
        self._budgets: tuple[Budget, ...] = () if parent is None else parent.budgets
        self._model_session: ModelSession | None = None
        self._token_log: tuple[int, ...] | None = None
        self.widest = ModelTurn()
        """What a turn may emit that nothing narrows: the model session was opened with it."""
        self.epoch = 0
        """How often the model session was replaced: marks of an older one mean nothing to it."""
        self._busy = False

    # -- open, copy, close ---------------------------------------------------------------------

    async def open(self, history: History, output_type: Any = UNSET) -> None:
        """Open the model's side; go on from ``history`` (from its token log where that fits).

        ``output_type`` is that of the steps to come, the agent's own when left out. With a journal,
        the model is opened when a turn needs it.
        """
        self.widest = self.plan(output_type=output_type, tools=tuple(self.runner.tools)).turn
        resumes = history.resumes(self.model.name, self.widest.tool_names)
        token_log = history.token_log if resumes else None
        conversation = replace(
            self.conversation,
            messages=list(history.messages),
            sent=history.logged_messages if resumes else 0,
            context_tokens=len(token_log or ()),
            run_begin=len(history.messages),
        )
        self._start(await self._open_session(conversation, token_log), conversation, self.limits)

    async def _open_session(
        self, conversation: Conversation, token_log: tuple[int, ...] | None
    ) -> ModelSession:
        """The model's side of ``conversation``; through the journal, where there is one."""
        if self.record is None:
            return await self._open_model(token_log)
        return RecordedSession(
            self.record,
            self._open_model,
            step=len(conversation.steps),
            said=conversation.messages[: conversation.sent],
            log=token_log,
            log_owner=" ".join((self.model.name, *self.widest.tool_names)),
        )

    async def _open_model(self, token_log: tuple[int, ...] | None) -> ModelSession:
        return await self.model.open(self.widest, token_log=token_log)

    async def begin(
        self, record: RunRecord, prompt: str | None, history: History, resume: bool
    ) -> tuple[str | None, History]:
        """Take up ``record``: the prompt and the history that the run begins with there, or began
        with. ``resume`` takes whatever it began with."""
        self.record = record
        if resume:
            return await record.begin(None)
        begun = RunBegun(
            agent=self.declaration.name,
            model_name=self.model.name,
            tool_names=tuple(self.runner.tools),
            prompt=prompt,
            history=history,
        )
        return await record.begin(begun)

    async def take_over(self, other: Core[Any], work: Work, output_type: Any) -> None:
        """Go on with the conversation of another agent, under this agent's instructions: in its
        account, its journal, and told to its observers too."""
        before = other.conversation
        self.usage = other.usage
        self.record = other.record
        self.watch = other.watch.handed_over(self.watch)
        self.conversation = replace(
            Conversation(),
            steps=list(before.steps),
            compactions=list(before.compactions),
            told=before.told,
        )
        first, *rest = before.messages
        said = [part for part in first.parts if not isinstance(part, SystemPromptPart)]
        parts = (*await self._instructions(work), *said)
        begin = [first.model_copy(update={"parts": parts})] if parts else []
        messages = (*begin, *rest)
        gone = len(before.messages) - len(messages)
        await self.open(History(messages=messages), output_type)
        self.conversation.run_begin = max(0, before.run_begin - gone)

    async def fork(self, *, shares_limits: bool = False) -> Core[DepsT]:
        """An independent copy of the conversation, which shares the model's work so far; with
        ``shares_limits``, what it uses counts here, under the limits that are in force here."""
        with self._exclusive():
            model_session = await self.model_session.fork()
        if shares_limits:
            child = self._sibling(self.context(Work(self._budgets, self._inherited())))
            child._start(model_session, self.conversation.copy(), None)
        else:
            child = self._sibling(self._parent)
            child._start(model_session, self.conversation.copy(), self.limits)
        return child

    async def _branch(
        self, ctx: RunContext[DepsT], before: Conversation, model_mark: object
    ) -> Core[DepsT]:
        """A fork in the middle of a step: the conversation as it was before, as part of ``ctx``."""
        model_session = await self.model_session.fork()
        await model_session.rollback(model_mark)
        child = self._sibling(ctx)
        child._start(model_session, before.copy(), None)
        return child

    def _sibling(self, parent: RunContext[Any] | None) -> Core[DepsT]:
        child = Core(
            self.declaration,
            self.model,
            deps=self.deps,
            settings=self.settings,
            limits=self.limits,
            on_event=self.on_event,
            parent=parent,
        )
        child.widest = self.widest
        child.epoch = self.epoch
        return child

    def _start(
        self,
        model_session: ModelSession,
        conversation: Conversation,
        limits: UsageLimits | None,
    ) -> None:
        self._model_session = model_session
        self.conversation = conversation
        if limits is not None:
            self._budgets = (*self._budgets, Budget.begin(limits, self.usage))

    async def close(self) -> None:
        """Free the model's side; the history stays readable. Idempotent."""
        if self._model_session is not None:
            self._token_log = self._model_session.token_log
        model_session, self._model_session = self._model_session, None
        if model_session is not None:
            await self.closed(model_session)

    async def closed(self, model_session: ModelSession) -> None:
        """Close a model session, whatever is being cancelled."""
        with anyio.CancelScope(shield=True):
            await model_session.close()

    async def reopen(self, conversation: Conversation) -> None:
        """Go on with ``conversation`` in a new model session, which is told all of it anew."""
        opened = await self._open_session(conversation, None)
        before, self._model_session = self.model_session, opened
        self.conversation = conversation
        self.epoch += 1
        await self.closed(before)

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
            tool_names=self.widest.tool_names or tuple(self.runner.tools),
            token_log=self._token_log if opened is None else opened.token_log,
            logged_messages=self.conversation.sent,
        )

    async def rollback(self, conversation: Conversation, model_mark: object, epoch: int) -> None:
        """Go back to a copy of the conversation and the model's mark of the same moment."""
        with self._exclusive():
            if epoch != self.epoch:
                await self.reopen(replace(conversation.copy(), sent=0))
                return
            await self.model_session.rollback(model_mark)
            self.conversation = conversation.copy()

    # -- guards --------------------------------------------------------------------------------

    @contextmanager
    def work(self, limits: UsageLimits | None, outer: Work | None = None) -> Iterator[Work]:
        """Work under ``limits``, within those of ``outer`` (or the session's, or the parent's).

        Raises:
            DeadlineExceeded: the deadline passed inside.
            RunCancelled: :meth:`RunContext.cancel` was called inside.
        """
        budgets = self._budgets if outer is None else outer.budgets
        if limits is not None:
            budgets = (*budgets, Budget.begin(limits, self.usage))
        with anyio.CancelScope(deadline=budget.deadline(budgets)) as scope:
            around = self._inherited() if outer is None else outer.cancellation
            own = around.scope is None  # nothing runs around this: cancelling ends this
            cancellation = Cancellation(scope) if own else around
            yield Work(budgets, cancellation)
        if own and cancellation.reason is not None:
            raise RunCancelled(cancellation.reason)
        if scope.cancelled_caught:
            first = min(budgets, key=lambda b: b.deadline)
            raise DeadlineExceeded(first.limits.wall_seconds or 0.0)

    def _inherited(self) -> Cancellation:
        return Cancellation() if self._parent is None else self._parent.cancellation

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

    async def committed(self, work: Work, turns: Callable[[], Awaitable[T]]) -> T:
        """What ``turns`` comes to: whole or not at all, after shortening the conversation where the
        agent's :class:`Compaction` says so.

        ``turns`` is taken again only if it failed before the model had written anything.
        """
        policy = self.declaration.compaction
        if policy is not None:
            with self._exclusive():
                await make_room(self, work, policy)
        while True:
            sent = self.conversation.sent
            try:
                async with self.whole_or_not_at_all():
                    try:
                        return await turns()
                    finally:
                        was_heard = self.conversation.sent != sent
            except ContextLengthError:
                if policy is None or was_heard:
                    raise
                with self._exclusive():
                    if not await compact(self, work, policy, CompactionReason.OVERFLOW):
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
        """The plan of a step: see :meth:`Declaration.plan`.

        Raises:
            UserError: besides, an output tool was not told to the model when the session opened.
        """
        plan = self.declaration.plan(
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
        if self.is_open:
            self._check_told(plan)
        return plan

    def _check_told(self, plan: StepPlan) -> None:
        for name, tool in plan.output.tools.items():
            if tool.definition not in self.widest.tools:
                raise UserError(
                    f"output tool {name!r} is unknown to this session: a model is told of its "
                    "tools once, at the beginning; make it the agent's (or run's) output_type, or "
                    "ask for the bare type"
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
            budgets=work.budgets,
        )

    async def ask(self, prompt: str | None, work: Work) -> None:
        """Add the instructions (before anything was said) and ``prompt`` to the conversation.

        Raises:
            UserError: there is nothing the model has to answer.
            GuardrailTripped: an input guard stops the run.
        """
        if self.conversation.has_open_calls:
            raise UserError(
                "the history ends with tool calls that have no results; decide about them with "
                "deferred_tool_results=..., add their ToolReturnParts, or leave the last response "
                "out"
            )
        if not self.conversation.messages:
            self.conversation.ask(*await self._instructions(work))
        if prompt is not None:
            guards = self.declaration.input_guards
            await check_guards(guards, self.context(work), prompt, place="input")
            self.conversation.ask(UserPromptPart(content=prompt))
        elif not self.conversation.has_news:
            raise UserError("nothing to answer: the model had the last word; give a prompt")

    async def _instructions(self, work: Work) -> list[SystemPromptPart]:
        """The agent's instructions as they are now, or as the run's journal has them: one part, or
        none."""
        step = len(self.conversation.steps)
        known = None if self.record is None else self.record.find(Instructions, step)
        if known is not None:
            text = known.text
        else:
            texts = [
                text if isinstance(text, str) else await call_with_ctx(text, self.context(work))
                for text in self.declaration.instructions
            ]
            text = "\n\n".join(text for text in texts if text)
            if self.record is not None:
                await self.record.write(Instructions(step=step, text=text))
        return [SystemPromptPart(content=text)] if text else []

    async def settle(self, results: DeferredToolResults, work: Work) -> StepTrace:
        """Carry out decisions about calls that wait: see :func:`settling.settle`.

        What the calls did outside cannot be undone, so their results stand whatever comes next.
        """
        index = len(self.conversation.steps)
        with self.watch.step(index, StepKind.TOOL_CALL, 1) as trace:
            async with self.whole_or_not_at_all():
                await settle(
                    self._taker(),
                    self.conversation,
                    results,
                    ctx=self._forkable(work),
                    budgets=work.budgets,
                    trace=trace,
                )
            return trace

    def _taker(self) -> TurnTaker[DepsT]:
        return TurnTaker(
            self.model_session,
            self.runner,
            self.on_event,
            self.usage,
            self.watch,
            self.declaration.hooks,
            self.record,
        )

    def _forkable(self, work: Work) -> RunContext[DepsT]:
        """The run as a step's functions see it: they may fork what was said before the step."""
        ctx = self.context(work)
        before, model_mark = self.conversation.copy(), self.model_session.mark()

        async def fork() -> Session[DepsT, Any]:
            from dspark_agent.session import Session  # which is made of cores

            return Session(await self._branch(ctx, before, model_mark), History())

        return replace(ctx, forker=fork)

    async def take(
        self, plan: StepPlan, work: Work, attempt: int, settled: StepTrace | None = None
    ) -> StepResult[Any]:
        """One turn: see :meth:`TurnTaker.take`."""
        self._say_format(plan)
        return await self._taker().take(
            self.conversation,
            plan,
            ctx=self._forkable(work),
            budgets=work.budgets,
            attempt=attempt,
            settled=settled,
        )

    def _say_format(self, plan: StepPlan) -> None:
        """What a PromptedOutput has to say, once a conversation."""
        prompt = plan.output.prompt
        if prompt is None or plan.needs_call or prompt in self.conversation.told:
            return
        self.conversation.told |= {prompt}
        self.conversation.ask(UserPromptPart(content=prompt))
