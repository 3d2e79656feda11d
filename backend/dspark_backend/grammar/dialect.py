"""How one model family talks: conversation to tokens, turn grammar, and turns read back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import TYPE_CHECKING, Any

from dspark_backend.errors import BackendError, GrammarError, ModelFormatError, RequestError
from dspark_backend.grammar.callformat import HERMES, LLAMA3, CallFormat, Unmarked
from dspark_backend.grammar.compile import Grammar, GrammarCompiler
from dspark_backend.grammar.generic import with_tools_in_words, without_system
from dspark_backend.grammar.messages import ChatMessage, template_messages
from dspark_backend.grammar.parser import TurnParser
from dspark_backend.grammar.spec import ParsedTurn, ToolSchema, TurnSpec, openai_tools
from dspark_backend.grammar.template import ChatTemplate
from dspark_backend.grammar.turn import turn_lark

if TYPE_CHECKING:
    from dspark_backend.checkpoint.config import TargetConfig
    from dspark_backend.tokenizer import Tokenizer

_RESULTS = ("a", "", "\n", " ", "7", "{", "<", "é")
"""Results that begin in as many ways as tokenizers merge what stands before."""


class Dialect:
    """A family whose chat template has a form of its own for tools.

    ``name`` is ``hermes``, ``llama3`` or ``generic``; ``form`` how a call is written;
    ``end_of_turn_id`` the token that the template writes after an assistant's words;
    ``compiler`` compiles grammars for ``tokenizer``.
    """

    def __init__(
        self, name: str, tokenizer: Tokenizer, form: CallFormat, *, vocab_size: int = 0
    ) -> None:
        self.name = name
        self.tokenizer = tokenizer
        self.form = form
        source = tokenizer.chat_template
        self._template = None if source is None else ChatTemplate(source, tokenizer)
        self.end_of_turn_id: int = self._end_of_turn()
        self.compiler = GrammarCompiler(
            tokenizer, vocab_size=vocab_size, end_of_turn_id=self.end_of_turn_id
        )

    def render_start(
        self, messages: Sequence[ChatMessage], tools: Sequence[ToolSchema] = ()
    ) -> list[int]:
        """Tokens of a new conversation, through the prompt for the assistant's first turn.

        Raises:
            RequestError: messages or tools are malformed, or the model has no chat template.
        """
        plain, shown = self._prepare(template_messages(messages), openai_tools(tools))
        return self._chat_template().start(plain, shown)

    def render_next(self, messages: Sequence[ChatMessage], *, closed: bool = True) -> list[int]:
        """The tokens to append to a log that ends with a generated assistant turn.

        ``closed`` says whether the log has that turn's end-of-turn token already. The cost does
        not grow with the conversation.

        Raises:
            RequestError: the messages are malformed, or the model has no chat template.
        """
        plain, _ = self._prepare(template_messages(messages), [])
        tokens = self._chat_template().following(plain)
        if closed and self.end_of_turn_id in tokens:
            return tokens[tokens.index(self.end_of_turn_id) + 1 :]
        return tokens

    def result_head(
        self, name: str | None, call_id: str | None = None, *, closed: bool = True
    ) -> list[int]:
        """The tokens that follow a turn with a call of ``name``, as far as they are the same
        whatever the call's result is; ``closed`` as in :meth:`render_next`.

        Found by rendering unlike results, so it holds for any template. A result that begins as no
        probe does may still melt with the last token: compare before relying on it.

        Raises:
            RequestError: the model has no chat template.
        """
        message = {"role": "tool", "name": name, "tool_call_id": call_id}
        head = self.render_next([{**message, "content": _RESULTS[0]}], closed=closed)
        for content in _RESULTS[1:]:
            other = self.render_next([{**message, "content": content}], closed=closed)
            same = takewhile(lambda pair: pair[0] == pair[1], zip(head, other, strict=False))
            head = [token for token, _ in same]
        return head

    def grammar(self, spec: TurnSpec) -> Grammar | None:
        """The grammar of a turn; None where any text will do.

        Raises:
            GrammarError: names the keyword of a schema that cannot be honoured and its path.
        """
        if not spec.tools and spec.result_schema is None:
            return None
        text = turn_lark(spec, self.form, self._unmarked(spec), self.tokenizer.added_tokens)
        try:
            return self.compiler.compile_lark(text, kind=spec.kind)
        except GrammarError as error:
            schemas = {
                f"{f['name']}.parameters": f.get("parameters") or {} for f in spec.callable_tools
            }
            if spec.result_schema is not None:
                schemas["output"] = spec.result_schema
            raise self.compiler.blame(schemas, error) from error

    def parser(self, spec: TurnSpec) -> TurnParser:
        """A streaming parser for one turn under ``spec``."""
        return TurnParser(spec, self.form, self._unmarked(spec))

    def parse(self, text: str, spec: TurnSpec) -> ParsedTurn:
        """A whole turn's text (without its end-of-turn token) read back.

        Raises:
            GrammarError: the text is none that the turn's grammar allows.
        """
        parser = self.parser(spec)
        parser.feed(text)
        return parser.finish()

    def _prepare(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]]
    ) -> tuple[Sequence[Mapping[str, Any]], Sequence[Mapping[str, Any]]]:
        """Messages and tools as the template is to see them."""
        return messages, tools

    def _chat_template(self) -> ChatTemplate:
        if self._template is None:
            raise RequestError(
                "the model has no chat template, so messages cannot be rendered: use an"
                " instruction-tuned model, or give the step its tokens directly"
            )
        return self._template

    def _end_of_turn(self) -> int:
        added = set(self.tokenizer.added_tokens.values())
        tail = self._template.following([]) if self._template is not None else []
        for token in (*(token for token in tail if token in added), *self.tokenizer.eos_token_ids):
            return token
        raise ModelFormatError(
            "neither the chat template nor generation_config.json names a token that ends a turn"
        )

    def _unmarked(self, spec: TurnSpec) -> tuple[Unmarked, ...]:
        """The ways in which a call may be written without markers in such a turn.

        Where calls are demanded, only markers will do. Beside text, the family's habits are calls
        too, or they would be lost as text. Beside a result, a bare call is told from it by its
        first keys, so no result may begin like one.
        """
        bare = self.form.habits[:1]
        if not spec.callable_tools:
            return ()
        if spec.result_schema is not None:
            clash = self._result_like_a_call(spec, spec.result_schema)
            if clash is None or self.form.open:
                return bare if clash is None else ()
            raise GrammarError(
                f"output: a result could begin like a call of {clash!r}; rename its properties"
                f" 'name' and {self.form.arguments_key!r}"
            )
        if self.form.open:
            return self.form.habits if spec.may_write_text else ()
        return bare

    def _result_like_a_call(self, spec: TurnSpec, schema: Mapping[str, Any]) -> str | None:
        """The tool with whose call a result could be confused."""
        results = self.compiler.compile_json_schema(schema, "output")
        for function in spec.callable_tools:
            head = self.tokenizer.encode_plain(self.form.head(function["name"]))
            if results.matcher().accepts_prefix(head) == len(head):
                return str(function["name"])
        return None


class GenericDialect(Dialect):
    """A model whose template knows no tools: they are put into words (see ``generic``)."""

    def __init__(self, tokenizer: Tokenizer, *, vocab_size: int = 0) -> None:
        super().__init__("generic", tokenizer, HERMES, vocab_size=vocab_size)
        self._takes_system = self._template is None or _takes_system(self._template)

    def _prepare(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]]
    ) -> tuple[Sequence[Mapping[str, Any]], Sequence[Mapping[str, Any]]]:
        worded = with_tools_in_words(messages, tools)
        return (worded if self._takes_system else without_system(worded)), ()


def dialect_for(tokenizer: Tokenizer, config: TargetConfig) -> Dialect:
    """The dialect that the model's own chat template writes: each form is tried by rendering a
    call with it; ``generic`` when the template shows neither tools nor calls.

    Raises:
        ModelFormatError: the template does not parse, or no token ends a turn.
    """
    if tokenizer.chat_template is not None:
        template = ChatTemplate(tokenizer.chat_template, tokenizer)
        for form in (HERMES, LLAMA3):
            if _writes(template, form):
                return Dialect(form.name, tokenizer, form, vocab_size=config.vocab_size)
    return GenericDialect(tokenizer, vocab_size=config.vocab_size)


def _writes(template: ChatTemplate, form: CallFormat) -> bool:
    call = {"type": "function", "function": {"name": "probe", "arguments": {"place": "here"}}}
    messages: list[Mapping[str, Any]] = [
        {"role": "user", "content": "."},
        {"role": "assistant", "content": "", "tool_calls": [call]},
    ]
    try:
        rendered = template.text(messages)
    except BackendError:
        return False
    return form.call("probe", '{"place": "here"}') in rendered


def _takes_system(template: ChatTemplate) -> bool:
    try:
        text = template.text(
            [{"role": "system", "content": "probe"}, {"role": "user", "content": "."}]
        )
    except BackendError:
        return False
    return "probe" in text
