"""From grammar text to something a step can be constrained with, compiled once and kept."""

from __future__ import annotations

import re
import threading
from collections import OrderedDict
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from dspark_backend.errors import GrammarError, ModelFormatError
from dspark_backend.grammar.diagnose import locate_failure
from dspark_backend.grammar.matcher import Matcher
from dspark_backend.grammar.schema import json_rule, normalise
from dspark_backend.request import StepKind

if TYPE_CHECKING:
    from dspark_backend.tokenizer import Tokenizer

_CACHED_GRAMMARS = 256


class _CompileParser(Protocol):
    def __call__(self, source: str, *, free: bool = False) -> Matcher: ...


class Grammar:
    """One compiled grammar. Immutable and safe to share; every step takes its own matcher.

    ``source`` is the Lark text it was compiled from (llguidance's dialect), ``kind`` what a step
    under this grammar writes, ``end_of_turn_id`` the token that ends it.
    """

    __slots__ = ("_canonical", "_compile", "_free", "_lock", "end_of_turn_id", "kind", "source")

    def __init__(self, source: str, kind: StepKind, compile_parser: _CompileParser) -> None:
        self.source = source
        self.kind = kind
        self._compile = compile_parser
        self._lock = threading.Lock()
        self._canonical: Matcher = compile_parser(source)
        self._free: Matcher | None = None
        self.end_of_turn_id: int = self._canonical.end_of_turn_id

    @property
    def words(self) -> int:
        """int32 words in a mask row of its matchers."""
        return self._canonical.words

    def matcher(self, *, canonical: bool = True) -> Matcher:
        """A fresh matcher at the start of the turn, in microseconds.

        ``canonical`` matchers allow one tokenisation of the bytes that must follow
        (``ForcedMode.CANONICAL``); the others allow all of them (``VERIFY`` and ``OFF``), and
        compile once more on first use.
        """
        with self._lock:
            if canonical:
                return self._canonical.fork()
            if self._free is None:
                self._free = self._compile(self.source, free=True)
            return self._free.fork()


class GrammarCompiler:
    """Compiles for one tokenizer, and keeps the last grammars by their text.

    llguidance's token tables take up to a second to build for a vocabulary of 150,000, so they
    are built with the first grammar; ``warm()`` does it earlier.
    """

    def __init__(
        self, tokenizer: Tokenizer, *, vocab_size: int = 0, end_of_turn_id: int | None = None
    ) -> None:
        """``vocab_size`` is the model's when its logits are wider than the tokenizer's table.

        Raises:
            ModelFormatError: no end-of-turn token is given and the tokenizer names none.
        """
        if end_of_turn_id is None:
            if not tokenizer.eos_token_ids:
                raise ModelFormatError(
                    "the tokenizer names no end-of-sequence token, so no constrained turn could"
                    " end: set eos_token_id in generation_config.json"
                )
            end_of_turn_id = tokenizer.eos_token_ids[0]
        self.end_of_turn_id: int = end_of_turn_id
        self.vocab_size: int = max(vocab_size, tokenizer.vocab_size)
        self._tokenizer = tokenizer
        self._tables: LLTokenizer | None = None
        self._grammars: OrderedDict[tuple[str, StepKind], Grammar] = OrderedDict()
        self._lock = threading.Lock()

    def warm(self) -> None:
        """Build the token tables now."""
        with self._lock:
            self._build_tables()

    def compile_json_schema(self, schema: Mapping[str, Any], where: str = "$") -> Grammar:
        """A grammar of the JSON values that ``schema`` (``where`` in errors) allows, in one fixed
        layout.

        Raises:
            GrammarError: names the keyword that cannot be honoured and its path in the schema.
        """
        rule = json_rule(normalise(schema, where))
        try:
            return self.compile_lark(f"start: {rule}", kind=StepKind.TYPED_RESULT)
        except GrammarError as error:
            raise self.blame({where: schema}, error) from error

    def compile_lark(self, text: str, *, kind: StepKind = StepKind.MIXED) -> Grammar:
        """A grammar from llguidance's dialect of Lark.

        Raises:
            GrammarError: the text is no grammar, or one that llguidance can only approximate.
        """
        key = (text, kind)
        with self._lock:
            cached = self._grammars.get(key)
            if cached is not None:
                self._grammars.move_to_end(key)
                return cached
            grammar = Grammar(text, kind, self._compile)
            self._grammars[key] = grammar
            if len(self._grammars) > _CACHED_GRAMMARS:
                self._grammars.popitem(last=False)
            return grammar

    def blame(self, schemas: Mapping[str, Mapping[str, Any]], error: GrammarError) -> GrammarError:
        """The error to raise when a grammar made of ``schemas`` (by name) failed to compile with
        ``error``: one that names the smallest part of a schema that fails by itself."""

        def fails(schema: dict[str, Any]) -> str | None:
            try:
                self.compile_lark(f"start: {json_rule(schema)}", kind=StepKind.TYPED_RESULT)
            except GrammarError as failure:
                return str(failure)
            return None

        for name, schema in schemas.items():
            found = locate_failure(schema, name, fails)
            if found is not None:
                return GrammarError(found)
        return error

    def _build_tables(self) -> LLTokenizer:
        if self._tables is None:
            try:
                self._tables = LLTokenizer(
                    self._tokenizer.json_text,
                    n_vocab=self.vocab_size,
                    eos_token=[self.end_of_turn_id],
                )
            except Exception as error:  # the Rust side raises bare ValueError and Exception
                raise ModelFormatError(
                    f"{self._tokenizer.json_path} cannot constrain generation: {error}"
                ) from error
        return self._tables

    def _compile(self, source: str, *, free: bool = False) -> Matcher:
        """A matcher at the start of ``source``; a free one allows every tokenisation."""
        tables = self._build_tables()
        canonical = _parser(tables, source)
        cores: tuple[LLMatcher, ...] = (canonical,)
        if free:
            cores = (_parser(tables, '%llguidance {"no_forcing": true}\n' + source), canonical)
        return Matcher(cores, tables, self.end_of_turn_id)


def _parser(tables: LLTokenizer, source: str) -> LLMatcher:
    core = LLMatcher(
        tables,
        LLMatcher.grammar_from_lark(source),
        log_level=0,
        limits=LLParserLimits(verbose_errors=False),
    )
    if not core.is_error():
        core.compute_bitmask()  # every copy starts with this mask; a hopeless grammar fails here
    problem = core.get_error() if core.is_error() else "; ".join(core.get_grammar_warnings())
    if problem:
        raise GrammarError(_readable(problem))
    return core


def _readable(problem: str) -> str:
    """llguidance's message without the dump of the grammar and without its own option names."""
    if problem.startswith("NoExtension"):
        return "the grammar allows no text at all"
    message = problem.split("\n   1 |", 1)[0].split("<non-verbose/>", 1)[0].strip()
    message = re.sub(r"^at \d+\(\d+\): failed to compile JSON schema: ", "", message)
    if message.startswith("oneOf constraints are not supported"):
        return "oneOf cannot be enforced unless its alternatives exclude each other; use anyOf"
    return message
