"""One agent at the service of another: as a tool that answers, or as the one who takes over."""

from __future__ import annotations

from types import NoneType
from typing import TYPE_CHECKING, Annotated, Any, TypedDict

import anyio
from pydantic import Field

from dspark_agent.context import DepsT, RunContext
from dspark_agent.deferred import DeferredToolRequests
from dspark_agent.errors import (
    DeadlineExceeded,
    ToolFailed,
    UnexpectedModelBehavior,
    UsageLimitExceeded,
    UserError,
)
from dspark_agent.tools import Tool

if TYPE_CHECKING:
    from dspark_agent.agent import Agent

Prompt = Annotated[str, Field(description="The task, with everything needed to do it.")]
Reason = Annotated[str, Field(description="Why the other agent should take over.")]


class Handoff(Tool[DepsT]):
    """A tool that hands the conversation over to ``agent``: it goes on from there, with its own
    instructions, tools and output type, and gives the run's output.

    Works in runs of an agent (:meth:`Agent.run` and its kin), not in sessions of one.

    Args:
        agent: who takes over. Its output type should be that of the agent it takes over from.
        name: of the tool; ``transfer_to_<the agent's name>`` by default.
        description: when to hand over, for the model.
    """

    def __init__(
        self,
        agent: Agent[DepsT, Any] | Agent[None, Any],
        *,
        name: str | None = None,
        description: str | None = None,
    ) -> None:
        async def transfer(reason: Reason) -> str:
            return f"Transferred to {agent.name}."

        super().__init__(
            transfer,
            name=name or f"transfer_to_{agent.name}",
            description=description or f"Let the agent {agent.name!r} take over.",
            idempotent=True,
        )
        self.agent = agent


class DelegateOptions(TypedDict, total=False):
    """Keywords of :class:`~dspark_agent.Tool` that :meth:`Agent.as_tool` takes too."""

    name: str
    retries: int
    timeout: float
    sequential: bool


def agent_as_tool(agent: Agent[Any, Any], description: str, options: DelegateOptions) -> Tool[Any]:
    """See :meth:`Agent.as_tool`."""
    takes_deps = agent._declaration.deps_type is not NoneType

    async def ask(ctx: RunContext[Any], prompt: Prompt) -> Any:
        try:
            result = await agent.run(prompt, deps=ctx.deps if takes_deps else None, parent=ctx)
        except UnexpectedModelBehavior as error:
            raise ToolFailed(f"{agent.name} came to no answer: {error}") from error
        except UsageLimitExceeded as error:
            if any(error.limits is budget.limits for budget in ctx.budgets):
                raise  # the limit is the whole run's, not this agent's
            raise ToolFailed(f"{agent.name} came to no answer: {error}") from error
        except DeadlineExceeded as error:
            if anyio.current_time() >= ctx.deadline:
                raise
            raise ToolFailed(f"{agent.name} came to no answer: {error}") from error
        if isinstance(result.output, DeferredToolRequests):
            raise UserError(
                f"agent {agent.name!r} waits for an approval, which a tool cannot do: ask for "
                "the approval of its call, as in agent.as_tool(...).with_approval(True)"
            )
        return result.output

    given: DelegateOptions = {"name": agent.name, **options}
    return Tool(ask, description=description, takes_ctx=True, **given)
