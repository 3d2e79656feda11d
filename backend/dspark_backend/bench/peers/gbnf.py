"""What a step may emit, as a GBNF grammar for llama.cpp.

The JSON part is llama.cpp's own translation of the same schema; only the wrapper that a model
family writes around a tool call is added here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from llama_cpp.llama_grammar import json_schema_to_gbnf

from dspark_backend.bench.verdict import FORMS
from dspark_backend.grammar.callformat import CallFormat
from dspark_backend.grammar.spec import TurnSpec


def gbnf(spec: TurnSpec, dialect: str) -> str | None:
    """The grammar of ``spec`` with a ``root`` rule, or ``None`` for free text.

    Text beside tool calls must not begin as a call does, which is how a reader tells them apart.
    """
    branches: list[str] = []
    rules: list[str] = []
    form = FORMS[dialect]
    if spec.callable_tools:
        one = _sub_grammar("call", _call_schema(spec.callable_tools, form), rules)
        call = f"{_literal(form.open + form.padding)} {one} {_literal(form.padding + form.close)}"
        if spec.call_limit > 1 and form.separator is not None:
            call += f" ({_literal(form.separator)} {call})*"
        branches.append(call)
    if spec.result_schema is not None:
        branches.append(_sub_grammar("result", spec.result_schema, rules))
    if spec.may_write_text:
        if not branches:
            return None
        branches.append("text")
        first = (form.open or "{")[0]
        rules.append(f"text ::= [^{first}] [^\\x00]*")
    return "\n".join([f"root ::= {' | '.join(branches)}", *rules]) + "\n"


def _call_schema(tools: Sequence[Mapping[str, Any]], form: CallFormat) -> dict[str, Any]:
    calls = [
        {
            "type": "object",
            "properties": {
                "name": {"const": tool["name"]},
                form.arguments_key: tool.get("parameters") or {"type": "object"},
            },
            "required": ["name", form.arguments_key],
            "additionalProperties": False,
        }
        for tool in tools
    ]
    return calls[0] if len(calls) == 1 else {"oneOf": calls}


def _sub_grammar(name: str, schema: Mapping[str, Any], rules: list[str]) -> str:
    """Adds the rules of ``schema`` under names of their own and returns its start rule."""
    lines = json_schema_to_gbnf(json.dumps(schema)).strip().splitlines()
    names = [line.split(" ::= ", 1)[0] for line in lines]
    for line in lines:
        rule, body = line.split(" ::= ", 1)
        rules.append(f"{name}-{rule} ::= {_prefixed(body, name, frozenset(names))}")
    return f"{name}-root"


def _prefixed(body: str, name: str, rules: frozenset[str]) -> str:
    """``body`` with every rule reference outside literals and classes renamed."""
    out: list[str] = []
    word = ""
    closing = ""
    escaped = False
    for char in f"{body}\n":
        if closing:
            out.append(char)
            if escaped:
                escaped = False
            elif char == "\\":
                escaped = True
            elif char == closing:
                closing = ""
            continue
        if char.isalnum() or char == "-":
            word += char
            continue
        out.append(f"{name}-{word}" if word in rules else word)
        word = ""
        out.append(char)
        if char in '"[':
            closing = '"' if char == '"' else "]"
    return "".join(out).rstrip("\n")


def _literal(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'
