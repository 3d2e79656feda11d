"""What a running step tells its caller, in order: values, no behaviour."""

from __future__ import annotations

from dataclasses import dataclass

from dspark_backend.request import StepOutcome


@dataclass(frozen=True, slots=True)
class Prefilled:
    """The prompt is computed: ``new_tokens`` of it now, ``cached_tokens`` were there already."""

    new_tokens: int
    cached_tokens: int


@dataclass(frozen=True, slots=True)
class Tokens:
    """Tokens were committed. ``text`` is what became certain with them: whole characters, and
    nothing that could still turn out to be a stop string. ``source`` is who proposed them:
    ``"model"``, or ``"forced"`` for a span that the grammar determined."""

    token_ids: tuple[int, ...]
    text: str
    source: str


@dataclass(frozen=True, slots=True)
class Finished:
    """The step is over; its session takes the next one."""

    outcome: StepOutcome


@dataclass(frozen=True, slots=True)
class Failed:
    """The step died of ``error``; what was committed before is in the session's log."""

    error: Exception


StepEvent = Prefilled | Tokens | Finished | Failed
