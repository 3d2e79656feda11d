"""Prompts of a training run: a JSON object a line, split into training and held-out by hash."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dspark_backend.training.errors import TrainingError

_BUCKETS = 10_000


class Prompt(BaseModel):
    """One line: a conversation that waits for the model's answer, with the tools it may call.

    ``source`` names where the prompt is from; figures are reported by it. Other fields (a licence)
    are not looked at.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    messages: tuple[dict[str, Any], ...] = Field(min_length=1)
    tools: tuple[dict[str, Any], ...] = ()
    source: str = "prompts"

    @cached_property
    def key(self) -> str:
        """Identity of the prompt: the same words have the same key in any file, on any machine."""
        text = json.dumps([self.messages, self.tools], sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:24]


def read_prompts(path: Path) -> list[Prompt]:
    """All prompts of a JSON-lines file; a prompt that occurs twice is kept once.

    Raises:
        TrainingError: the file cannot be read, is empty, or a line is no prompt (names the line).
    """
    prompts: dict[str, Prompt] = {}
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    prompt = _parse(path, number, line)
                    prompts.setdefault(prompt.key, prompt)
    except (OSError, UnicodeDecodeError) as error:
        raise TrainingError(f"cannot read the prompts in {path}: {error}") from error
    if not prompts:
        raise TrainingError(f"{path} holds no prompts: expected a JSON object a line")
    return list(prompts.values())


def in_share(key: str, share: float) -> bool:
    """Whether a key belongs to the part of that share; the parts of larger shares contain it."""
    return int(key[:8], 16) % _BUCKETS / _BUCKETS < share


def split(prompts: Iterable[Prompt], held_out: float = 0.05) -> tuple[list[Prompt], list[Prompt]]:
    """``(training, held out)``: a prompt's side depends on its words and ``held_out`` alone.

    Raising ``held_out`` only ever moves prompts from training to held-out.
    """
    if not 0.0 <= held_out < 1.0:
        raise TrainingError(f"held_out is a share of the prompts, from 0 to below 1: {held_out}")
    sides: tuple[list[Prompt], list[Prompt]] = ([], [])
    for prompt in prompts:
        sides[in_share(prompt.key, held_out)].append(prompt)
    return sides


def ordered(prompts: Iterable[Prompt], first: Sequence[str] = ()) -> list[Prompt]:
    """Shuffled by key, those of the sources in ``first`` before all others."""
    return sorted(prompts, key=lambda prompt: (prompt.source not in first, prompt.key))


def _parse(path: Path, number: int, line: str) -> Prompt:
    try:
        return Prompt.model_validate_json(line)
    except ValidationError as error:
        details = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in details["loc"]) or "the line"
        raise TrainingError(f"{path}, line {number}: {where}: {details['msg']}") from error
