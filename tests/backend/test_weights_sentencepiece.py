"""Llama 2's kind of GGUF vocabulary: pieces with scores, held against SentencePiece's rule."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
from gguf import GGUFWriter
from hypothesis import given, settings
from hypothesis import strategies as st

from dspark_backend.checkpoint.convert import convert_gguf
from dspark_backend.errors import ModelFormatError
from dspark_backend.tokenizer import Tokenizer

CONTROL = ["<unk>", "<s>", "</s>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
PIECES = [
    *"▁abcdefst<>/",
    *("▁a", "ab", "abc", "bc", "cd", "▁ab", "abcd", "▁▁", "st", "est", "te", "▁t", "</", "s>"),
]
SCORES = {piece: -float(rank) for rank, piece in enumerate(reversed(PIECES))}


def _use_pieces(writer: GGUFWriter) -> None:
    tokens = [*CONTROL, *BYTES, *PIECES]
    unused = [f"[PAD{i}]" for i in range(512 - len(tokens))]
    for key in ("model", "pre", "tokens", "token_type", "merges", "eos_token_id"):
        del writer.kv_data[0][f"tokenizer.ggml.{key}"]
    writer.add_tokenizer_model("llama")
    writer.add_token_list([*tokens, *unused])
    writer.add_token_types([2, 3, 3, *[6] * 256, *[1] * len(PIECES), *[5] * len(unused)])
    writer.add_token_scores(
        [0.0] * 259 + [SCORES[piece] for piece in PIECES] + [-1e9] * len(unused)
    )
    writer.add_eos_token_id(2)


def _sentencepiece(text: str) -> list[str]:
    """Merge the neighbours that make the best piece until no pair makes one (Kudo 2018's BPE)."""
    symbols = list(("▁" + text.replace(" ", "▁")) if text else "")
    while True:
        candidates = [
            (SCORES[left + right], -i)
            for i, (left, right) in enumerate(itertools.pairwise(symbols))
            if left + right in SCORES
        ]
        if not candidates:
            return [
                piece
                for symbol in symbols
                for piece in (
                    [symbol]
                    if symbol in SCORES
                    else [f"<0x{byte:02X}>" for byte in symbol.encode()]
                )
            ]
        i = -max(candidates)[1]
        symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]


@pytest.fixture(scope="module")
def tokenizer(
    tiny_gguf: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Tokenizer:
    folder = tmp_path_factory.mktemp("sentencepiece")
    convert_gguf(tiny_gguf("llama", edit=_use_pieces), folder)
    return Tokenizer(folder)


@settings(max_examples=300, deadline=None)
@given(text=st.text(alphabet="abcdest </>é🙂\n", max_size=14))
def test_pieces_are_those_of_sentencepiece(tokenizer: Tokenizer, text: str) -> None:
    ids = {token: i for i, token in enumerate([*CONTROL, *BYTES, *PIECES])}
    expected = [ids[piece] for piece in _sentencepiece(text)]
    assert tokenizer.encode_plain(text) == expected
    assert tokenizer.decode(expected) == text


def test_control_tokens_parse_only_when_asked(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("</s>") == [2]
    assert 2 not in tokenizer.encode_plain("</s>")
    assert tokenizer.eos_token_ids == (2,)


def test_bytes_of_pieces(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode_plain("ab é")
    assert b"".join(tokenizer.token_bytes(i) for i in ids) == " ab é".encode()
    stream = tokenizer.stream()
    assert "".join(stream.feed([i]) for i in ids) + stream.flush() == " ab é"


def test_scores_must_cover_the_vocabulary(tiny_gguf: Callable[..., Path], tmp_path: Path) -> None:
    def edit(writer: GGUFWriter) -> None:
        _use_pieces(writer)
        del writer.kv_data[0]["tokenizer.ggml.scores"]
        writer.add_token_scores([0.0] * 10)

    with pytest.raises(ModelFormatError, match="scores"):
        convert_gguf(tiny_gguf("llama", edit=edit), tmp_path)
