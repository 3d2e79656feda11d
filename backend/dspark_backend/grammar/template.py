"""A model's chat template: messages to tokens, with foreign text kept from posing as structure.

Text that spells a special token (``<|im_end|>`` in a file that a tool has read) must not end a
turn. Before rendering, such spellings get a *breaker* character put into them; the rendered text
is then split at the special tokens that are left, which are the template's own, and the pieces in
between are encoded as mere text with the breakers taken out again. Without such spellings this is
the plain encoding of the rendered text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from dspark_backend.errors import ModelFormatError, RequestError
from dspark_backend.grammar.messages import all_strings

if TYPE_CHECKING:
    from dspark_backend.tokenizer import Tokenizer

# Unicode noncharacters: never assigned, so texts that hold all of them do not occur.
_NONCHARACTERS = [chr(code) for code in range(0xFDD0, 0xFDF0)]

# Structure that templates look for in what an assistant said before.
_REASONING_MARKS = ("<think>", "</think>")

# What running a template on unfitting messages can raise: it is a program from a model's author.
_TEMPLATE_FAILURES = (
    jinja2.TemplateError,
    ArithmeticError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)

VARIABLES: Mapping[str, Any] = {"enable_thinking": False}
"""What every template sees. Reasoning is off: a step's grammar starts with the answer, and a step
is meant to be short."""


class ChatTemplate:
    """One compiled template with the tokenizer that its text is for."""

    def __init__(self, source: str, tokenizer: Tokenizer) -> None:
        """Raises ModelFormatError when ``source`` is no Jinja template."""
        self.source = source
        self._tokenizer = tokenizer
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateError as error:
            raise ModelFormatError(f"the model's chat template does not parse: {error}") from error
        spelled = (token for token in tokenizer.added_tokens if len(token) > 1)
        longest_first = sorted(spelled, key=len, reverse=True)
        self._special = _any_of(longest_first)
        self._special_in_reply = _any_of(t for t in longest_first if t not in _REASONING_MARKS)
        self._globals = {
            **VARIABLES,
            "bos_token": self._spelling(tokenizer.bos_token_id),
            "eos_token": self._spelling(next(iter(tokenizer.eos_token_ids), None)),
        }

    def start(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]
    ) -> list[int]:
        """Tokens of a conversation through the prompt for the assistant's turn.

        Raises:
            RequestError: the template refuses these messages.
        """
        breaker, _ = _unused_characters(messages, tools)
        return self._encode(self._render(messages, tools, breaker), breaker)

    def following(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Tokens that follow an assistant's words: the end of its turn, ``messages``, the prompt
        for its next turn. The cost does not grow with the conversation.

        Raises:
            RequestError: the template refuses these messages.
            ModelFormatError: the template does not write the assistant's words as they are.
        """
        breaker, words = _unused_characters(messages, ())
        before = [{"role": "user", "content": "."}, {"role": "assistant", "content": words}]
        parts = self._render([*before, *messages], (), breaker).split(words)
        if len(parts) != 2:
            raise ModelFormatError(
                "the model's chat template does not write an assistant's text exactly once, so a"
                " conversation cannot be continued by appending to it"
            )
        return self._encode(parts[1], breaker)

    def text(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """The rendered conversation as text, without a prompt for another turn."""
        return self._render(messages, (), "", prompt=False)

    def _render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]],
        breaker: str,
        *,
        prompt: bool = True,
    ) -> str:
        shielded = []
        for message in messages:
            spellings = self._special
            if message["role"] == "assistant":
                spellings = self._special_in_reply
            shielded.append(_shield(message, spellings, breaker))
        try:
            return self._template.render(
                messages=shielded,
                tools=_shield(list(tools), self._special, breaker) or None,
                documents=None,
                add_generation_prompt=prompt,
                **self._globals,
            )
        except _TEMPLATE_FAILURES as error:
            raise RequestError(
                f"the model's chat template refuses these messages: {error}"
            ) from error

    def _encode(self, rendered: str, breaker: str) -> list[int]:
        if breaker not in rendered:
            return self._tokenizer.encode(rendered)
        ids: list[int] = []
        place = 0
        for match in self._special.finditer(rendered):
            ids += self._encode_plain(rendered[place : match.start()], breaker)
            ids.append(self._tokenizer.added_tokens[match[0]])
            place = match.end()
        return ids + self._encode_plain(rendered[place:], breaker)

    def _encode_plain(self, piece: str, breaker: str) -> list[int]:
        return self._tokenizer.encode_plain(piece.replace(breaker, "")) if piece else []

    def _spelling(self, token: int | None) -> str:
        return "" if token is None else self._tokenizer.decode([token])


def _unused_characters(*values: Any) -> tuple[str, str]:
    used = set("".join(text for value in values for text in all_strings(value)))
    free = [char for char in _NONCHARACTERS if char not in used]
    if len(free) < 2:
        raise RequestError("the messages use up all Unicode noncharacters U+FDD0 to U+FDEF")
    return free[0], free[1]


def _shield(value: Any, spellings: re.Pattern[str], breaker: str) -> Any:
    """A copy of ``value`` whose strings (mapping keys too) spell no special token."""
    if isinstance(value, str):
        return spellings.sub(lambda match: match[0][0] + breaker + match[0][1:], value)
    if isinstance(value, Mapping):
        return {
            _shield(key, spellings, breaker): _shield(part, spellings, breaker)
            for key, part in value.items()
        }
    if isinstance(value, list | tuple):
        return [_shield(part, spellings, breaker) for part in value]
    return value


def _any_of(texts: Iterable[str]) -> re.Pattern[str]:
    pattern = "|".join(re.escape(text) for text in texts)
    return re.compile(pattern or r"(?!)")


class _GenerationMarks(Extension):
    """``{% generation %}`` marks an assistant's words for training; here it only frames them."""

    tags = {"generation"}  # noqa: RUF012 - Jinja declares it as an instance's

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> ImmutableSandboxedEnvironment:
    """Jinja as transformers sets it up for chat templates, in the sandbox."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _GenerationMarks]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without Jinja's escaping for HTML."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)
