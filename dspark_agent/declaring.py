"""What an agent is made of: its options, and the decorators that add to it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Concatenate, Generic, ParamSpec, Self, TypedDict, TypeVar, overload

from typing_extensions import Unpack

from dspark_agent.compaction import Compaction
from dspark_agent.context import DepsT, RunContext
from dspark_agent.declaration import Declaration
from dspark_agent.hooks import Hooks
from dspark_agent.limits import UsageLimits
from dspark_agent.observer import Observer
from dspark_agent.settings import ModelSettings
from dspark_agent.tools import Tool
from dspark_agent.toolset import (
    ContextToolDecorator,
    FunctionToolset,
    ToolDecorator,
    ToolOptions,
)

P = ParamSpec("P")
R = TypeVar("R")
F = TypeVar("F", bound=Callable[..., Any])


class AgentOptions(TypedDict, Generic[DepsT], total=False):
    """Keywords of an agent besides its output type; see :class:`Agent`."""

    instructions: str | Sequence[str]
    deps_type: type[DepsT]
    name: str | None
    tools: Sequence[Tool[DepsT] | Callable[..., Any]]
    toolsets: Sequence[FunctionToolset[DepsT]]
    hooks: Sequence[Hooks[DepsT]]
    compaction: Compaction | None
    model_settings: ModelSettings | None
    retries: int
    output_retries: int | None
    tool_timeout: float | None
    limits: UsageLimits | None


class Declaring(Generic[DepsT]):
    """The decorators of an :class:`Agent`."""

    _declaration: Declaration[DepsT]

    @overload
    def tool(
        self, function: Callable[Concatenate[RunContext[DepsT], P], R], /
    ) -> Callable[Concatenate[RunContext[DepsT], P], R]: ...
    @overload
    def tool(self, /, **options: Unpack[ToolOptions]) -> ContextToolDecorator[DepsT]: ...
    def tool(self, function: Any = None, /, **options: Unpack[ToolOptions]) -> Any:
        """Decorator: a function that takes the :class:`RunContext` first, as a tool."""
        return self._declaration.own_tools.decorator(function, options, takes_ctx=True)

    @overload
    def tool_plain(self, function: Callable[P, R], /) -> Callable[P, R]: ...
    @overload
    def tool_plain(self, /, **options: Unpack[ToolOptions]) -> ToolDecorator: ...
    def tool_plain(self, function: Any = None, /, **options: Unpack[ToolOptions]) -> Any:
        """Decorator: a function that does not take the context, as a tool."""
        return self._declaration.own_tools.decorator(function, options, takes_ctx=False)

    def instructions(self, function: F, /) -> F:
        """Decorator: a function, ``()`` or ``(ctx)``, sync or async, whose text is added to the
        instructions when a conversation begins."""
        self._declaration.instructions.append(function)
        return function

    def output_validator(self, function: F, /) -> F:
        """Decorator: a function, ``(output)`` or ``(ctx, output)``, sync or async, that gives back
        the output (changed or not) or raises :class:`ModelRetry` with what is wrong with it."""
        self._declaration.validators.append(function)
        return function

    def input_guard(self, function: F, /) -> F:
        """Decorator: a function, ``(prompt)`` or ``(ctx, prompt)``, sync or async, that sees every
        prompt before the model does. None lets it pass; a text says why not, and stops the run
        with :class:`GuardrailTripped`."""
        self._declaration.input_guards.append(function)
        return function

    def output_guard(self, function: F, /) -> F:
        """Decorator: a function, ``(output)`` or ``(ctx, output)``, sync or async, that sees every
        output (of any type that a run or step asks for) after its validators. None lets it pass; a
        text says why not, and stops the run with :class:`GuardrailTripped`."""
        self._declaration.output_guards.append(function)
        return function

    @property
    def tools(self) -> Mapping[str, Tool[DepsT]]:
        """All its tools by name, those of its toolsets included."""
        return self._declaration.tools

    def instrument(self, observer: Observer, /) -> Self:
        """Have ``observer`` told of everything this agent does from its next run or session on,
        and of what other agents do inside its tools; gives back the agent."""
        self._declaration.observers.append(observer)
        return self
