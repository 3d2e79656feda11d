"""Guards: functions that may stop a run because of what goes in or what would come out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

from dspark_agent.calling import call_with_ctx, function_name
from dspark_agent.context import RunContext
from dspark_agent.errors import GuardrailTripped, UserError

Guard = Callable[..., Any]
"""``(value)`` or ``(ctx, value)``, sync or async; None lets it pass, a text says why not."""


async def check_guards(
    guards: Sequence[Guard], ctx: RunContext[Any], value: Any, *, place: Literal["input", "output"]
) -> None:
    """Show ``value`` to the guards, in order.

    Raises:
        GuardrailTripped: one of them gave a reason.
        UserError: one gave something else than a text or None.
    """
    for guard in guards:
        reason = await call_with_ctx(guard, ctx, value)
        if reason is None:
            continue
        name = function_name(guard)
        if not isinstance(reason, str):
            raise UserError(
                f"{place} guard {name!r} returned {reason!r}: return None to let it pass, or a "
                "text that says why not"
            )
        raise GuardrailTripped(name, reason, place=place, value=value)
