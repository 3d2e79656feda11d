"""What was read, as JSON strings hold it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dspark_backend.catalog.models import open_checkpoint
from dspark_backend.speculation.quoting import quoted
from dspark_backend.tokenizer import Tokenizer

FILE = 'def greet(name):\n    return f"Hello, {name}\\n"\n\n\ngreet("you")\n'
LINES = st.lists(st.text("ab \"\\\t'{é", max_size=8), max_size=5).map("\n".join)


@pytest.fixture(scope="module")
def tokenizer(tiny_checkpoint: Callable[..., Path]) -> Tokenizer:
    return open_checkpoint("tiny", tiny_checkpoint("qwen3")).tokenizer()


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(LINES)
def test_it_reads_back_as_what_was_read(tokenizer: Tokenizer, text: str) -> None:
    documents = quoted(tokenizer.encode_plain(text), tokenizer)
    if json.dumps(text, ensure_ascii=False)[1:-1] == text:
        assert documents == []  # the log holds it as it is
    else:
        (document,) = documents
        assert json.loads(f'"{tokenizer.decode(document)}"') == text


def test_a_line_is_encoded_as_if_it_stood_alone(tokenizer: Tokenizer) -> None:
    (document,) = quoted(tokenizer.encode_plain(FILE), tokenizer)
    lines = [json.dumps(line)[1:-1] for line in FILE.splitlines(keepends=True)]
    assert document == [token for line in lines for token in tokenizer.encode(line)]


def test_special_tokens_part_documents(tokenizer: Tokenizer) -> None:
    mark = min(tokenizer.special_ids)
    first, second = tokenizer.encode_plain("a\nb"), tokenizer.encode_plain('"c"')
    assert quoted([mark, *first, mark, mark, *second], tokenizer) == [
        *quoted(first, tokenizer),
        *quoted(second, tokenizer),
    ]
