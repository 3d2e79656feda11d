"""Recorded agent runs: what came from outside in each step, never what a model answered.

A trace is replayed with the model's own answers in between, so two models (or two engines) that
write different calls are still given the same tool results.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from dspark_backend.bench.jsonl import read_rows


class NamedTool(BaseModel):
    """A tool choice that leaves one tool only."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str


class TraceStep(BaseModel):
    """One model turn: the messages appended before it, and what it may emit."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    messages: tuple[dict[str, Any], ...]
    tool_choice: Literal["auto", "required", "none"] | NamedTool = "auto"
    output_schema: dict[str, Any] | None = None
    max_new_tokens: int = Field(gt=0)


class TraceRun(BaseModel):
    """One line of a trace file: an agent's declaration and its steps."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    system: str = ""
    tools: tuple[dict[str, Any], ...] = ()
    steps: tuple[TraceStep, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _choices_exist(self) -> TraceRun:
        names = {tool.get("function", tool).get("name") for tool in self.tools}
        for index, step in enumerate(self.steps):
            choice = step.tool_choice
            if isinstance(choice, NamedTool) and choice.name not in names:
                raise ValueError(f"step {index}: tool_choice names {choice.name!r}, not a tool")
            if choice == "required" and not names:
                raise ValueError(f"step {index}: tool_choice is required, but there is no tool")
        return self

    def opening(self) -> list[dict[str, Any]]:
        """The messages before the first answer: the system text, if any, and the first step's."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, *(dict(message) for message in self.steps[0].messages)]


def read_trace(path: Path, limit: int | None = None) -> list[TraceRun]:
    """The first ``limit`` runs of a trace file; see :func:`read_rows` for the errors."""
    return read_rows(path, TraceRun, limit)
