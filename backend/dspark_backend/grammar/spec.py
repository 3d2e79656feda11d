"""What one model turn may emit, and what it emitted: values."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from dspark_backend.errors import RequestError
from dspark_backend.request import StepKind

ToolSchema: TypeAlias = Mapping[str, Any]
"""A function the model may call: OpenAI's form, ``{"type": "function", "function": {"name",
"description", "parameters"}}``, or the inner object alone."""

ToolChoice: TypeAlias = Literal["auto", "required", "none"] | Mapping[str, str]
"""``{"name": ...}`` means exactly one call, of that tool."""

_TOOL_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")


@dataclass(frozen=True, slots=True)
class TurnSpec:
    """What a turn may emit: tool calls and/or a typed result and/or text.

    ``auto`` allows tool calls beside whatever else is allowed, ``required`` demands them (neither a
    result nor text will do), ``none`` forbids them. ``output_schema`` allows a JSON value of that
    schema as the whole turn; ``allow_text`` allows free text, also in front of tool calls.
    With ``parallel_tool_calls`` a turn may hold up to ``max_calls`` calls, otherwise one.

    Raises:
        RequestError: the parts contradict each other or name a tool that is not there.
    """

    tools: tuple[ToolSchema, ...] = ()
    tool_choice: ToolChoice = "auto"
    output_schema: Mapping[str, Any] | None = None
    allow_text: bool = True
    parallel_tool_calls: bool = False
    max_calls: int = 8

    def __post_init__(self) -> None:
        names = [tool_function(tool)["name"] for tool in self.tools]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise RequestError(f"two tools are named {twice[0]!r}: rename one of them")
        if self.max_calls < 1:
            raise RequestError(f"max_calls is {self.max_calls}: a turn needs room for one call")
        choice = self.tool_choice
        if isinstance(choice, Mapping):
            if set(choice) != {"name"} or choice["name"] not in names:
                raise RequestError(
                    f"tool_choice {dict(choice)!r} names none of the tools {names}: use"
                    ' {"name": <tool>}'
                )
        elif choice not in ("auto", "required", "none"):
            raise RequestError(
                f"tool_choice {choice!r} is unknown: use 'auto', 'required', 'none' or a name"
            )
        elif choice == "required" and not names:
            raise RequestError("tool_choice is 'required' but there are no tools")
        if not (self.allow_text or self.callable_tools or self.output_schema is not None):
            raise RequestError(
                "the turn may emit nothing: allow text, give an output schema or offer tools"
            )

    @property
    def callable_tools(self) -> tuple[Mapping[str, Any], ...]:
        """The functions (inner objects) that this turn may call."""
        functions = tuple(tool_function(tool) for tool in self.tools)
        if self.tool_choice == "none":
            return ()
        if isinstance(self.tool_choice, Mapping):
            return tuple(f for f in functions if f["name"] == self.tool_choice["name"])
        return functions

    @property
    def calls_only(self) -> bool:
        """Whether the turn has to be tool calls."""
        return self.tool_choice != "auto" and self.tool_choice != "none"

    @property
    def may_write_text(self) -> bool:
        """Whether free text is a legal turn."""
        return self.allow_text and not self.calls_only

    @property
    def result_schema(self) -> Mapping[str, Any] | None:
        """The schema of the typed result, where one is a legal turn."""
        return None if self.calls_only else self.output_schema

    @property
    def call_limit(self) -> int:
        """The most calls that the turn may hold."""
        if not self.callable_tools:
            return 0
        named = isinstance(self.tool_choice, Mapping)
        return self.max_calls if self.parallel_tool_calls and not named else 1

    @property
    def kind(self) -> StepKind:
        """What the model writes in such a turn."""
        kinds = [
            kind
            for kind, allowed in (
                (StepKind.TOOL_CALL, bool(self.callable_tools)),
                (StepKind.TYPED_RESULT, self.result_schema is not None),
                (StepKind.TEXT, self.may_write_text),
            )
            if allowed
        ]
        return kinds[0] if len(kinds) == 1 else StepKind.MIXED


@dataclass(frozen=True, slots=True)
class ParsedCall:
    """One tool call as the model wrote it."""

    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True, slots=True)
class ParsedTurn:
    """A whole turn. ``text`` has no whitespace before tool calls; ``object`` is the typed result,
    when ``has_object`` says that the turn was one."""

    text: str = ""
    tool_calls: tuple[ParsedCall, ...] = ()
    object: Any = None
    has_object: bool = False


def tool_function(tool: ToolSchema) -> Mapping[str, Any]:
    """The inner object of a tool schema in either form.

    Raises:
        RequestError: it has neither form, or a name that chat templates cannot carry.
    """
    function = tool.get("function", tool) if isinstance(tool, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise RequestError(f"a tool schema needs a function with a name, got {tool!r}")
    if not _TOOL_NAME.fullmatch(function["name"]):
        raise RequestError(
            f"the tool name {function['name']!r} does not match [A-Za-z0-9_.-]{{1,64}}"
        )
    parameters = function.get("parameters", {})
    if not isinstance(parameters, Mapping):
        raise RequestError(f"the parameters of tool {function['name']!r} are no JSON Schema")
    return function


def openai_tools(tools: Sequence[ToolSchema]) -> list[dict[str, Any]]:
    """``tools`` in OpenAI's form, which is the one that chat templates know."""
    return [
        dict(tool) if "function" in tool else {"type": "function", "function": dict(tool)}
        for tool in tools
        if tool_function(tool)
    ]
