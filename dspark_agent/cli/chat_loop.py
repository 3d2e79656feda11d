"""A chat's loop: lines from the terminal, answers from the model's thread, and Ctrl-C between.

The model and the tools run on an event loop in a thread of its own. This thread, the only one that
reads the terminal and is told of Ctrl-C, waits at the :class:`Desk` for what they want of it.
"""

from __future__ import annotations

from collections.abc import Container
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from rich.markup import escape

from dspark_agent.cli.boundary import is_expected
from dspark_agent.cli.chat_commands import COMMANDS, Leave, Talk, run_command
from dspark_agent.cli.console import err, out, plain
from dspark_agent.cli.line_input import complete, read_line
from dspark_agent.cli.steps_view import StepsView
from dspark_agent.deferred import (
    DeferredToolRequests,
    DeferredToolResults,
    ToolApproved,
    ToolDenied,
)
from dspark_agent.history import History
from dspark_agent.limits import RunUsage, UsageLimits
from dspark_agent.messages import ToolCallPart, open_calls
from dspark_agent.models.bridge import ThreadBridge

if TYPE_CHECKING:
    from anyio.from_thread import BlockingPortal

    from dspark_agent.agent import Agent
    from dspark_agent.session import Session

_STOPPED = ToolDenied(message="not allowed: the user stopped the answer")
Output = str | DeferredToolRequests


@dataclass(frozen=True, slots=True)
class _Question:
    """A tool call that waits for the user's word."""

    call: ToolCallPart
    answer: ThreadBridge[ToolApproved | ToolDenied]


class _Ended:
    """The answer is over, whichever way."""


@dataclass(slots=True)
class Desk:
    """Where the model's thread leaves what the terminal's thread has to see to.

    The calls of tools in ``free`` are not asked about, nor those in ``allowed``, which grows.
    """

    free: Container[str] = ()
    inbox: SimpleQueue[_Question | _Ended] = field(default_factory=SimpleQueue)
    allowed: set[str] = field(default_factory=set)

    def asks(self, tool_name: str | None) -> bool:
        """Whether calls of the tool wait for the user's word."""
        return tool_name not in self.free and tool_name not in self.allowed

    async def decided(self, requests: DeferredToolRequests) -> DeferredToolResults:
        """What the user says to the calls, asked one after the other."""
        approvals: dict[str, bool | ToolApproved | ToolDenied] = {}
        for call in requests.approvals:
            approvals[call.tool_call_id] = await self._asked(call)
        return DeferredToolResults(approvals=approvals)

    async def _asked(self, call: ToolCallPart) -> ToolApproved | ToolDenied:
        if not self.asks(call.tool_name):  # "always" was the word for the call before
            return ToolApproved()
        question = _Question(call, ThreadBridge())
        self.inbox.put(question)
        (answer,) = await question.answer.get_all()
        return answer


class Chat:
    """Conversations of one agent with one user."""

    def __init__(
        self,
        agent: Agent[Any, Output],
        portal: BlockingPortal,
        desk: Desk,
        *,
        answer_limits: UsageLimits,
    ) -> None:
        self._agent = agent
        self._portal = portal
        self._desk = desk
        self._limits = answer_limits

    def talk(self, start: History | None) -> None:
        """Converse until the user leaves; ``start`` is a conversation to go on from."""
        complete([f"/{name}" for name in COMMANDS])
        following: History | None = start or History()
        while following is not None:
            following = self._conversation(following)

    def _conversation(self, start: History) -> History | None:
        """One conversation; what the next one starts from, None when the user leaves."""
        opened = self._agent.session(history=start, on_event=StepsView(out(), headings=False))
        with self._portal.wrap_async_context_manager(opened) as session:
            talk = Talk(session, self._portal, self._agent.tools, self._desk.asks, ask=self._answer)
            warned = False
            while True:
                try:
                    said = read_line("> ").strip()
                except EOFError:
                    out().print()
                    return None
                except KeyboardInterrupt:
                    if warned:
                        raise
                    warned = True
                    err().print("\n[note]Ctrl-C again, Ctrl-D or /quit leaves[/]")
                    continue
                warned = False
                if not said:
                    continue
                if not said.startswith("/"):
                    talk.say(said)
                elif isinstance(left := run_command(talk, said), Leave):
                    return left.following

    def _answer(self, session: Session[Any, Output], said: str) -> None:
        """One answer, with its tools; Ctrl-C or an error leaves a conversation to go on with."""
        before = len(session.steps)
        work = self._portal.start_task_soon(self._run, session, said)
        try:
            self._attend()
            error = work.exception()
        except KeyboardInterrupt:
            self._stop(work)
            _note_what_stands("stopped", len(session.steps) - before)
            return
        if error is None:
            return
        if not (isinstance(error, Exception) and is_expected(error)):
            raise error
        err().print(f"[bad]error:[/] {escape(str(error))}", soft_wrap=True)
        _note_what_stands("ended", len(session.steps) - before)

    async def _run(self, session: Session[Any, Output], said: str) -> None:
        """Run to an answer, through every pause; calls that an answer stopped at are refused."""
        stopped = {call.tool_call_id: _STOPPED for call in open_calls(session.messages)}
        decided = DeferredToolResults(approvals={**stopped}) if stopped else None
        prompt: str | None = said
        before = session.usage.requests
        try:
            while True:
                limits = self._limits_after(session.usage.requests - before)
                result = await session.run(prompt, limits=limits, deferred_tool_results=decided)
                if not isinstance(result.output, DeferredToolRequests):
                    return
                self._limits.check_request(RunUsage(requests=session.usage.requests - before))
                decided, prompt = await self._desk.decided(result.output), None
        finally:
            self._desk.inbox.put(_Ended())

    def _limits_after(self, turns: int) -> UsageLimits:
        """What is left of an answer's limits after so many turns."""
        most = self._limits.request_limit
        return replace(self._limits, request_limit=None if most is None else most - turns)

    def _attend(self) -> None:
        """See to the questions of an answer until it is over."""
        while isinstance(item := self._desk.inbox.get(), _Question):
            item.answer.put(self._decide(item.call))

    def _decide(self, call: ToolCallPart) -> ToolApproved | ToolDenied:
        out().print(plain(f"   {call.tool_name} {call.args_json()}", "yellow"), soft_wrap=True)
        try:
            word = read_line("   allow? yes, always, or no and why: ").strip()
        except EOFError:
            return ToolDenied(message="not allowed: nobody is there to allow it")
        match word.lower():
            case "y" | "yes":
                return ToolApproved()
            case "a" | "always":
                self._desk.allowed.add(call.tool_name)
                return ToolApproved()
            case "" | "n" | "no":
                return ToolDenied(message="not allowed: the user said no")
        return ToolDenied(message=f"not allowed: the user said: {word}")

    def _stop(self, work: Future[None]) -> None:
        """Cancel the answer and wait until it has let go of the session."""
        work.cancel()
        while isinstance(item := self._desk.inbox.get(), _Question):
            item.answer.put(_STOPPED)


def _note_what_stands(how: str, steps: int) -> None:
    stands = "the conversation is as it was before this question"
    if steps:
        stands = f"what was done before stands ({steps} {'step' if steps == 1 else 'steps'})"
    err().print(f"\n[note]{how}; {stands}[/]")
