"""The grammars that llama.cpp is given: they accept what the step allows, in llama.cpp itself."""

from __future__ import annotations

import pytest

from dspark_backend.grammar.spec import TurnSpec

llama_cpp = pytest.importorskip("llama_cpp", reason="the llama-cpp peer is optional")

from dspark_backend.bench.peers.gbnf import gbnf  # noqa: E402


def tool(name: str) -> dict[str, object]:
    return {
        "name": name,
        "parameters": {
            "type": "object",
            "properties": {"path": {"type": "string"}, "mode": {"enum": ["a", "b"]}},
            "required": ["path"],
        },
    }


TOOLS = (tool("read_file"), tool("list_files"))
SCHEMA = {"type": "object", "properties": {"call-root": {"type": "integer"}}}


def rules(source: str) -> dict[str, str]:
    return dict(line.split(" ::= ", 1) for line in source.strip().splitlines())


def test_free_text_needs_no_grammar() -> None:
    assert gbnf(TurnSpec(), "hermes") is None
    assert gbnf(TurnSpec(tools=TOOLS, tool_choice="none"), "hermes") is None


def test_the_choice_of_tools_is_the_grammars() -> None:
    named = gbnf(TurnSpec(tools=TOOLS, tool_choice={"name": "list_files"}), "hermes")
    assert named is not None
    assert "list_files" in named
    assert "read_file" not in named
    assert rules(named)["root"] == '"<tool_call>\\n" call-root "\\n</tool_call>"'


def test_every_rule_that_is_used_is_defined() -> None:
    spec = TurnSpec(tools=TOOLS, output_schema=SCHEMA, allow_text=True, parallel_tool_calls=True)
    for dialect in ("hermes", "generic", "llama3"):
        source = gbnf(spec, dialect)
        assert source is not None
        defined = rules(source)
        assert defined["root"].count(" | ") == 2
        assert "text" in defined
        # llama.cpp's own parser: raises on a syntax error or an undefined rule.
        llama_cpp.LlamaGrammar.from_string(source, verbose=False)


def test_names_inside_literals_are_left_alone() -> None:
    source = gbnf(TurnSpec(output_schema=SCHEMA, allow_text=False), "hermes")
    assert source is not None
    assert '"\\"call-root\\""' in source
