"""How a model family writes a tool call, as data."""

from __future__ import annotations

import json
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Unmarked:
    """A call that stands alone as the whole turn: ``before``, the name, ``between``, the
    arguments, ``after``. ``before`` ends and ``between`` begins with the quotes of the name."""

    before: str
    between: str
    after: str

    def head(self, tool: str) -> str:
        """The fixed text up to where the arguments begin."""
        return f"{self.before}{tool}{self.between}"


@dataclass(frozen=True, slots=True)
class CallFormat:
    """A call is ``open + padding + {"name": ..., <arguments_key>: {...}} + padding + close``.

    Calls of one turn stand ``separator`` apart; ``separator`` is None for a family that writes one
    call a turn. Without ``open`` a call begins with its brace, so text and results may not look
    like one. ``habits`` are ways in which models of the family write a call in spite of their
    template, all of them unmarked; the first is the bare object.
    """

    name: str
    open: str
    close: str
    padding: str
    separator: str | None
    arguments_key: str
    habits: tuple[Unmarked, ...]

    def call(self, tool: str, arguments_json: str) -> str:
        """The whole text of one call as the template writes it."""
        body = f"{self.head(tool)}{arguments_json}}}"
        return f"{self.open}{self.padding}{body}{self.padding}{self.close}"

    def head(self, tool: str) -> str:
        """The fixed text of a call from its brace to where the arguments begin."""
        return f'{{"name": {json.dumps(tool)}, "{self.arguments_key}": '


FENCE_OPEN, FENCE_CLOSE = "```json\n", "\n```"
"""Where text is allowed beside a typed result, a turn that opens this fence is a result (or a bare
call): what models write when they are asked for JSON in words."""

HERMES = CallFormat(
    name="hermes",
    open="<tool_call>",
    close="</tool_call>",
    padding="\n",
    separator="\n",
    arguments_key="arguments",
    habits=(
        Unmarked('{"name": "', '", "arguments": ', "}"),
        Unmarked(FENCE_OPEN + '{\n  "name": "', '",\n  "arguments": ', "\n}" + FENCE_CLOSE),
    ),
)
"""Qwen2.5, Qwen3 and the Hermes models; markers are special tokens or text, as the tokenizer has
them. The habits are those of Qwen2.5-Coder, which hardly ever writes the markers by itself."""

LLAMA3 = CallFormat(
    name="llama3",
    open="",
    close="",
    padding="",
    separator=None,
    arguments_key="parameters",
    habits=(Unmarked('{"name": "', '", "parameters": ', "}"),),
)
"""Llama 3.1 to 3.3: a bare JSON object. Their templates refuse a turn with several calls."""
