"""Calling the functions that users give to an agent: with the context or without, sync or async."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable
from typing import Any

from dspark_agent.context import RunContext


async def call_with_ctx(function: Callable[..., Any], ctx: RunContext[Any], *args: Any) -> Any:
    """Call ``function(ctx, *args)``, or ``function(*args)`` where it can do with less; await the
    answer if it is awaitable."""
    answer = function(ctx, *args) if _needed(function) > len(args) else function(*args)
    if isinstance(answer, Awaitable):
        return await answer
    return answer


def _needed(function: Callable[..., Any]) -> int:
    """How many positional arguments ``function`` cannot do without."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:  # some builtins, such as int, have no signature to read
        return 0
    places = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(p.kind in places and p.default is p.empty for p in parameters)


def function_name(function: Callable[..., Any]) -> str:
    """What to call ``function`` in an error."""
    return str(getattr(function, "__name__", type(function).__name__))
