"""Tools: Python functions that a model may call."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, Self, overload

import anyio.to_thread

from dspark_agent.context import DepsT_contra, RunContext
from dspark_agent.errors import UserError
from dspark_agent.function_schema import FunctionSchema, function_schema
from dspark_agent.given_schema import given_schema

ApprovalRule = bool | Callable[..., bool | Awaitable[bool]]
"""Whether calls of a tool need approval: all, none, or those that ``(ctx, args)`` says."""

RESERVED_NAMES = frozenset({"auto", "required", "none"})
"""Values of ``tool_choice``, which no tool may be called."""


@dataclass(frozen=True, slots=True)
class ToolDefinition:
    """What a model is told about a tool. ``parameters`` is a JSON Schema of type object."""

    name: str
    description: str
    parameters: Mapping[str, Any]


class Tool(Generic[DepsT_contra]):
    """A function as a tool: its description, its arguments' schema, and how it is run.

    Args:
        function: sync (runs in a worker thread) or async. Every parameter is annotated; a first
            parameter of type :class:`RunContext` is filled in by the run and hidden from the model.
        name: what the model calls it; the function's own name by default.
        description: the docstring's text by default.
        takes_ctx: whether the first parameter is the context; None looks at its annotation.
        parameters: a JSON Schema of type object in place of the signature's: the function takes
            what fits it as keywords. ``name`` and ``description`` are then given, too.
        retries: how often in a row it may ask for a retry; None takes the agent's.
        timeout: seconds one call may take; None takes the agent's ``tool_timeout``.
        sequential: never run at the same time as another call of the same step.
        requires_approval: whether a call waits for approval before it is run; a function,
            ``(ctx, args)``, sync or async, decides for each call, from its validated arguments.
        idempotent: running a call twice is as good as once; see the guide on durable runs.

    Raises:
        SchemaError: the signature cannot be described to a model.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        *,
        name: str | None = None,
        description: str | None = None,
        takes_ctx: bool | None = None,
        parameters: Mapping[str, Any] | None = None,
        retries: int | None = None,
        timeout: float | None = None,
        sequential: bool = False,
        requires_approval: ApprovalRule = False,
        idempotent: bool = False,
    ) -> None:
        self.function = function
        self.schema: FunctionSchema = (
            function_schema(function, name=name, description=description, takes_ctx=takes_ctx)
            if parameters is None
            else given_schema(
                parameters, name=name, description=description or "", takes_ctx=bool(takes_ctx)
            )
        )
        self.name = self.schema.name
        if self.name in RESERVED_NAMES:
            raise UserError(f"a tool cannot be called {self.name!r}: it is a tool_choice")
        self.retries = retries
        self.timeout = timeout
        self.sequential = sequential
        self.requires_approval = requires_approval
        self.idempotent = idempotent
        functools.update_wrapper(self, function, updated=())

    def __repr__(self) -> str:
        return f"Tool({self.name!r})"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function itself, as undecorated code would."""
        return self.function(*args, **kwargs)

    @property
    def definition(self) -> ToolDefinition:
        """What a model is told about this tool."""
        return ToolDefinition(self.name, self.schema.description, self.schema.parameters)

    def with_defaults(self, *, timeout: float | None, retries: int | None) -> Self:
        """This tool with ``timeout`` and ``retries`` where it has none of its own."""
        tool = copy.copy(self)
        tool.timeout = timeout if self.timeout is None else self.timeout
        tool.retries = retries if self.retries is None else self.retries
        return tool

    def with_approval(self, rule: ApprovalRule) -> Self:
        """This tool, whose calls wait for approval where ``rule`` says so, besides its own."""
        tool = copy.copy(self)
        if isinstance(rule, bool) or self.requires_approval is False:
            tool.requires_approval = rule or self.requires_approval
        elif self.requires_approval is not True:

            async def either(ctx: RunContext[Any], args: Mapping[str, Any]) -> bool:
                return await self.needs_approval(ctx, args) or await _holds(rule, ctx, args)

            tool.requires_approval = either
        return tool

    async def needs_approval(
        self, ctx: RunContext[DepsT_contra], arguments: Mapping[str, Any]
    ) -> bool:
        """Whether this call, with validated ``arguments``, waits for approval."""
        return await _holds(self.requires_approval, ctx, arguments)

    async def run(self, ctx: RunContext[DepsT_contra], arguments: Mapping[str, Any]) -> Any:
        """Call the function with validated ``arguments``; in a worker thread if it is sync.

        A cancelled call of a sync function is abandoned: its thread ends when the function does
        (see :meth:`RunContext.check_cancelled`).
        """
        args, kwargs = self.schema.bind(arguments)
        if self.schema.takes_ctx:
            args.insert(0, ctx)
        if _is_async(self.function):
            result: Awaitable[Any] = self.function(*args, **kwargs)
            return await result
        call = functools.partial(self.function, *args, **kwargs)
        return await anyio.to_thread.run_sync(call, abandon_on_cancel=True)


def _is_async(function: Callable[..., Any]) -> bool:
    while isinstance(function, functools.partial):
        function = function.func
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(
        getattr(function, "__call__", None)  # noqa: B004 - an object with an async __call__
    )


async def _holds(rule: ApprovalRule, ctx: RunContext[Any], arguments: Mapping[str, Any]) -> bool:
    if isinstance(rule, bool):
        return rule
    answer = rule(ctx, arguments)
    return bool(await answer if inspect.isawaitable(answer) else answer)


@overload
def tool(function: Callable[..., Any], /) -> Tool[Any]: ...
@overload
def tool(
    *,
    name: str | None = None,
    description: str | None = None,
    retries: int | None = None,
    timeout: float | None = None,
    sequential: bool = False,
    requires_approval: ApprovalRule = False,
    idempotent: bool = False,
) -> Callable[[Callable[..., Any]], Tool[Any]]: ...
def tool(
    function: Callable[..., Any] | None = None,
    /,
    *,
    name: str | None = None,
    description: str | None = None,
    retries: int | None = None,
    timeout: float | None = None,
    sequential: bool = False,
    requires_approval: ApprovalRule = False,
    idempotent: bool = False,
) -> Tool[Any] | Callable[[Callable[..., Any]], Tool[Any]]:
    """Decorator: a function as a :class:`Tool` that several agents can use.

    >>> @tool(timeout=5)
    ... def add(a: int, b: int) -> int:
    ...     "Add two numbers."
    ...     return a + b
    """

    def decorate(function: Callable[..., Any]) -> Tool[Any]:
        return Tool(
            function,
            name=name,
            description=description,
            retries=retries,
            timeout=timeout,
            sequential=sequential,
            requires_approval=requires_approval,
            idempotent=idempotent,
        )

    return decorate if function is None else decorate(function)
