"""What a step wrote, read back, and whether it is what the step allowed: one reader for everybody.

It takes any JSON whitespace, unlike the engine's own parser, since llama.cpp's grammars leave
some of it to the model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jsonschema

from dspark_backend.bench.steps_report import StepOutput
from dspark_backend.grammar.callformat import HERMES, LLAMA3, CallFormat
from dspark_backend.grammar.spec import TurnSpec

FORMS: Mapping[str, CallFormat] = {"hermes": HERMES, "generic": HERMES, "llama3": LLAMA3}
"""How each dialect, by its name, writes a tool call."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """The parsed output, and why it is not valid (``None`` when it is)."""

    output: StepOutput
    problem: str | None


def judge(text: str, spec: TurnSpec | None, dialect: str) -> Verdict:
    """Reads ``text`` as the step's tool call, typed result or text, and checks the schemas."""
    if spec is None:
        return Verdict(StepOutput(text=text), None if text.strip() else "nothing was written")
    try:
        output = _read(text, spec, FORMS[dialect])
    except json.JSONDecodeError as error:
        return Verdict(StepOutput(text=text), f"broken off or no JSON: {error}")
    return Verdict(output, _problem(output, spec))


def _read(text: str, spec: TurnSpec, form: CallFormat) -> StepOutput:
    calls: list[dict[str, Any]] = []
    rest = text.strip()
    while spec.callable_tools and rest.startswith(form.open or '{"name"'):
        rest = rest.removeprefix(form.open).lstrip()
        call, end = json.JSONDecoder().raw_decode(rest)
        if not isinstance(call, dict) or not {"name", form.arguments_key} <= call.keys():
            break
        calls.append({"name": call["name"], "arguments": call[form.arguments_key]})
        rest = rest[end:].lstrip().removeprefix(form.close).lstrip()
    if calls:
        return StepOutput(text=rest, tool_calls=tuple(calls))
    if spec.result_schema is not None:
        return StepOutput(text="", object=json.loads(rest), has_object=True)
    return StepOutput(text=text)


def _problem(output: StepOutput, spec: TurnSpec) -> str | None:
    schemas = {tool["name"]: tool.get("parameters") for tool in spec.callable_tools}
    for call in output.tool_calls:
        if call["name"] not in schemas:
            return f"called {call['name']!r}, which is not offered"
        complaint = _complaint(call["arguments"], schemas[call["name"]])
        if complaint is not None:
            return f"arguments of {call['name']}: {complaint}"
    if output.has_object:
        complaint = _complaint(output.object, spec.result_schema)
        return None if complaint is None else f"result: {complaint}"
    if output.tool_calls:
        return None
    if not spec.may_write_text:
        return "neither a tool call nor a result"
    return None if output.text.strip() else "nothing was written"


def _complaint(value: object, schema: Mapping[str, Any] | None) -> str | None:
    if schema is None:
        return None
    first = next(jsonschema.Draft202012Validator(schema).iter_errors(value), None)
    return None if first is None else str(first.message)
