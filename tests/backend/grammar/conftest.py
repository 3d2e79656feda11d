"""Dialects on tiny and real tokenizers, and walks through their grammars."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import AddedToken
from tokenizers import Tokenizer as CoreTokenizer

from dspark_backend.catalog import resolve
from dspark_backend.checkpoint.config import TargetConfig
from dspark_backend.grammar.compile import Grammar
from dspark_backend.grammar.dialect import Dialect, dialect_for
from dspark_backend.grammar.matcher import Matcher
from dspark_backend.tokenizer import Tokenizer

LegalTokens = Callable[[Matcher], list[int]]
Walk = Callable[..., list[int] | None]

_CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n'"
    " + message['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
_HERMES = (
    "{% if tools %}{{ '<|im_start|>system\\n' }}"
    "{% if messages[0].role == 'system' %}{{ messages[0].content + '\\n\\n' }}{% endif %}"
    "{{ '<tools>' }}{% for tool in tools %}{{ '\\n' + (tool | tojson) }}{% endfor %}"
    "{{ '\\n</tools> Call within <tool_call></tool_call>.<|im_end|>\\n' }}"
    "{% elif messages[0].role == 'system' %}"
    "{{ '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}{% endif %}"
    "{% for message in messages %}"
    "{% if message.role == 'user' or (message.role == 'system' and not loop.first) %}"
    "{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{% elif message.role == 'assistant' %}{{ '<|im_start|>assistant' }}"
    "{% if message.content %}{{ '\\n' + message.content }}{% endif %}"
    "{% for call in message.tool_calls or [] %}"
    '{{ \'\\n<tool_call>\\n{"name": "\' + call.function.name + \'", "arguments": \''
    " + (call.function.arguments | tojson) + '}\\n</tool_call>' }}{% endfor %}"
    "{{ '<|im_end|>\\n' }}"
    "{% elif message.role == 'tool' %}"
    "{% if loop.first or messages[loop.index0 - 1].role != 'tool' %}"
    "{{ '<|im_start|>user' }}{% endif %}"
    "{{ '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' }}"
    "{% if loop.last or messages[loop.index0 + 1].role != 'tool' %}"
    "{{ '<|im_end|>\\n' }}{% endif %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
_LLAMA3 = (
    "{{ bos_token }}{% macro head(role) %}"
    "{{ '<|start_header_id|>' + role + '<|end_header_id|>\\n\\n' }}{% endmacro %}"
    "{% if tools %}{{ head('system') + 'Answer with JSON to call a function.' }}"
    "{% for tool in tools %}{{ '\\n' + (tool | tojson(indent=4)) }}{% endfor %}"
    "{{ '<|eot_id|>' }}{% endif %}"
    "{% for message in messages %}{% if 'tool_calls' in message %}"
    "{% if message.tool_calls | length != 1 %}"
    "{{ raise_exception('only single tool-calls at once') }}{% endif %}"
    "{% set call = message.tool_calls[0].function %}"
    "{{ head('assistant') + '{\"name\": \"' + call.name + '\", \"parameters\": '"
    " + (call.arguments | tojson) + '}<|eot_id|>' }}"
    "{% elif message.role == 'tool' %}"
    "{{ head('ipython') + ({'output': message.content} | tojson) + '<|eot_id|>' }}"
    "{% else %}{{ head(message.role) + (message.content | trim) + '<|eot_id|>' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ head('assistant') }}{% endif %}"
)
_LLAMA3_TOKENS = (
    "<|begin_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|python_tag|>",
)
_KNOWN = {"smollm2": "smollm2-135m", "qwen2.5": "qwen2.5-coder-0.5b"}
TINY = ["tiny-generic", "tiny-hermes", "tiny-llama3"]
REAL = [
    pytest.param("smollm2", marks=pytest.mark.real_model),
    pytest.param("qwen2.5", marks=pytest.mark.slow),
]


@pytest.fixture(scope="session")
def model_folder(
    tiny_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """The folder with tokenizer and template of ``tiny-<dialect>``, ``smollm2`` or ``qwen2.5``."""
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            if name in _KNOWN:
                made[name] = resolve(_KNOWN[name]).folder
            else:
                family = "qwen2" if name == "tiny-hermes" else "llama"
                made[name] = tmp_path_factory.mktemp(name) / "model"
                shutil.copytree(tiny_checkpoint(family), made[name])
                _dress(made[name], name.removeprefix("tiny-"))
        return made[name]

    return folder


@pytest.fixture(scope="session")
def dialect_named(model_folder: Callable[[str], Path]) -> Callable[[str], Dialect]:
    """The dialect of a model by its test name; made once."""
    made: dict[str, Dialect] = {}

    def dialect(name: str) -> Dialect:
        if name not in made:
            folder = model_folder(name)
            made[name] = dialect_for(Tokenizer(folder), TargetConfig.from_folder(folder))
        return made[name]

    return dialect


@pytest.fixture(params=[*TINY, *REAL])
def dialect(request: pytest.FixtureRequest, dialect_named: Callable[[str], Dialect]) -> Dialect:
    """Every dialect, on tiny and on real tokenizers."""
    return dialect_named(request.param)


@pytest.fixture(params=TINY)
def tiny_dialect(
    request: pytest.FixtureRequest, dialect_named: Callable[[str], Dialect]
) -> Dialect:
    """Every dialect, on a tokenizer of a few hundred tokens."""
    return dialect_named(request.param)


@pytest.fixture(scope="session")
def legal_tokens() -> LegalTokens:
    """The ids whose bits are set in a matcher's mask, ascending."""
    return lambda matcher: _legal(matcher).tolist()


