"""What a session is inside: its conversation with the model, and the guards around every turn."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Generic, TypeVar
from uuid import uuid4

import anyio

from dspark_agent import budget
from dspark_agent.account import Account, Work
from dspark_agent.asking import say_format
from dspark_agent.branching import branch
from dspark_agent.compacting import compact, make_room
from dspark_agent.context import DepsT, RunContext
from dspark_agent.conversation import Conversation
from dspark_agent.declaration import Declaration
from dspark_agent.deferred import DeferredToolResults
from dspark_agent.errors import ContextLengthError, SessionClosedError, UserError
from dspark_agent.events import CompactionReason
from dspark_agent.history import History
from dspark_agent.journal.entries import RunBegun
from dspark_agent.journal.record import RunRecord
from dspark_agent.journal.session import RecordedSession
from dspark_agent.limits import RunUsage, UsageLimits
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
        observers = tuple(declaration.observers)
        self.watch = Watch(declaration.name, model.name, model.provider, uuid4().hex, observers)
        self.conversation = Conversation()
        self.account = Account(parent)
        self._model_session: ModelSession | None = None
        self._token_log: tuple[int, ...] | None = None
        self.widest = ModelTurn()
        """What a turn may emit that nothing narrows: the model session was opened with it."""
        self.epoch = 0
        """How often the model session was replaced: marks of an older one mean nothing to it."""
        self._busy = False

    # -- open, copy, close ---------------------------------------------------------------------

    async def open(
        self, history: History, output_type: Any = UNSET, onto: Conversation | None = None
    ) -> None:
        """Open the model's side; go on from ``history`` (from its token log where that fits).

        ``output_type`` is that of the steps to come, the agent's own when left out; ``onto`` a
        conversation whose steps were taken before. With a journal, the model is opened when a turn
        needs it.
        """
        widest = self.plan(output_type=output_type, tools=tuple(self.runner.tools)).turn
        self.widest = replace(widest, agent=self.declaration.name)
        resumes = history.resumes(self.model.name, self.widest.tool_names)
        token_log = history.token_log if resumes else None
        conversation = replace(
            onto or Conversation(),
            messages=list(history.messages),
            sent=history.logged_messages if resumes else 0,
            context_tokens=len(token_log or ()),
            run_begin=len(history.messages),
        )
        self.start(await self._open_session(conversation, token_log), conversation, self.limits)

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

    def sibling(self, parent: RunContext[Any] | None) -> Core[DepsT]:
        """The same agent on the same model, as part of ``parent``; :meth:`start` gives it a
        conversation."""
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

    def start(
        self,
        model_session: ModelSession,
        conversation: Conversation,
        limits: UsageLimits | None,
    ) -> None:
        """Begin with a conversation that ``model_session`` knows, under ``limits``."""
        self._model_session = model_session
        self.conversation = conversation
        if limits is not None:
            self.account.limit(limits)

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
    def usage(self) -> RunUsage:
        return self.account.usage

    def work(
        self, limits: UsageLimits | None, outer: Work | None = None
    ) -> AbstractContextManager[Work]:
        """Work under limits: see :meth:`Account.work`."""
        return self.account.work(limits, outer)

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
        with self.exclusive():
            if epoch != self.epoch:
                await self.reopen(replace(conversation.copy(), sent=0))
                return
            await self.model_session.rollback(model_mark)
            self.conversation = conversation.copy()

    # -- guards --------------------------------------------------------------------------------

    @asynccontextmanager
    async def whole_or_not_at_all(self) -> AsyncIterator[None]:
        """What happens inside is undone when it raises (cancellation included)."""
        with self.exclusive():
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
            with self.exclusive():
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
                with self.exclusive():
                    if not await compact(self, work, policy, CompactionReason.OVERFLOW):
                        raise

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """One step (or fork) at a time.

        Raises:
            SessionClosedError: another is in flight.
        """
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

            return Session(await branch(self, ctx, before, model_mark), History())

        return replace(ctx, forker=fork)

    async def take(
        self, plan: StepPlan, work: Work, attempt: int, settled: StepTrace | None = None
    ) -> StepResult[Any]:
        """One turn: see :meth:`TurnTaker.take`."""
        say_format(self.conversation, plan)
        return await self._taker().take(
            self.conversation,
            plan,
            ctx=self._forkable(work),
            budgets=work.budgets,
            attempt=attempt,
            settled=settled,
        )
