"""Sets of tools: what agents share, and what the decorators of an agent fill."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Concatenate, Generic, ParamSpec, Protocol, TypedDict, TypeVar, overload

from typing_extensions import Unpack

from dspark_agent.context import DepsT, DepsT_contra, RunContext
from dspark_agent.errors import UserError
from dspark_agent.tools import ApprovalRule, Tool

P = ParamSpec("P")
R = TypeVar("R")


class ToolOptions(TypedDict, total=False):
    """Keywords of :class:`~dspark_agent.Tool` that the decorators take too."""

    name: str
    description: str
    retries: int
    timeout: float
    sequential: bool
    requires_approval: ApprovalRule
    idempotent: bool


class ToolDecorator(Protocol):
    """A decorator that registers a function and gives it back unchanged."""

    def __call__(self, function: Callable[P, R], /) -> Callable[P, R]: ...


class ContextToolDecorator(Protocol[DepsT]):
    """The same for functions whose first parameter is the :class:`RunContext`."""

    def __call__(
        self, function: Callable[Concatenate[RunContext[DepsT], P], R], /
    ) -> Callable[Concatenate[RunContext[DepsT], P], R]: ...


class FunctionToolset(Generic[DepsT_contra]):
    """Tools that belong together, for one agent or several.

    ``timeout`` (seconds) and ``retries`` are the defaults of its tools, before the agent's own.
    """

    def __init__(
        self,
        tools: Iterable[Tool[DepsT_contra] | Callable[..., Any]] = (),
        *,
        id: str | None = None,
        timeout: float | None = None,
        retries: int | None = None,
    ) -> None:
        self.id = id
        self._timeout = timeout
        self._retries = retries
        self._tools: dict[str, Tool[DepsT_contra]] = {}
        for item in tools:
            self.add(item)

    @property
    def tools(self) -> Mapping[str, Tool[DepsT_contra]]:
        """The tools by name, in the order in which they were added."""
        return self._tools

    def add(
        self, tool: Tool[DepsT_contra] | Callable[..., Any], **options: Unpack[ToolOptions]
    ) -> None:
        """Add a tool, or a function with the ``options`` of :class:`Tool`.

        Raises:
            UserError: its name is taken.
            SchemaError: the function cannot be described to a model.
        """
        if not isinstance(tool, Tool):
            tool = Tool(tool, **options)
        elif options:
            raise UserError(f"{tool.name!r} is a Tool already: set its options where it is made")
        if tool.name in self._tools:
            raise UserError(f"two tools are called {tool.name!r}; give one another name=")
        self._tools[tool.name] = tool.with_defaults(timeout=self._timeout, retries=self._retries)

    def approval_required(self, rule: ApprovalRule = True) -> FunctionToolset[DepsT_contra]:
        """A copy whose calls wait for approval where ``rule`` (as of :class:`Tool`), or a tool's
        own, says so."""
        copied: FunctionToolset[DepsT_contra] = FunctionToolset(id=self.id)
        for tool in self._tools.values():
            copied.add(tool.with_approval(rule))
        return copied

    @overload
    def tool(
        self, function: Callable[Concatenate[RunContext[DepsT_contra], P], R], /
    ) -> Callable[Concatenate[RunContext[DepsT_contra], P], R]: ...
    @overload
    def tool(self, /, **options: Unpack[ToolOptions]) -> ContextToolDecorator[DepsT_contra]: ...
    def tool(self, function: Any = None, /, **options: Unpack[ToolOptions]) -> Any:
        """Decorator: add a function that takes the :class:`RunContext` first."""
        return self.decorator(function, options, takes_ctx=True)

    @overload
    def tool_plain(self, function: Callable[P, R], /) -> Callable[P, R]: ...
    @overload
    def tool_plain(self, /, **options: Unpack[ToolOptions]) -> ToolDecorator: ...
    def tool_plain(self, function: Any = None, /, **options: Unpack[ToolOptions]) -> Any:
        """Decorator: add a function that does not take the context."""
        return self.decorator(function, options, takes_ctx=False)

    def decorator(self, function: Any, options: ToolOptions, *, takes_ctx: bool) -> Any:
        """What is behind the decorators, the agent's own included."""

        def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
            self.add(Tool(function, takes_ctx=takes_ctx, **options))
            return function

        return decorate if function is None else decorate(function)
