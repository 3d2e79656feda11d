"""What a step's answer must be: every way in which an output type can be asked for."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from types import UnionType
from typing import Any, Generic, TypeVar, Union, get_args, get_origin

import pydantic_core

from dspark_agent.calling import call_with_ctx
from dspark_agent.context import RunContext
from dspark_agent.deferred import DeferredToolRequests
from dspark_agent.errors import SchemaError, UserError
from dspark_agent.output_tool import DEFAULT_NAME, OutputTool, is_function
from dspark_agent.outputs import (
    NativeOutput,
    OutputChoice,
    PromptedOutput,
    TextOutput,
    ToolOutput,
    is_marker,
)
from dspark_agent.typed_output import Partial, TypedOutput, type_name

T = TypeVar("T")
_FENCE = re.compile(r"```(?:json)?[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL)


class Output(Generic[T]):
    """An output type, ready to be asked for and checked.

    A union with ``str`` in it (``Plan | str``) means a typed result or plain text.

    ``schema`` is a JSON Schema of type object that a model is held to, or None; ``allow_text`` says
    whether the turn may hold plain text; ``tools`` are those whose call answers, by name;
    ``prompt`` is what the model has to be told about the answer, if anything. ``allow_deferred``
    says whether the step may pause with :class:`DeferredToolRequests`, which the model is not told
    about.

    Raises:
        SchemaError: the output type cannot be asked for.
    """

    def __init__(self, output_type: Any) -> None:
        options = _Options(output_type)
        self.allow_deferred = options.deferred
        self.tools: Mapping[str, OutputTool] = _tools(options.called)
        self._text = options.text
        self._prompted = options.prompted is not None
        self._typed = TypedOutput(options.types) if options.types else None
        self.allow_text = self._text is not None or self._prompted
        self.schema: dict[str, Any] | None = None
        self.prompt: str | None = None
        if self._typed is not None and options.prompted is not None:
            schema = json.dumps(self._typed.schema)
            self.prompt = options.prompted.template.replace("{schema}", schema)
        elif self._typed is not None:
            self.schema = self._typed.schema

    def validate(self, text: str) -> T:
        """The model's text as the output type.

        Raises:
            ModelRetry: with what is wrong, in words for the model.
        """
        if self._is_text(text):
            return text  # type: ignore[return-value]
        assert self._typed is not None
        return self._typed.of_text(_unfenced(text) if self._prompted else text)  # type: ignore[no-any-return]

    async def read(self, text: str, ctx: RunContext[Any]) -> T:
        """:meth:`validate`, and what :class:`TextOutput`'s function makes of a plain text."""
        if isinstance(self._text, TextOutput) and self._is_text(text):
            value: T = await call_with_ctx(self._text.function, ctx, text)
            return value
        return self.validate(text)

    def _is_text(self, text: str) -> bool:
        if self._typed is None:
            return True
        if self._text is None:
            return False
        try:
            return not isinstance(pydantic_core.from_json(text), dict)
        except ValueError:
            return True

    @property
    def answers_in_writing(self) -> bool:
        """Whether what the model writes outside of calls can be the answer."""
        return self._typed is not None or self._text is not None

    def partial(self, text: str) -> Partial | None:
        """Read an answer that is still being written; None before there is anything to read, and
        for plain text."""
        if self._typed is None:
            return None
        return self._typed.partial(_unfenced(text) if self._prompted else text)


class _Options:
    """The options of a choice by what they are, however the choice is written."""

    def __init__(self, output_type: Any) -> None:
        self.text: type[str] | TextOutput[Any] | None = None
        self.types: list[Any] = []
        self.called: list[ToolOutput[Any]] = []
        self.prompted: PromptedOutput[Any] | None = None
        every = _flat(output_type)
        options = [option for option in every if option is not DeferredToolRequests]
        self.deferred = len(options) < len(every)
        if not options:
            raise SchemaError(
                "output_type=DeferredToolRequests is how a run pauses; say how it ends too, as in "
                "output_type=str | DeferredToolRequests"
            )
        for option in options:
            self._take(option)
        if self.prompted is not None:
            if len(options) > 1:
                raise SchemaError(
                    "PromptedOutput stands alone; put the choice into it: PromptedOutput([A, B])"
                )
            self.types = _only_types(self.prompted)

    def _take(self, option: Any) -> None:
        if option is str or isinstance(option, TextOutput):
            if self.text is not None:
                raise SchemaError(
                    "output_type: two options are plain text; nothing tells which is meant"
                )
            self.text = option
        elif isinstance(option, ToolOutput):
            self.called.append(option)
        elif is_function(option):
            self.called.append(ToolOutput(option))
        elif isinstance(option, PromptedOutput):
            self.prompted = option
        else:
            self.types.append(option)


def _flat(output_type: Any) -> list[Any]:
    if isinstance(output_type, OutputChoice):
        return [leaf for option in output_type.options for leaf in _flat(option)]
    if isinstance(output_type, list | tuple):
        if not output_type:
            raise SchemaError("output_type: an empty list leaves nothing to answer with")
        return [leaf for option in output_type for leaf in _flat(option)]
    if isinstance(output_type, NativeOutput):
        return _only_types(output_type)
    if get_origin(output_type) in (Union, UnionType):
        return list(get_args(output_type))
    return [output_type]


def _only_types(marker: NativeOutput[Any] | PromptedOutput[Any]) -> list[Any]:
    """The types in a marker that holds nothing else."""
    kind = type(marker).__name__
    options = _flat(marker.outputs)
    for option in options:
        pauses = option is DeferredToolRequests
        if option is str or pauses or is_function(option) or is_marker(option):
            raise SchemaError(
                f"{kind}: {type_name(option)} is no type that JSON is asked for; put it beside: "
                f"{kind}(A) | {type_name(option)}"
            )
    return options


def _tools(called: Sequence[ToolOutput[Any]]) -> dict[str, OutputTool]:
    unnamed = [m for m in called if m.name is None and not is_function(m.output)]
    tools: dict[str, OutputTool] = {}
    for marker in called:
        name = DEFAULT_NAME
        if len(unnamed) > 1:
            name = re.sub(r"\W+", "_", f"{DEFAULT_NAME}_{type_name(marker.output)}").strip("_")
        tool = OutputTool(marker, default_name=name)
        if tool.name in tools:
            raise UserError(
                f"output_type: two output tools are called {tool.name!r}; give one another name: "
                "ToolOutput(..., name='...')"
            )
        tools[tool.name] = tool
    return tools


def _unfenced(text: str) -> str:
    """The inside of a Markdown fence (closed or not yet), where the answer stands in one."""
    fenced = None if text.lstrip().startswith("{") else _FENCE.search(text)
    return text if fenced is None else fenced[1]
