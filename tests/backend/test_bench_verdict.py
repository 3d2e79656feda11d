"""Reading back what a step wrote, ours or a peer's."""

from __future__ import annotations

from typing import Any

import pytest

from dspark_backend.bench.verdict import judge
from dspark_backend.grammar.spec import TurnSpec

TOOL = {
    "type": "function",
    "function": {
        "name": "read_file",
        "description": "d",
        "parameters": {
            "type": "object",
            "properties": {"path": {"type": "string"}, "line": {"type": "integer"}},
            "required": ["path"],
            "additionalProperties": False,
        },
    },
}
SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
CALL = TurnSpec(tools=(TOOL,), tool_choice="required", allow_text=False)
AUTO = TurnSpec(tools=(TOOL,))
RESULT = TurnSpec(output_schema=SCHEMA, allow_text=False)
EITHER = TurnSpec(tools=(TOOL,), output_schema=SCHEMA, allow_text=False)


@pytest.mark.parametrize(
    ("dialect", "text"),
    [
        (
            "hermes",
            '<tool_call>\n{"name": "read_file", "arguments": {"path": "a.py"}}\n</tool_call>',
        ),
        ("generic", '<tool_call>{"name":"read_file","arguments":{"path":"a.py"} }</tool_call>\n'),
        ("llama3", '{"name": "read_file", "parameters": {"path": "a.py"}}'),
    ],
)
@pytest.mark.parametrize("spec", [CALL, AUTO, EITHER], ids=["required", "auto", "either"])
def test_a_call_is_read_in_every_dialect(dialect: str, text: str, spec: TurnSpec) -> None:
    verdict = judge(text, spec, dialect)
    assert verdict.problem is None
    assert verdict.output.tool_calls == ({"name": "read_file", "arguments": {"path": "a.py"}},)


@pytest.mark.parametrize("spec", [RESULT, EITHER], ids=["result", "either"])
def test_a_typed_result_is_read(spec: TurnSpec) -> None:
    verdict = judge(' {"n": 3}\n', spec, "hermes")
    assert verdict.problem is None
    assert verdict.output.has_object
    assert verdict.output.object == {"n": 3}


def test_text_is_valid_where_it_is_allowed() -> None:
    assert judge("hello", AUTO, "hermes").problem is None
    assert judge("hello", None, "hermes").output.text == "hello"
    assert judge(" ", None, "hermes").problem == "nothing was written"


def call(name: str, arguments: str) -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


@pytest.mark.parametrize(
    ("text", "spec", "complaint"),
    [
        (call("write", "{}"), CALL, "not offered"),
        (call("read_file", '{"path": 3}'), CALL, "arguments of read_file"),
        (call("read_file", '{"path": "a", "x": 1}'), CALL, "arguments of read_file"),
        ('<tool_call>\n{"name": "read_file", "arg', CALL, "broken off"),
        ('<tool_call>\n{"name": "read_file"}', CALL, "neither"),
        ("sorry", CALL, "neither"),
        ('{"n": "three"}', RESULT, "result"),
        ('{"n": ', RESULT, "broken off"),
        ("", AUTO, "nothing was written"),
    ],
)
def test_what_is_not_allowed_is_named(text: str, spec: TurnSpec, complaint: str) -> None:
    problem: Any = judge(text, spec, "hermes").problem
    assert problem is not None
    assert complaint in problem
