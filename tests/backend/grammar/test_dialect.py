"""What a turn may be in each dialect, and that what was written is read back."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jsonschema
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dspark_backend.errors import GrammarError, RequestError
from dspark_backend.grammar.dialect import Dialect
from dspark_backend.grammar.events import (
    ObjectDelta,
    TextDelta,
    ToolCallArgsDelta,
    ToolCallEnd,
    ToolCallStart,
    TurnEvent,
)
from dspark_backend.grammar.spec import ParsedCall, ParsedTurn, TurnSpec
from dspark_backend.request import StepKind

DialectNamed = Callable[[str], Dialect]
Walk = Callable[..., list[int] | None]

EDIT: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "edit_file",
        "description": "Replace text.",
        "parameters": {
            "type": "object",
            "properties": {
                "path": {"type": "string", "maxLength": 12},
                "lines": {"type": "array", "items": {"$ref": "#/$defs/Line"}, "maxItems": 2},
            },
            "required": ["path"],
            "$defs": {"Line": {"type": "integer", "minimum": 1, "maximum": 99}},
        },
    },
}
LIST = {"name": "list_files", "description": "All of them."}
RESULT = {
    "type": "object",
    "properties": {"answer": {"type": "string", "maxLength": 9}, "sure": {"type": "boolean"}},
    "required": ["answer", "sure"],
}
TOOLS = (EDIT, LIST)
SPECS = {
    "auto": TurnSpec(TOOLS),
    "auto, parallel": TurnSpec(TOOLS, parallel_tool_calls=True, max_calls=3),
    "auto, no text": TurnSpec(TOOLS, allow_text=False),
    "required": TurnSpec(TOOLS, "required"),
    "required, parallel": TurnSpec(TOOLS, "required", parallel_tool_calls=True, max_calls=2),
    "named": TurnSpec(TOOLS, {"name": "edit_file"}, parallel_tool_calls=True),
    "none": TurnSpec(TOOLS, "none"),
    "calls or result": TurnSpec(TOOLS, output_schema=RESULT, allow_text=False),
    "calls, result or text": TurnSpec(TOOLS, output_schema=RESULT),
    "result only": TurnSpec(TOOLS, "none", output_schema=RESULT, allow_text=False),
    "result or text": TurnSpec(output_schema=RESULT),
    "scalar result": TurnSpec(output_schema={"type": "integer", "maximum": 9}, allow_text=False),
}


def test_each_template_is_recognised(dialect_named: DialectNamed) -> None:
    for name in ("generic", "hermes", "llama3"):
        assert dialect_named(f"tiny-{name}").name == name


@pytest.mark.real_model
def test_smollm2_speaks_the_generic_dialect(dialect_named: DialectNamed) -> None:
    assert dialect_named("smollm2").name == "generic"


@pytest.mark.slow
def test_qwen_speaks_hermes_with_its_own_marker_tokens(dialect_named: DialectNamed) -> None:
    dialect = dialect_named("qwen2.5")
    assert dialect.name == "hermes"
    assert {dialect.form.open, dialect.form.close} <= set(dialect.tokenizer.added_tokens)


def streamed(dialect: Dialect, spec: TurnSpec, pieces: list[str]) -> tuple[ParsedTurn, Any]:
    """The turn as ``finish`` has it, and the same put together from the events."""
    parser = dialect.parser(spec)
    events: list[TurnEvent] = [event for piece in pieces for event in parser.feed(piece)]
    events += parser.flush()
    text, typed = "", ""
    calls: list[ParsedCall] = []
    fragments: list[str] = []
    for event in events:
        match event:
            case TextDelta(delta):
                assert delta
                assert not calls
                text += delta
            case ToolCallStart(index, _):
                assert index == len(fragments) == len(calls)
                fragments.append("")
            case ToolCallArgsDelta(index, fragment):
                assert index == len(fragments) - 1
                fragments[index] += fragment
            case ToolCallEnd(index, name, arguments):
                assert json.loads(fragments[index]) == arguments
                calls.append(ParsedCall(name, arguments))
            case ObjectDelta(fragment):
                typed += fragment
    value = json.loads(typed) if typed else None
    return parser.finish(), ParsedTurn(text, tuple(calls), value, bool(typed))


def cut(text: str, places: list[int]) -> list[str]:
    bounds = [0, *sorted(places), len(text)]
    return [text[a:b] for a, b in itertools.pairwise(bounds)]


@pytest.mark.parametrize("spec", SPECS.values(), ids=list(SPECS))
def test_every_turn_under_the_mask_is_read_back_whole_and_in_pieces(
    dialect: Dialect, walk: Walk, spec: TurnSpec
) -> None:
    grammar = dialect.grammar(spec)
    assert grammar is not None
    assert grammar.kind == spec.kind
    rng = np.random.default_rng(0)
    finished = 0
    for attempt in range(12):
        tokens = walk(grammar, dialect.tokenizer, rng, limit=120, canonical=attempt % 3 != 0)
        if tokens is None:
            continue
        text = dialect.tokenizer.decode(tokens)
        turn = dialect.parse(text, spec)
        assert_allowed(turn, spec)
        for _ in range(3):
            places = rng.integers(0, len(text) + 1, size=rng.integers(0, 9)).tolist()
            whole, told = streamed(dialect, spec, cut(text, places))
            assert whole == told == turn
        stream = dialect.tokenizer.stream()
        pieces = [stream.feed([token]) for token in tokens]
        assert streamed(dialect, spec, [*pieces, stream.flush()])[0] == turn
        finished += 1
    assert finished >= 3


def assert_allowed(turn: ParsedTurn, spec: TurnSpec) -> None:
    """The turn is one that its specification names, with valid values."""
    assert len(turn.tool_calls) <= spec.call_limit
    schemas = {"edit_file": EDIT["function"]["parameters"], "list_files": {"maxProperties": 0}}
    for call in turn.tool_calls:
        assert call.name in {function["name"] for function in spec.callable_tools}
        jsonschema.validate(call.arguments, schemas[call.name])
    if turn.has_object:
        assert spec.result_schema is not None
        assert not turn.text
        assert not turn.tool_calls
        jsonschema.validate(turn.object, spec.result_schema)
    elif turn.text:
        assert spec.may_write_text
    else:
        assert turn.tool_calls


_WORDS = st.sampled_from(["Hello", " ", "\n", "<", "<tool", "_call>", "{", "}", '"', "né", "\\"])


@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_composed_turns_are_read_back_however_they_are_cut(
    data: st.DataObject, dialect_named: DialectNamed
) -> None:
    dialect = dialect_named(data.draw(st.sampled_from(["tiny-generic", "tiny-llama3"])))
    form = dialect.form
    spec = TurnSpec(TOOLS, parallel_tool_calls=True, max_calls=4)
    text = data.draw(st.lists(_WORDS, max_size=8).map("".join))
    if form.open in text or not form.open:
        # Not the marker as a whole: "<tool<tool_call>_call>" without it is it again.
        text = "So: " + text.replace("_call>", "")
    strings = st.text(alphabet='ab{}[]"\\é\n<>', max_size=6)
    arguments = st.fixed_dictionaries(
        {"path": strings}, optional={"lines": st.lists(st.integers(1, 99), max_size=2)}
    )
    written = data.draw(st.lists(arguments, max_size=3 if form.separator else 0))
    calls = [form.call("edit_file", json.dumps(a, ensure_ascii=False)) for a in written]
    whole = text + (form.separator or "").join(calls)
    places = data.draw(st.lists(st.integers(0, len(whole)), max_size=12))
    turn, told = streamed(dialect, spec, cut(whole, places))
    assert turn == told
    assert turn.text == (text.rstrip() if calls else text)
    assert list(turn.tool_calls) == [ParsedCall("edit_file", a) for a in written]


def test_parallel_calls_end_at_the_limit_and_off_means_one(dialect: Dialect) -> None:
    form = dialect.form
    call = form.call("list_files", "{}")
    for spec, allowed in (
        (TurnSpec(TOOLS, "required"), 1),
        (TurnSpec(TOOLS, "required", parallel_tool_calls=True, max_calls=3), 3),
        (TurnSpec(TOOLS, {"name": "list_files"}, parallel_tool_calls=True), 1),
    ):
        allowed = allowed if form.separator else 1
        grammar = dialect.grammar(spec)
        assert grammar is not None
        matcher = grammar.matcher()
        matcher.accept(dialect.tokenizer.encode((form.separator or "").join([call] * allowed)))
        assert matcher.is_terminated
        assert matcher.accepts_prefix([dialect.end_of_turn_id]) == 1
        assert matcher.accepts_prefix(dialect.tokenizer.encode("\n")) == 0


def test_text_may_lead_to_a_call_but_nothing_follows_one(dialect_named: DialectNamed) -> None:
    for name in ("tiny-generic", "tiny-hermes"):
        dialect = dialect_named(name)
        text = "Let me see.\n\n" + dialect.form.call("list_files", "{}")
        grammar = dialect.grammar(SPECS["auto"])
        assert grammar is not None
        matcher = grammar.matcher()
        matcher.accept(dialect.tokenizer.encode(text))
        assert matcher.is_terminated
        turn = dialect.parse(text, SPECS["auto"])
        assert turn == ParsedTurn("Let me see.", (ParsedCall("list_files", {}),))


def test_an_empty_turn_is_no_turn(dialect: Dialect) -> None:
    for spec in SPECS.values():
        grammar = dialect.grammar(spec)
        assert grammar is not None
        assert grammar.matcher().accepts_prefix([dialect.end_of_turn_id]) == 0


def test_free_text_without_tools_needs_no_grammar(tiny_dialect: Dialect) -> None:
    assert tiny_dialect.grammar(TurnSpec()) is None
    turn = tiny_dialect.parse("<tool_call> is {\n", TurnSpec())
    assert turn == ParsedTurn("<tool_call> is {\n")


def test_what_may_be_a_marker_waits_and_is_text_when_it_is_not(
    dialect_named: DialectNamed,
) -> None:
    parser = dialect_named("tiny-generic").parser(SPECS["auto"])
    assert parser.feed("Hello \n<tool_c") == [TextDelta("Hello")]
    assert parser.feed("ups> and") == [TextDelta(" \n<tool_cups> and")]
    assert parser.feed(" \n") == []
    assert parser.flush() == [TextDelta(" \n")]
    assert parser.finish().text == "Hello \n<tool_cups> and \n"


@pytest.mark.parametrize("text", ["<", "{", "<tool_call", '{"name": "edit', "```json\n{", "\n"])
def test_a_beginning_that_comes_to_nothing_is_text_to_listeners_too(
    dialect_named: DialectNamed, text: str
) -> None:
    turn = ParsedTurn(text)
    assert streamed(dialect_named("tiny-generic"), SPECS["auto"], [text]) == (turn, turn)


def test_a_result_that_begins_like_a_call_is_told_to_listeners(tiny_dialect: Dialect) -> None:
    spec = TurnSpec(TOOLS, output_schema={"type": "object"} | RESULT, allow_text=False)
    turn = ParsedTurn(object={}, has_object=True)
    parser = tiny_dialect.parser(spec)
    assert parser.feed("{") == []
    assert parser.feed("}") == [ObjectDelta("{}")]
    assert parser.finish() == turn


def test_a_call_is_told_as_it_is_written(dialect_named: DialectNamed) -> None:
    parser = dialect_named("tiny-hermes").parser(SPECS["required"])
    assert parser.feed('<tool_call>\n{"name": "edit_') == []
    assert parser.feed('file", "arguments": ') == [ToolCallStart(0, "edit_file")]
    assert parser.feed('{"path": "a}') == [ToolCallArgsDelta(0, '{"path": "a}')]
    assert parser.feed('"}}\n</tool_call>') == [
        ToolCallArgsDelta(0, '"}'),
        ToolCallEnd(0, "edit_file", {"path": "a}"}),
    ]


FENCED = '```json\n{\n  "name": "edit_file",\n  "arguments": {"path": "a"}\n}\n```'
BARE = '{"name": "edit_file", "arguments": {"path": "a"}}'


@pytest.mark.parametrize("text", [BARE, FENCED], ids=["bare", "fenced"])
@pytest.mark.parametrize("name", ["tiny-generic", "tiny-hermes"])
def test_a_call_written_by_habit_is_a_call_beside_text(
    dialect_named: DialectNamed, name: str, text: str
) -> None:
    dialect, spec = dialect_named(name), SPECS["auto"]
    grammar = dialect.grammar(spec)
    assert grammar is not None
    matcher = grammar.matcher()
    matcher.accept(dialect.tokenizer.encode(text))
    assert matcher.is_terminated
    turn = ParsedTurn(tool_calls=(ParsedCall("edit_file", {"path": "a"}),))
    assert dialect.parse(text, spec) == turn
    for cuts in ([5], [20, 21], list(range(len(text)))):
        assert streamed(dialect, spec, cut(text, cuts)) == (turn, turn)
    head = text.partition('{"path"')[0]
    wrong = dialect.tokenizer.encode(head + '{"lines"')
    assert grammar.matcher().accepts_prefix(wrong) < len(wrong)


@pytest.mark.parametrize("name", ["tiny-generic", "tiny-hermes"])
def test_what_only_resembles_a_call_stays_text(dialect_named: DialectNamed, name: str) -> None:
    dialect, spec = dialect_named(name), SPECS["auto"]
    grammar = dialect.grammar(spec)
    assert grammar is not None
    for text in (
        '{"name": "delete_file", "arguments": {}}',
        '{"name": "edit_file", "args": 1}',
        "See: " + BARE,
        "See:\n" + FENCED,
        '```json\n{"port": 80}\n```',
        '{"name": "edit_',
    ):
        assert grammar.matcher().accepts_prefix(dialect.tokenizer.encode(text)) == len(
            dialect.tokenizer.encode(text)
        )
        assert dialect.parse(text, spec) == ParsedTurn(text)


def test_where_calls_are_demanded_only_the_template_s_form_will_do(
    dialect_named: DialectNamed,
) -> None:
    dialect = dialect_named("tiny-hermes")
    for name in ("required", "named", "auto, no text"):
        grammar = dialect.grammar(SPECS[name])
        assert grammar is not None
        for text in (BARE, FENCED):
            assert grammar.matcher().accepts_prefix(dialect.tokenizer.encode(text)) == 0
            with pytest.raises(GrammarError, match="in place of a tool call"):
                dialect.parse(text, SPECS[name])


def test_beside_a_result_a_bare_call_is_told_by_its_keys(tiny_dialect: Dialect) -> None:
    bare = tiny_dialect.form.head("edit_file") + '{"path": "a"}}'
    for name in ("calls or result", "calls, result or text"):
        grammar = tiny_dialect.grammar(SPECS[name])
        assert grammar is not None
        for text in (bare, '{"answer": "a", "sure": true}'):
            matcher = grammar.matcher()
            matcher.accept(tiny_dialect.tokenizer.encode(text))
            assert matcher.is_terminated
        call = ParsedTurn(tool_calls=(ParsedCall("edit_file", {"path": "a"}),))
        assert tiny_dialect.parse(bare, SPECS[name]) == call


def test_beside_text_json_in_a_fence_is_a_result_or_a_bare_call(tiny_dialect: Dialect) -> None:
    spec = SPECS["calls, result or text"]
    grammar = tiny_dialect.grammar(spec)
    assert grammar is not None
    call = tiny_dialect.form.head("edit_file") + '{"path": "a"}}'
    for text, turn in (
        ('{"answer": "```", "sure": true}', ParsedTurn(object={"answer": "```", "sure": True})),
        (call, ParsedTurn(tool_calls=(ParsedCall("edit_file", {"path": "a"}),))),
    ):
        expected = replace(turn, has_object=not turn.tool_calls)
        fenced = f"```json\n{text}\n```"
        matcher = grammar.matcher()
        matcher.accept(tiny_dialect.tokenizer.encode(fenced))
        assert matcher.is_terminated
        for cuts in ([], [3, 9], list(range(len(fenced)))):
            assert streamed(tiny_dialect, spec, cut(fenced, cuts)) == (expected, expected)
        for broken in (fenced[:-1], "```json\n", "```json\n{", fenced[:30]):
            with pytest.raises(GrammarError):
                tiny_dialect.parse(broken, spec)
        with pytest.raises(GrammarError, match="in place of"):
            tiny_dialect.parse(fenced + "!", spec)
    prose = "```json is a fence.\n```"
    assert grammar.matcher().accepts_prefix(tiny_dialect.tokenizer.encode(prose)) > 8
    assert tiny_dialect.parse(prose, spec) == ParsedTurn(prose)


def test_without_text_a_result_stands_alone(tiny_dialect: Dialect) -> None:
    fenced = '```json\n{"answer": "a", "sure": true}\n```'
    for name in ("calls or result", "result only"):
        grammar = tiny_dialect.grammar(SPECS[name])
        assert grammar is not None
        assert grammar.matcher().accepts_prefix(tiny_dialect.tokenizer.encode(fenced)) == 0


BROKEN = {
    "inside the arguments": ('<tool_call>\n{"name": "edit_file", "arguments": {"pa', "breaks off"),
    "inside the marker": ("<tool_c", "breaks off inside tool call 0"),
    "inside the name": ('<tool_call>\n{"name": "edit', "breaks off inside tool call 0"),
    "an unknown tool": ('<tool_call>\n{"name": "rm", ', "in place of a call of one of the tools"),
    "other keys": ('<tool_call>\n{"tool": "edit_file"', "in place of a call"),
    "more than a call": (
        '<tool_call>\n{"name": "list_files", "arguments": {}}\n</tool_call> Done.',
        "goes on with ' Done.'",
    ),
    "one call too many": (
        2 * '<tool_call>\n{"name": "list_files", "arguments": {}}\n</tool_call>\n',
        "more tool calls than the 1",
    ),
    "no call at all": ("Sorry", "in place of a tool call"),
    "nothing": ("", "the turn is empty"),
}


@pytest.mark.parametrize(("text", "message"), BROKEN.values(), ids=list(BROKEN))
def test_a_turn_that_its_grammar_forbids_is_refused(
    dialect_named: DialectNamed, text: str, message: str
) -> None:
    with pytest.raises(GrammarError, match=message):
        dialect_named("tiny-hermes").parse(text, SPECS["required"])


def test_a_broken_off_result_is_refused(tiny_dialect: Dialect) -> None:
    with pytest.raises(GrammarError, match="breaks off or is no JSON"):
        tiny_dialect.parse('{"answer": "wh', SPECS["result only"])


def _result_like_a_call(key: str) -> TurnSpec:
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string"}, key: {"type": "object"}},
        "required": ["name", key],
    }
    return TurnSpec(TOOLS, output_schema=schema, allow_text=False)


def test_a_result_that_could_pass_for_the_only_form_of_a_call_is_refused(
    dialect_named: DialectNamed,
) -> None:
    with pytest.raises(GrammarError, match="could begin like a call of 'edit_file'"):
        dialect_named("tiny-llama3").grammar(_result_like_a_call("parameters"))


def test_a_result_that_could_pass_for_a_bare_call_leaves_calls_to_the_markers(
    dialect_named: DialectNamed,
) -> None:
    dialect, spec = dialect_named("tiny-hermes"), _result_like_a_call("arguments")
    text = '{"name": "edit_file", "arguments": {}}'
    assert dialect.grammar(spec) is not None
    assert dialect.parse(text, spec).object == json.loads(text)
    marked = dialect.form.call("edit_file", '{"path": ""}')
    assert dialect.parse(marked, spec).tool_calls == (ParsedCall("edit_file", {"path": ""}),)


def test_a_scalar_result_cannot_stand_beside_text(tiny_dialect: Dialect) -> None:
    with pytest.raises(GrammarError, match="must be an object or an array"):
        tiny_dialect.grammar(TurnSpec(output_schema={"type": "integer"}))


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"type": "string"}, r"act\.parameters must describe an object"),
        ({"properties": {}}, r"act\.parameters must describe an object"),
        (
            {"type": "object", "properties": {"a": {"type": "string", "pattern": "(?!x)"}}},
            r"act\.parameters\.properties\.a\.pattern: .*look-around",
        ),
        (
            {"type": "object", "properties": {"a": {"not": {}}}},
            r"act\.parameters\.properties\.a\.not: the keyword 'not'",
        ),
    ],
)
def test_a_tool_schema_is_refused_by_tool_keyword_and_path(
    tiny_dialect: Dialect, parameters: dict[str, Any], message: str
) -> None:
    spec = TurnSpec((LIST, {"name": "act", "parameters": parameters}))
    with pytest.raises(GrammarError, match=f"(?s)^{message}"):
        tiny_dialect.grammar(spec)


def test_an_output_schema_is_refused_by_keyword_and_path(tiny_dialect: Dialect) -> None:
    broken = {"type": "object", "properties": {"when": {"type": "string", "format": "moon"}}}
    with pytest.raises(GrammarError, match=r"^output\.properties\.when\.format: Unknown format"):
        tiny_dialect.grammar(TurnSpec(TOOLS, output_schema=broken))


REFUSED_SPECS: dict[str, tuple[dict[str, Any], str]] = {
    "an unknown name": ({"tools": TOOLS, "tool_choice": {"name": "rm"}}, "names none of the tools"),
    "an unknown word": ({"tools": TOOLS, "tool_choice": "any"}, "'any' is unknown"),
    "required without tools": ({"tool_choice": "required"}, "there are no tools"),
    "twins": ({"tools": (LIST, LIST)}, "two tools are named 'list_files'"),
    "nothing to emit": ({"allow_text": False}, "may emit nothing"),
    "nothing left": ({"tools": TOOLS, "tool_choice": "none", "allow_text": False}, "emit nothing"),
    "no room": ({"tools": TOOLS, "max_calls": 0}, "max_calls is 0"),
    "no name": ({"tools": ({"description": "?"},)}, "needs a function with a name"),
    "a name with quotes": ({"tools": ({"name": 'a"b'},)}, "does not match"),
    "parameters that are none": ({"tools": ({"name": "a", "parameters": []},)}, "no JSON Schema"),
}


@pytest.mark.parametrize(("fields", "message"), REFUSED_SPECS.values(), ids=list(REFUSED_SPECS))
def test_a_contradictory_specification_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        TurnSpec(**fields)


def test_the_kind_of_a_step_is_what_it_may_write() -> None:
    kinds = {name: spec.kind for name, spec in SPECS.items()}
    assert kinds["required"] == kinds["named"] == kinds["auto, no text"] == StepKind.TOOL_CALL
    assert kinds["result only"] == kinds["scalar result"] == StepKind.TYPED_RESULT
    assert kinds["none"] == TurnSpec().kind == StepKind.TEXT
    assert kinds["auto"] == kinds["calls or result"] == kinds["result or text"] == StepKind.MIXED
