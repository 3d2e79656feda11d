"""How an answer is asked for: markers around output types, named as in pydantic-ai.

An ``output_type`` is a type, one of these, a function, or a choice of them: ``A | B``, or a list.
A choice that holds a marker is written with the marker first (``ToolOutput(A) | B``).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar, overload

from dspark_agent.errors import SchemaError

if TYPE_CHECKING:
    from typing_extensions import TypeForm

T = TypeVar("T")
S = TypeVar("S")
T_co = TypeVar("T_co", covariant=True)


class OutputForm(Generic[T_co]):
    """Asks for an answer of type ``T_co`` in a way of its own; the base of the markers."""

    __slots__ = ()

    @overload
    def __or__(self, other: TypeForm[S], /) -> OutputChoice[T_co | S]: ...
    @overload
    def __or__(
        self, other: OutputForm[S] | Callable[..., Awaitable[S]], /
    ) -> OutputChoice[T_co | S]: ...
    @overload
    def __or__(self, other: Callable[..., S], /) -> OutputChoice[T_co | S]: ...
    def __or__(self, other: Any, /) -> OutputChoice[Any]:
        """A choice of this and another output."""
        return OutputChoice((self, other))


@dataclass(frozen=True, slots=True)
class OutputChoice(OutputForm[T_co]):
    """Several outputs to choose from: what ``|`` between them makes."""

    options: tuple[Any, ...]


class ToolOutput(OutputForm[T_co]):
    """The answer is a call of an output tool, which ends the run.

    ``output`` is a type, or a function: its parameters are what the model fills in, and what it
    returns is the output. A function may be async, take a :class:`RunContext` first, and raise
    :class:`ModelRetry`. ``name`` is the tool's: a function's own by default, else
    ``final_result`` (with the type's name behind it where there are several).
    """

    __slots__ = ("description", "name", "output")

    @overload
    def __init__(
        self: ToolOutput[T],
        output: TypeForm[T],
        *,
        name: str | None = None,
        description: str | None = None,
    ) -> None: ...
    @overload
    def __init__(
        self: ToolOutput[T],
        output: Callable[..., Awaitable[T]],
        *,
        name: str | None = None,
        description: str | None = None,
    ) -> None: ...
    @overload
    def __init__(
        self: ToolOutput[T],
        output: OutputForm[T] | Callable[..., T],
        *,
        name: str | None = None,
        description: str | None = None,
    ) -> None: ...
    def __init__(
        self, output: Any, *, name: str | None = None, description: str | None = None
    ) -> None:
        self.output = output
        self.name = name
        self.description = description


class NativeOutput(OutputForm[T_co]):
    """The answer is JSON that the model is held to: by the grammar of the embedded engine, by
    ``response_format`` on a server. What a type without a marker means, too.

    ``outputs`` is a type, a union, or a list of types.
    """

    __slots__ = ("outputs",)

    @overload
    def __init__(self: NativeOutput[T], outputs: TypeForm[T]) -> None: ...
    @overload
    def __init__(self: NativeOutput[Any], outputs: Sequence[Any]) -> None: ...
    def __init__(self, outputs: Any) -> None:
        self.outputs = outputs


DEFAULT_TEMPLATE = "Answer with a JSON object that fits this schema, and nothing else:\n{schema}"


class PromptedOutput(OutputForm[T_co]):
    """The answer is JSON that the model is only asked for, in words; for servers that enforce
    nothing. An answer that does not fit is refused and asked for again.

    ``template`` is what is said, once a conversation; ``{schema}`` in it is the JSON Schema.

    Raises:
        SchemaError: the template has no ``{schema}``.
    """

    __slots__ = ("outputs", "template")

    @overload
    def __init__(
        self: PromptedOutput[T], outputs: TypeForm[T], *, template: str = DEFAULT_TEMPLATE
    ) -> None: ...
    @overload
    def __init__(
        self: PromptedOutput[Any], outputs: Sequence[Any], *, template: str = DEFAULT_TEMPLATE
    ) -> None: ...
    def __init__(self, outputs: Any, *, template: str = DEFAULT_TEMPLATE) -> None:
        if "{schema}" not in template:
            raise SchemaError(f"PromptedOutput: template {template!r} has no {{schema}} in it")
        self.outputs = outputs
        self.template = template


class TextOutput(OutputForm[T_co]):
    """The answer is plain text, and the output what ``function`` makes of it.

    ``function`` is ``(text)`` or ``(ctx, text)``, sync or async; it may raise
    :class:`ModelRetry`. It runs on the event loop.
    """

    __slots__ = ("function",)

    @overload
    def __init__(self: TextOutput[T], function: Callable[..., Awaitable[T]]) -> None: ...
    @overload
    def __init__(self: TextOutput[T], function: Callable[..., T]) -> None: ...
    def __init__(self, function: Callable[..., Any]) -> None:
        if not callable(function):
            raise SchemaError(f"TextOutput: {function!r} is no function of the text")
        self.function = function


def is_marker(option: object) -> bool:
    """Whether an output is a marker (and not a type, a schema or a function)."""
    return isinstance(
        option, ToolOutput | NativeOutput | PromptedOutput | TextOutput | OutputChoice
    )
