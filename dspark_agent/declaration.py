"""What an agent declares, and the plan of a step that follows from it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic

from dspark_agent.compaction import Compaction
from dspark_agent.context import DepsT
from dspark_agent.errors import UserError
from dspark_agent.execution import ToolRunner
from dspark_agent.guards import Guard
from dspark_agent.hooks import Hooks
from dspark_agent.limits import UsageLimits
from dspark_agent.narrowing import narrowed
from dspark_agent.observer import Observer
from dspark_agent.output import Output
from dspark_agent.settings import ModelSettings, merge_settings
from dspark_agent.step import UNSET, OutputValidator, StepPlan
from dspark_agent.tools import Tool
from dspark_agent.toolset import FunctionToolset

KEPT_OUTPUTS = 64
"""How many output types of steps a declaration keeps ready."""


@dataclass(slots=True)
class Declaration(Generic[DepsT]):
    """Everything about an agent but its model. The decorators add to it."""

    name: str
    output: Output[Any]
    deps_type: type
    own_tools: FunctionToolset[DepsT]
    toolsets: tuple[FunctionToolset[DepsT], ...]
    settings: ModelSettings | None
    retries: int
    output_retries: int
    tool_timeout: float | None
    limits: UsageLimits | None
    instructions: list[str | Callable[..., Any]] = field(default_factory=list)
    validators: list[OutputValidator] = field(default_factory=list)
    hooks: tuple[Hooks[DepsT], ...] = ()
    compaction: Compaction | None = None
    input_guards: list[Guard] = field(default_factory=list)
    output_guards: list[Guard] = field(default_factory=list)
    _outputs: dict[object, Output[Any]] = field(default_factory=dict)
    observers: list[Observer] = field(default_factory=list)

    @property
    def tools(self) -> Mapping[str, Tool[DepsT]]:
        """All tools by name: the agent's own, then those of its toolsets.

        Raises:
            UserError: two have the same name.
        """
        tools: dict[str, Tool[DepsT]] = {}
        for toolset in (self.own_tools, *self.toolsets):
            for name, tool in toolset.tools.items():
                if name in tools:
                    raise UserError(
                        f"two tools are called {name!r} (the second in toolset {toolset.id!r}); "
                        "give one another name="
                    )
                tools[name] = tool
        return tools

    def runner(self) -> ToolRunner[DepsT]:
        """What runs the agent's tools."""
        return ToolRunner(
            self.tools, retries=self.retries, timeout=self.tool_timeout, hooks=self.hooks
        )

    def check_deps(self, deps: object) -> None:
        """Raise :class:`UserError` where the agent needs deps and got none."""
        if deps is None and not isinstance(None, self.deps_type):
            raise UserError(
                f"agent {self.name!r} needs deps of type {self.deps_type.__name__}; pass deps=..."
            )

    def plan(
        self,
        *,
        output_type: Any = UNSET,
        tools: Sequence[str] | None = None,
        tool_choice: str | None = None,
        args: Mapping[str, Any] | None = None,
        settings: Sequence[ModelSettings | None] = (),
        retries: int | None = None,
    ) -> StepPlan:
        """The plan of a step; what is not given follows the rules of :meth:`Session.step`.

        Raises:
            UserError: a tool is named that the agent does not have, or none is left to call.
            SchemaError: the output type cannot be described to a model.
        """
        own_output = output_type is UNSET
        if tools is None and tool_choice is None and not own_output:
            tools = ()
        names = self._choice(tools, tool_choice)
        if args and tool_choice not in names:
            raise UserError("args narrows one tool's arguments: name it with tool_choice")
        output = self.output if own_output else self._output_of(output_type)
        self.check_names(output)
        return StepPlan(
            output=output,
            tool_choice=tool_choice or ("auto" if names else "none"),
            settings=merge_settings(*settings),
            retries=self.output_retries if retries is None else retries,
            validators=tuple(self.validators) if own_output else (),
            guards=tuple(self.output_guards),
            tools=tuple(
                narrowed(tool.definition, args) if args else tool.definition
                for name, tool in self.tools.items()
                if name in names
            ),
        )

    def check_names(self, output: Output[Any]) -> None:
        """Raise :class:`UserError` where a tool has the name of an output tool."""
        for name in output.tools.keys() & self.tools.keys():
            raise UserError(
                f"agent {self.name!r}: its output_type and one of its tools are both called "
                f"{name!r}; give the output another name: ToolOutput(..., name='...')"
            )

    def _output_of(self, output_type: Any) -> Output[Any]:
        """The output type made ready; kept, since describing a type takes longer than a step's
        bookkeeping."""
        key = (output_type, str(output_type))
        try:
            known = self._outputs.get(key)
        except TypeError:  # unhashable, such as a JsonSchema
            return Output(output_type)
        if known is None:
            if len(self._outputs) == KEPT_OUTPUTS:
                self._outputs.pop(next(iter(self._outputs)))
            known = self._outputs[key] = Output(output_type)
        return known

    def _choice(self, tools: Sequence[str] | None, tool_choice: str | None) -> tuple[str, ...]:
        known = tuple(self.tools)
        if isinstance(tools, str):
            raise UserError(f"tools={tools!r}: give a list of names")
        names = known if tools is None else tuple(tools)
        named = () if tool_choice in (None, "auto", "required", "none") else (tool_choice,)
        for name in (*names, *named):
            if name not in known:
                there_are = ", ".join(known) or "none"
                raise UserError(f"agent {self.name!r} has no tool {name!r}; it has: {there_are}")
        if tool_choice == "none":
            return ()
        if tool_choice == "required" and not names:
            raise UserError("tool_choice='required' needs at least one tool to choose from")
        if named and tools is not None and tool_choice not in names:
            raise UserError(f"tool_choice={tool_choice!r} is not one of tools={list(names)}")
        return tuple(name for name in known if name in (named or names))
