"""One turn of a model: what was asked of it, and what came of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum, StrEnum
from typing import Any, Final, Generic

from typing_extensions import TypeVar

from dspark_agent.errors import UserError
from dspark_agent.messages import ModelResponse, RetryPromptPart, ToolCallPart, ToolReturnPart
from dspark_agent.metrics import StepMetrics
from dspark_agent.models.base import ModelTurn
from dspark_agent.output import Output
from dspark_agent.settings import ModelSettings
from dspark_agent.tools import ToolDefinition
from dspark_agent.trace import StepTrace

OutT_co = TypeVar("OutT_co", default=str, covariant=True)


class StepKind(StrEnum):
    """What a step may emit."""

    TEXT = "text"
    TOOL_CALL = "tool_call"
    TYPED_RESULT = "typed_result"
    MIXED = "mixed"


OutputValidator = Callable[..., Any]
"""``(output)`` or ``(ctx, output)``, sync or async; gives back the output or raises ModelRetry."""
OutputGuard = Callable[..., Any]
"""``(output)`` or ``(ctx, output)``, sync or async; gives None, or why the run has to stop."""


class Unset(Enum):
    """The type of :data:`UNSET`."""

    UNSET = "unset"


UNSET: Final = Unset.UNSET
"""Stands for a value that was not given where None would be one."""


@dataclass(frozen=True, slots=True)
class StepPlan:
    """What a step asks for, before limits and repeated calls narrow it.

    ``tools`` are a choice of the agent's; ``tool_choice`` is ``auto``, ``required``, ``none`` or
    the name of one; ``retries`` is how often a refused output is asked for again; ``validators``
    look at the output after its type has, ``guards`` after them.
    """

    output: Output[Any]
    tools: tuple[ToolDefinition, ...]
    tool_choice: str
    settings: ModelSettings
    retries: int
    validators: tuple[OutputValidator, ...] = ()
    guards: tuple[OutputGuard, ...] = ()

    @property
    def needs_call(self) -> bool:
        """Whether the step must call a tool."""
        return self.tool_choice not in ("auto", "none")

    @property
    def turn(self) -> ModelTurn:
        """What the model is told that it may emit."""
        finals = {} if self.needs_call else self.output.tools
        choice = self.tool_choice if self.tools else "none"
        if finals:
            choice = "auto" if self.output.answers_in_writing else "required"
        return ModelTurn(
            tools=(*self.tools, *(tool.definition for tool in finals.values())),
            tool_choice=choice,
            output_schema=None if self.needs_call else self.output.schema,
            allow_text=self.output.allow_text and not self.needs_call,
            settings=self.settings,
            output_tools=tuple(finals),
        )

    @property
    def kind(self) -> StepKind:
        if self.needs_call:
            return StepKind.TOOL_CALL
        if self.tools or (self.output.tools and self.output.answers_in_writing):
            return StepKind.MIXED
        if self.output.schema is None and not self.output.tools:
            return StepKind.TEXT
        return StepKind.MIXED if self.output.allow_text else StepKind.TYPED_RESULT


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult(Generic[OutT_co]):
    """What one step did.

    ``tool_results`` are in the order of the calls. ``retry_reason`` is why the step is taken
    again, None where it stands. ``attempts`` counts the model turns it took, from 1. ``trace``
    says when everything happened, ``settled_trace`` when the calls were run that had waited for
    approval before the step, if any; ``metrics`` counts both.
    """

    index: int
    kind: StepKind
    response: ModelResponse
    tool_results: tuple[ToolReturnPart | RetryPromptPart, ...] = ()
    metrics: StepMetrics
    attempts: int = 1
    retry_reason: str | None = None
    value: OutT_co | Unset = UNSET
    trace: StepTrace | None = field(default=None, repr=False, compare=False)
    settled_trace: StepTrace | None = field(default=None, repr=False, compare=False)

    @property
    def is_final(self) -> bool:
        """Whether the step gave an output (and did not call tools instead)."""
        return self.value is not UNSET

    @property
    def output(self) -> OutT_co:
        """The output, of the step's output type.

        Raises:
            UserError: the step gave none; see :attr:`is_final`.
        """
        if isinstance(self.value, Unset):
            called = ", ".join(call.tool_name for call in self.tool_calls) or "nothing"
            raise UserError(
                f"step {self.index} gave no output, it called {called}; check is_final, or ask for "
                "an output only: step(..., output_type=..., tools=[])"
            )
        return self.value

    @property
    def text(self) -> str:
        """What the model wrote outside of tool calls."""
        return self.response.text

    @property
    def tool_calls(self) -> list[ToolCallPart]:
        """The calls the model made, in order."""
        return self.response.tool_calls

    @property
    def tool_result(self) -> Any:
        """What the step's only call returned.

        Raises:
            UserError: there was not exactly one call, or it returned nothing but a complaint.
        """
        if len(self.tool_results) != 1:
            raise UserError(
                f"step {self.index} has {len(self.tool_results)} tool results, not one; read "
                "tool_results"
            )
        only = self.tool_results[0]
        if isinstance(only, RetryPromptPart):
            raise UserError(f"step {self.index}: {only.tool_name} refused: {only.content}")
        return only.content
