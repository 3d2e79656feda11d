"""Masks, forced spans and the cursor's moves, against naive readings of small languages."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dspark_backend.errors import GrammarError
from dspark_backend.grammar.compile import Grammar
from dspark_backend.grammar.dialect import Dialect
from dspark_backend.grammar.matcher import Matcher
from dspark_backend.grammar.spec import TurnSpec

DialectNamed = Callable[[str], Dialect]
LegalTokens = Callable[[Matcher], list[int]]
Walk = Callable[..., list[int] | None]

_COLOURS: dict[str, Any] = {
    "type": "object",
    "properties": {
        "colour": {"enum": ["red", "read", "blue"]},
        "on": {"type": "boolean"},
    },
    "required": ["colour"],
}
_PAINT = {"name": "paint", "parameters": _COLOURS}
_WAIT = {"name": "wait", "parameters": {"type": "object", "properties": {}}}


def _colour_values() -> list[str]:
    """Every JSON text that _COLOURS allows in the fixed layout."""
    plain = [{"colour": colour} for colour in _COLOURS["properties"]["colour"]["enum"]]
    full = [value | {"on": on} for value in plain for on in (True, False)]
    return [json.dumps(value) for value in (*plain, *full)]


def _atoms(text: str, dialect: Dialect) -> list[int]:
    """``text`` as bytes, with markers that are special tokens as one atom (256 + id)."""
    marks = dialect.tokenizer.added_tokens
    atoms: list[int] = []
    while text:
        mark = next((m for m in ("<tool_call>", "</tool_call>") if text.startswith(m)), "")
        if mark in marks:
            atoms.append(256 + marks[mark])
            text = text.removeprefix(mark)
        else:
            atoms += text[0].encode()
            text = text[1:]
    return atoms


def _token_atoms(token: int, dialect: Dialect) -> list[int]:
    if token in dialect.tokenizer.added_tokens.values():
        return [256 + token]
    return list(dialect.tokenizer.token_bytes(token))


def _naive_mask(language: list[list[int]], prefix: list[int], dialect: Dialect) -> list[int]:
    rest = [word[len(prefix) :] for word in language if word[: len(prefix)] == prefix]
    legal = {dialect.end_of_turn_id} if [] in rest else set()
    for token in range(dialect.tokenizer.vocab_size):
        atoms = _token_atoms(token, dialect)
        if atoms and any(word[: len(atoms)] == atoms for word in rest):
            legal.add(token)
    return sorted(legal)


def _turns(dialect: Dialect) -> tuple[TurnSpec, list[str]]:
    """A union of calls (marked or bare) and results, and all its texts."""
    spec = TurnSpec((_PAINT, _WAIT), output_schema={"enum": ["yes", "no"]}, allow_text=False)
    form = dialect.form
    written = [("paint", value) for value in _colour_values()] + [("wait", "{}")]
    marked = [form.call(name, value) for name, value in written]
    bare = [f"{form.head(name)}{value}}}" for name, value in written]
    return spec, [*marked, *bare, '"yes"', '"no"']


def test_the_mask_is_exactly_the_set_of_tokens_with_a_legal_continuation(
    tiny_dialect: Dialect, legal_tokens: LegalTokens
) -> None:
    spec, texts = _turns(tiny_dialect)
    grammar = tiny_dialect.grammar(spec)
    assert grammar is not None
    language = [_atoms(text, tiny_dialect) for text in texts]
    rng = np.random.default_rng(0)
    places = 0
    for _ in range(12):
        matcher, prefix = grammar.matcher(canonical=False), list[int]()
        while True:
            expected = _naive_mask(language, prefix, tiny_dialect)
            assert legal_tokens(matcher) == expected
            assert matcher.is_accepting == (matcher.end_of_turn_id in expected)
            assert matcher.is_terminated == (expected == [matcher.end_of_turn_id])
            places += 1
            token = int(rng.choice(expected))
            matcher.accept([token])
            if token == matcher.end_of_turn_id:
                break
            prefix += _token_atoms(token, tiny_dialect)
        assert prefix in language
    assert places > 100


def test_a_canonical_mask_narrows_only_where_bytes_are_forced(
    tiny_dialect: Dialect, legal_tokens: LegalTokens
) -> None:
    spec, _ = _turns(tiny_dialect)
    grammar = tiny_dialect.grammar(spec)
    assert grammar is not None
    rng = np.random.default_rng(1)
    narrowed = 0
    for _ in range(20):
        canonical, free = grammar.matcher(), grammar.matcher(canonical=False)
        while not canonical.is_terminated:
            forced = canonical.forced()
            legal, every = legal_tokens(canonical), legal_tokens(free)
            assert free.forced() == forced
            assert set(legal) <= set(every)
            assert legal == ([forced[0]] if forced else every)
            narrowed += legal != every
            token = int(rng.choice(legal))
            canonical.accept([token])
            free.accept([token])
    assert narrowed


def test_masks_one_by_one_spell_the_forced_span(
    dialect: Dialect, legal_tokens: LegalTokens
) -> None:
    grammar = dialect.grammar(TurnSpec((_PAINT,), tool_choice={"name": "paint"}))
    assert grammar is not None
    matcher = grammar.matcher()
    span = matcher.forced()
    for token in span:
        assert legal_tokens(matcher) == [token]
        matcher.accept([token])
    assert len(span) > 3


def test_a_named_choice_forces_everything_up_to_the_first_value(dialect: Dialect) -> None:
    tool = {
        "name": "edit_file",
        "parameters": {"type": "object", "properties": {"path": {"type": "string"}}}
        | {"required": ["path"]},
    }
    grammar = dialect.grammar(TurnSpec((tool,), tool_choice={"name": "edit_file"}))
    assert grammar is not None
    span = dialect.tokenizer.decode(grammar.matcher().forced())
    head = dialect.form.call("edit_file", '{"path": ').split("}")[0]
    # The quote may be left to the model: a longer token can hold it and the value's first letters.
    assert span.rstrip(' "') == head.rstrip()


def test_after_the_end_only_the_end_of_turn_is_legal_and_then_nothing(
    dialect: Dialect, legal_tokens: LegalTokens
) -> None:
    grammar = dialect.grammar(TurnSpec((_WAIT,), tool_choice="required"))
    assert grammar is not None
    matcher = grammar.matcher()
    while not matcher.is_terminated:
        matcher.accept(legal_tokens(matcher)[:1])
    assert legal_tokens(matcher) == [dialect.end_of_turn_id]
    assert matcher.forced() == []
    text_token = dialect.tokenizer.encode("a")[0]
    assert matcher.accepts_prefix([dialect.end_of_turn_id, text_token]) == 1
    matcher.accept([dialect.end_of_turn_id])
    assert matcher.is_terminated
    assert matcher.is_accepting
    assert matcher.accepts_prefix([text_token]) == 0
    with pytest.raises(GrammarError, match="has ended"):
        legal_tokens(matcher)


def test_an_illegal_token_is_named_and_changes_nothing(
    tiny_dialect: Dialect, legal_tokens: LegalTokens
) -> None:
    matcher = tiny_dialect.compiler.compile_json_schema({"enum": ["red"]}).matcher()
    before = legal_tokens(matcher)
    tokens = tiny_dialect.tokenizer.encode_plain('"rex')
    legal = matcher.accepts_prefix(tokens)
    assert 0 < legal < len(tokens)
    with pytest.raises(GrammarError, match=rf"token {tokens[legal]} .* place {legal} "):
        matcher.accept(tokens)
    assert matcher.accepted == 0
    assert legal_tokens(matcher) == before


@pytest.mark.parametrize("token", [-1, 10**7])
def test_ids_outside_the_vocabulary_are_illegal_not_fatal(
    tiny_dialect: Dialect, token: int
) -> None:
    matcher = tiny_dialect.compiler.compile_json_schema({"type": "boolean"}).matcher()
    assert matcher.accepts_prefix([token]) == 0
    with pytest.raises(GrammarError, match=f"token {token} "):
        matcher.accept([token])
    matcher.accept(matcher.forced() or tiny_dialect.tokenizer.encode_plain("true"))


def test_the_end_of_turn_is_legal_only_where_the_grammar_is_satisfied(
    tiny_dialect: Dialect,
) -> None:
    matcher = tiny_dialect.compiler.compile_lark("start: /[a-z]+/").matcher()
    end, letter = tiny_dialect.end_of_turn_id, tiny_dialect.tokenizer.encode("a")[0]
    assert matcher.accepts_prefix([end]) == 0
    assert matcher.accepts_prefix([letter, end, letter]) == 2
    with pytest.raises(GrammarError, match=f"token {end} "):
        matcher.accept([end])
    matcher.accept([letter, end])
    assert matcher.accepted == 2


@pytest.mark.parametrize("canonical", [True, False])
def test_a_fork_and_its_origin_go_on_as_a_fresh_replay(
    tiny_dialect: Dialect, legal_tokens: LegalTokens, canonical: bool
) -> None:
    spec = TurnSpec((_PAINT, _WAIT), parallel_tool_calls=True, max_calls=2)
    grammar = tiny_dialect.grammar(spec)
    assert grammar is not None
    rng = np.random.default_rng(2)
    matcher, tokens = grammar.matcher(canonical=canonical), list[int]()
    checkpoints = [(matcher.fork(), 0)]
    for step in range(200):
        ended = bool(tokens) and tokens[-1] == matcher.end_of_turn_id
        if ended or (tokens and rng.random() < 0.3):
            origin, length = checkpoints[int(rng.integers(len(checkpoints)))]
            matcher, tokens = origin.fork(), tokens[:length]
            checkpoints = [each for each in checkpoints if each[1] <= length]
        else:
            span = matcher.forced() if rng.random() < 0.5 else []
            span = span or [int(rng.choice(legal_tokens(matcher)))]
            matcher.accept(span)
            tokens += span
            checkpoints.append((matcher.fork(), len(tokens)))
        if step % 7 == 0:
            twin = matcher.fork()
            if not (tokens and tokens[-1] == matcher.end_of_turn_id):
                twin.accept([int(rng.choice(legal_tokens(twin)))])
        fresh = grammar.matcher(canonical=canonical)
        fresh.accept(tokens)
        assert matcher.accepted == len(tokens)
        assert matcher.is_accepting == fresh.is_accepting
        assert matcher.is_terminated == fresh.is_terminated
        assert matcher.forced() == fresh.forced()
        if not (tokens and tokens[-1] == matcher.end_of_turn_id):
            assert legal_tokens(matcher) == legal_tokens(fresh)


@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_accepts_prefix_counts_what_masks_would_allow(
    data: st.DataObject, dialect_named: DialectNamed, legal_tokens: LegalTokens
) -> None:
    dialect = dialect_named("tiny-hermes")
    grammar = dialect.compiler.compile_json_schema(_COLOURS)
    text = data.draw(st.sampled_from(_colour_values()))
    tokens = [*dialect.tokenizer.encode_plain(text), dialect.end_of_turn_id]
    noise = data.draw(st.lists(st.integers(0, dialect.tokenizer.vocab_size - 1), max_size=3))
    place = data.draw(st.integers(0, len(tokens)))
    proposed = tokens[:place] + noise + tokens[place:]
    expected, matcher = 0, grammar.matcher(canonical=False)
    for token in proposed:
        ended = expected and proposed[expected - 1] == matcher.end_of_turn_id
        if ended or token not in legal_tokens(matcher):
            break
        matcher.accept([token])
        expected += 1
    fresh = grammar.matcher()
    assert fresh.accepts_prefix(proposed) == expected
    assert fresh.accepted == 0


@pytest.mark.parametrize(
    "row",
    [
        pytest.param(torch.zeros(3, dtype=torch.int32), id="too short"),
        pytest.param(torch.zeros(10_000, dtype=torch.int32), id="too long"),
    ],
)
def test_a_row_of_the_wrong_shape_is_refused(tiny_dialect: Dialect, row: torch.Tensor) -> None:
    matcher = tiny_dialect.compiler.compile_json_schema({"type": "null"}).matcher()
    with pytest.raises(ValueError, match=rf"contiguous int32 \[{matcher.words}\]"):
        matcher.fill_mask(row)


def test_a_row_of_the_wrong_type_or_layout_is_refused(tiny_dialect: Dialect) -> None:
    matcher = tiny_dialect.compiler.compile_json_schema({"type": "null"}).matcher()
    strided = torch.zeros(2 * matcher.words, dtype=torch.int32)[::2]
    for row in (torch.zeros(matcher.words, dtype=torch.int64), strided):
        with pytest.raises(ValueError, match="contiguous int32"):
            matcher.fill_mask(row)


def test_a_mask_covers_the_models_vocabulary_where_that_is_wider(tiny_dialect: Dialect) -> None:
    # tiny models have 512 logits, their tokenizers fewer tokens
    assert tiny_dialect.tokenizer.vocab_size < 512
    assert tiny_dialect.compiler.compile_json_schema({}).words == 512 // 32


def test_grammars_are_compiled_once_by_content(tiny_dialect: Dialect) -> None:
    compiler = tiny_dialect.compiler
    first = compiler.compile_json_schema(_COLOURS)
    assert compiler.compile_json_schema(json.loads(json.dumps(_COLOURS))) is first
    other = compiler.compile_json_schema({**_COLOURS, "required": []})
    assert isinstance(other, Grammar)
    assert other is not first


def test_threads_share_grammars_and_not_matchers(dialect_named: DialectNamed, walk: Walk) -> None:
    dialect = dialect_named("tiny-hermes")
    spec = TurnSpec((_PAINT, _WAIT), "required", parallel_tool_calls=True, max_calls=3)

    def turn(seed: int) -> tuple[Grammar | None, list[int] | None]:
        grammar = dialect.grammar(spec)
        assert grammar is not None
        rng = np.random.default_rng(seed % 4)
        return grammar, walk(grammar, dialect.tokenizer, rng, canonical=seed % 8 < 4)

    with ThreadPoolExecutor(8) as pool:
        turns = list(pool.map(turn, range(32)))
    assert len({id(grammar) for grammar, _ in turns}) == 1
    for first, again in zip(turns[:8], turns[8:16], strict=True):
        assert first == again


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("start: missing", "missing"),
        ("start: /[/", "regex|unclosed"),
        ("start: A\nA: /b/ & ~/b/", "allows no text at all"),
        ("begin: /a/", "start"),
    ],
)
def test_a_text_that_is_no_grammar_is_refused(
    tiny_dialect: Dialect, source: str, message: str
) -> None:
    with pytest.raises(GrammarError, match=f"(?i){message}"):
        tiny_dialect.compiler.compile_lark(source)


def test_text_under_a_text_grammar_cannot_spell_a_marker(
    dialect_named: DialectNamed,
) -> None:
    for name, pieces in itertools.product(
        ("tiny-generic", "tiny-hermes"), (["<tool_call>"], ["<", "tool", "_call", ">"])
    ):
        dialect = dialect_named(name)
        grammar = dialect.grammar(TurnSpec((_WAIT,), tool_choice="none"))
        assert grammar is not None
        tokens = [t for piece in pieces for t in dialect.tokenizer.encode_plain(piece)]
        assert grammar.matcher().accepts_prefix(tokens) < len(tokens)
        assert grammar.matcher().accepts_prefix(tokens[:-1]) == len(tokens) - 1
