"""Outputs that are called like tools: what the call's arguments come to is the answer."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from dspark_agent.context import RunContext
from dspark_agent.errors import ModelRetry, SchemaError, ToolFailed
from dspark_agent.function_schema import validation_text
from dspark_agent.outputs import ToolOutput, is_marker
from dspark_agent.tools import RESERVED_NAMES, Tool, ToolDefinition
from dspark_agent.typed_output import Partial, TypedOutput, partial_json, type_name

DEFAULT_NAME = "final_result"
_DESCRIPTION = "Give the final answer."


class OutputTool:
    """A :class:`ToolOutput` ready to be offered, and to read the call that answers.

    ``default_name`` is for an output that has no name of its own.

    Raises:
        SchemaError: the output cannot be described to a model, or needs a name.
    """

    def __init__(self, marker: ToolOutput[Any], *, default_name: str = DEFAULT_NAME) -> None:
        self._typed: TypedOutput | None = None
        self._tool: Tool[Any] | None = None
        if is_function(marker.output):
            self._tool = Tool(marker.output, name=marker.name, description=marker.description)
            told = self._tool.definition
            self.definition = ToolDefinition(
                told.name, told.description or _DESCRIPTION, told.parameters
            )
            return
        if is_marker(marker.output) or isinstance(marker.output, list | tuple):
            raise SchemaError(
                f"ToolOutput({marker.output!r}): give it one type or function; of several, each "
                "has a ToolOutput: ToolOutput(A) | ToolOutput(B)"
            )
        self._typed = TypedOutput((marker.output,))
        name = default_name if marker.name is None else marker.name
        if not name.replace("-", "_").isidentifier() or name in RESERVED_NAMES:
            raise SchemaError(
                f"ToolOutput({type_name(marker.output)}): {name!r} cannot be a tool's name; pass "
                "name='...', an identifier"
            )
        described = self._typed.schema.get("description")
        description = marker.description or described or _DESCRIPTION
        self.definition = ToolDefinition(name, description, self._typed.schema)

    @property
    def name(self) -> str:
        """What the model calls it."""
        return self.definition.name

    async def value(self, args: Mapping[str, Any] | str, ctx: RunContext[Any]) -> Any:
        """The output that a call with ``args`` gives.

        Raises:
            ModelRetry: with what is wrong, in words for the model.
        """
        if self._typed is not None:
            if isinstance(args, str):
                return self._typed.of_text(args)
            return self._typed.of_json(dict(args))
        assert self._tool is not None
        try:
            arguments = self._tool.schema.validate(args)
        except ValidationError as error:
            raise ModelRetry(
                f"Wrong arguments for {self.name}:\n{validation_text(error)}"
            ) from None
        try:
            return await self._tool.run(ctx, arguments)
        except ToolFailed as error:
            raise ModelRetry(error.message) from None

    def partial(self, text: str) -> Partial | None:
        """Read a call's arguments that are still being written.

        What a function will make of them is not known before it ran: their value is None.
        """
        if self._typed is not None:
            return self._typed.partial(text)
        data = partial_json(text)
        return None if data is None else Partial(data, None)


def is_function(option: Any) -> bool:
    """Whether an output is a function (and no type)."""
    return inspect.isroutine(option) or isinstance(option, functools.partial)
