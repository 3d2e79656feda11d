"""Prompts of the decoding benchmark: chat messages or the first of a list of user turns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator

from dspark_backend.bench.jsonl import read_rows


class PromptRow(BaseModel):
    """One line of a prompt file: ``messages`` (and ``tools``), or ``turns`` of which the first
    is used. Other fields of a line (a source, a licence) are not looked at."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    messages: tuple[dict[str, Any], ...] = ()
    turns: tuple[str, ...] = ()
    tools: tuple[dict[str, Any], ...] = ()

    @model_validator(mode="after")
    def _has_one_form(self) -> PromptRow:
        if bool(self.messages) == bool(self.turns):
            raise ValueError("give either `messages` or `turns`, and not an empty list")
        return self

    def chat(self) -> list[dict[str, Any]]:
        """The conversation to render: the messages, or the first turn as a user message."""
        if self.messages:
            return [dict(message) for message in self.messages]
        return [{"role": "user", "content": self.turns[0]}]


def read_prompts(path: Path, limit: int | None = None) -> list[PromptRow]:
    """The first ``limit`` prompts of a JSON-lines file; see :func:`read_rows` for the errors."""
    return read_rows(path, PromptRow, limit)