@pytest.fixture(scope="session")
def walk() -> Walk:
    """A random turn, token by token under the mask and without its end-of-turn token; None when
    it found no end within ``limit`` tokens. Tokens that close or open something are preferred."""

    def random_turn(
        grammar: Grammar,
        tokenizer: Tokenizer,
        rng: np.random.Generator,
        *,
        limit: int = 200,
        canonical: bool = True,
    ) -> list[int] | None:
        matcher = grammar.matcher(canonical=canonical)
        tokens: list[int] = []
        while len(tokens) < limit:
            legal = _legal(matcher)
            marks = [token for token in tokenizer.added_tokens.values() if token in legal]
            if marks and rng.random() < 0.15:
                legal = np.array(marks)
            elif rng.random() < 0.4:
                sample = rng.choice(legal, size=min(len(legal), 32))
                closing = [t for t in sample if set(tokenizer.token_bytes(int(t))) & set(b'"}]>')]
                legal = np.array(closing) if closing else legal
            token = int(rng.choice(legal))
            matcher.accept([token])
            if token == matcher.end_of_turn_id:
                return tokens
            tokens.append(token)
        return None

    return random_turn


def _legal(matcher: Matcher) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    row = torch.zeros(matcher.words, dtype=torch.int32)
    matcher.fill_mask(row)
    return np.flatnonzero(np.unpackbits(row.numpy().view(np.uint8), bitorder="little"))


def _dress(folder: Path, dialect: str) -> None:
    """Give a copied tiny checkpoint the template (and special tokens) of a dialect."""
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    template = {"generic": _CHATML, "hermes": _HERMES, "llama3": _LLAMA3}[dialect]
    settings["chat_template"] = template
    if dialect == "llama3":
        core = CoreTokenizer.from_file(str(folder / "tokenizer.json"))
        core.add_special_tokens([AddedToken(token, special=True) for token in _LLAMA3_TOKENS])
        core.save(str(folder / "tokenizer.json"))
        settings |= {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}
        end: dict[str, Any] = {"eos_token_id": [core.token_to_id("<|eot_id|>")]}
        (folder / "generation_config.json").write_text(json.dumps(end))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
