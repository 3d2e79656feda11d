"""One grammar for everything a turn may be: tool calls or a typed result or text."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from dspark_backend.errors import GrammarError
from dspark_backend.grammar.callformat import FENCE_CLOSE, FENCE_OPEN, CallFormat, Unmarked
from dspark_backend.grammar.schema import first_characters, json_rule, normalise
from dspark_backend.grammar.spec import TurnSpec


def turn_lark(
    spec: TurnSpec, form: CallFormat, unmarked: Sequence[Unmarked], token_ids: Mapping[str, int]
) -> str:
    """The Lark text of the turn's grammar.

    ``unmarked`` are the ways in which a call may be written without markers (see ``callformat``).
    ``token_ids`` are the tokenizer's added tokens: a marker that is one of them is matched as that
    token, otherwise as text. Text can spell neither a marker nor the beginning of an unmarked
    call, so what is written decides by itself how it is to be read.

    Raises:
        GrammarError: a schema cannot be honoured, or could not be told from text.
    """
    writer = _TurnWriter(spec, form, unmarked, token_ids)
    alternatives = [*writer.results(), *writer.calls(), *writer.texts()]
    return "\n".join([f"start: {' | '.join(alternatives)}", *writer.rules])


def call_parameters(function: Mapping[str, Any], *, pointer: str = "") -> dict[str, Any]:
    """The normalised schema of a tool's arguments; a tool that declares none takes none.

    Raises:
        GrammarError: the parameters cannot be honoured or are no object.
    """
    where = f"{function['name']}.parameters"
    declared = function.get("parameters") or {"type": "object", "properties": {}}
    if first_characters(normalise(declared, where)) != "{":
        raise GrammarError(f'{where} must describe an object: say "type": "object"')
    return normalise(declared, where, pointer=pointer)


def call_schema(function: Mapping[str, Any], form: CallFormat) -> dict[str, Any]:
    """The normalised schema of one call's JSON object.

    Raises:
        GrammarError: the tool's parameters cannot be honoured or are no object.
    """
    key = form.arguments_key
    parameters = call_parameters(function, pointer=f"/properties/{key}")
    return {
        "type": "object",
        "properties": {"name": {"const": function["name"]}, key: parameters},
        "required": ["name", key],
        "additionalProperties": False,
    }


class _TurnWriter:
    """Collects the rules that the alternatives of ``start`` refer to."""

    def __init__(
        self,
        spec: TurnSpec,
        form: CallFormat,
        unmarked: Sequence[Unmarked],
        token_ids: Mapping[str, int],
    ) -> None:
        self._spec = spec
        self._form = form
        self._unmarked = unmarked
        self._token_ids = token_ids
        # Beside a result, or where all calls are bare, text gives way to whatever begins like JSON.
        bare_calls_only = bool(spec.tools) and not form.open
        self._json_first = spec.result_schema is not None or bare_calls_only
        self.rules: list[str] = []

    def results(self) -> list[str]:
        schema = self._spec.result_schema
        if schema is None:
            return []
        result = normalise(schema, "output")
        if self._spec.may_write_text and set(first_characters(result)) - set("{["):
            raise GrammarError(
                "output: beside free text, a result must be an object or an array; put the value"
                " into an object"
            )
        self.rules.append(f"result: {json_rule(result)}")
        return ["result", *self._fenced("result")]

    def calls(self) -> list[str]:
        functions = self._spec.callable_tools
        if not functions:
            return []
        names = [f"call_{place}" for place in range(len(functions))]
        self.rules.append(f"call: {' | '.join(names)}")
        for name, function in zip(names, functions, strict=True):
            self.rules.append(f"{name}: {json_rule(call_schema(function, self._form))}")
        marked = self._marked_calls() if self._form.open else []
        if self._json_first:
            return [*marked, "call", *self._fenced("call")] if self._unmarked else marked
        return [*marked, *self._unmarked_calls()]

    def texts(self) -> list[str]:
        if not self._spec.may_write_text:
            return []
        rule = f"TEXT: /{self._text_regex()}/"
        if self._form.open:
            rule += f" & ~/(?s:.*){_regex(self._form.open)}(?s:.*)/"
        self.rules.append(rule)
        return ["TEXT"]

    def _marked_calls(self) -> list[str]:
        form = self._form
        padding = _literal(form.padding)
        body = _sequence(padding, "call", padding, self._marker(form.close))
        further = self._spec.call_limit - 1
        if further and form.separator is not None:
            again = _sequence(_literal(form.separator), self._marker(form.open), body)
            body += f" ({again}){{0,{further}}}"
        self.rules.append(f"calls: {body}")
        opening = self._marker(form.open)
        if not self._spec.may_write_text:
            return [f"{opening} calls"]
        if form.open in self._token_ids:
            return [f"TEXT? {opening} calls"]
        # Lazy: the first marker ends the text, whatever the rest of the token would spell.
        self.rules.append(f"opened[lazy]: /({self._text_regex()})?{_regex(form.open)}/")
        return ["opened calls"]

    def _unmarked_calls(self) -> list[str]:
        """Calls beside text: lazy heads, so that the text that spells one has become a call."""
        rules = []
        for place, function in enumerate(self._spec.callable_tools if self._unmarked else ()):
            self.rules.append(f"arguments_{place}: {json_rule(call_parameters(function))}")
            for way, spelling in enumerate(self._unmarked):
                head = f"head_{place}_{way}"
                self.rules.append(f"{head}[lazy]: /{_regex(spelling.head(function['name']))}/")
                rules.append(_sequence(head, f"arguments_{place}", _literal(spelling.after)))
        return rules

    def _fenced(self, json: str) -> list[str]:
        """A rule beside text, with the fence that some models put around JSON."""
        if not (self._spec.may_write_text and self._spec.result_schema is not None):
            return []
        rule = f"{json}_fence"
        self.rules.append(f"{rule}[lazy]: /{_regex(FENCE_OPEN)}/")
        return [_sequence(rule, json, _literal(FENCE_CLOSE))]

    def _text_regex(self) -> str:
        return r"[^{\[\s](?s:.*)" if self._json_first else "(?s:.+)"

    def _marker(self, marker: str) -> str:
        token = self._token_ids.get(marker)
        return _literal(marker) if token is None else f"<[{token}]>"


def _sequence(*items: str) -> str:
    return " ".join(item for item in items if item)


def _literal(text: str) -> str:
    return json.dumps(text) if text else ""


def _regex(text: str) -> str:
    escaped = (char if char.isalnum() or char in "<>_ " else f"\\{char}" for char in text)
    return "".join(escaped).replace("\\\n", "\\n")
