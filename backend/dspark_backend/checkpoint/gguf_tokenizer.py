"""A GGUF file's vocabulary as ``tokenizer.json`` and the files beside it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from enum import IntEnum
from typing import Any, TypeVar

from dspark_backend.checkpoint.gguf import GGUFFile
from dspark_backend.errors import ModelFormatError

_T = TypeVar("_T")


class TokenType(IntEnum):
    """GGUF's ``tokenizer.ggml.token_type``."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


# Tokens that end a turn in one family or another, whatever the file names as its end token.
_END_OF_TURN = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|endoftext|>", "<|end_of_text|>")

_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False}
_WORDS_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_WORDS_QWEN2 = _WORDS_LLAMA3.replace("{1,3}", "")


def _split(pattern: str) -> list[dict[str, Any]]:
    split = {
        "type": "Split",
        "pattern": {"Regex": pattern},
        "behavior": "Isolated",
        "invert": False,
    }
    return [split, {**_BYTE_LEVEL, "use_regex": False}]


# How a text falls into words before merging, by the name GGUF gives it (tokenizer.ggml.pre).
_PRE_TOKENIZERS: Mapping[str, list[dict[str, Any]]] = {
    "default": [{**_BYTE_LEVEL, "use_regex": True}],
    "gpt-2": [{**_BYTE_LEVEL, "use_regex": True}],
    "smollm": [
        {"type": "Digits", "individual_digits": True},
        {**_BYTE_LEVEL, "use_regex": True},
    ],
    "qwen2": _split(_WORDS_QWEN2),
    "llama-bpe": _split(_WORDS_LLAMA3),
}


def tokenizer_files(file: GGUFFile, context_length: int) -> dict[str, dict[str, Any]]:
    """``tokenizer.json``, ``tokenizer_config.json`` and ``generation_config.json`` as objects.

    ``context_length`` is the model's, in tokens.

    Raises:
        ModelFormatError: the vocabulary is damaged, or of a kind that is not supported.
    """
    tokens, types = _vocabulary(file)
    kind = file.metadata.get("tokenizer.ggml.model")
    if kind == "gpt2":
        document = _byte_level_bpe(file, tokens, types)
    elif kind == "llama":
        document = _sentencepiece_bpe(file, tokens, types)
    else:
        raise ModelFormatError(f"{file.path}: tokenizer.ggml.model {kind!r} is not supported")
    return {
        "tokenizer.json": document,
        "tokenizer_config.json": _tokenizer_config(file, tokens, context_length),
        "generation_config.json": _generation_config(file, tokens),
    }


def _vocabulary(file: GGUFFile) -> tuple[list[str], list[int]]:
    """Tokens and their types, without the unused ones that pad the table's end."""
    tokens = _list_of(file, "tokenizer.ggml.tokens", str)
    types = [int(TokenType.NORMAL)] * len(tokens)
    if "tokenizer.ggml.token_type" in file.metadata:
        types = _list_of(file, "tokenizer.ggml.token_type", int)
    if len(types) != len(tokens):
        raise ModelFormatError(
            f"{file.path}: {len(tokens)} tokens but {len(types)} entries of token_type"
        )
    used = len(tokens)
    while used and types[used - 1] == TokenType.UNUSED:
        used -= 1
    if not used:
        raise ModelFormatError(f"{file.path}: the vocabulary is empty")
    if len(set(tokens[:used])) != used:
        raise ModelFormatError(f"{file.path}: the vocabulary has the same token twice")
    return tokens[:used], types[:used]


def _byte_level_bpe(file: GGUFFile, tokens: list[str], types: list[int]) -> dict[str, Any]:
    pre = file.metadata.get("tokenizer.ggml.pre", "default")
    if not isinstance(pre, str) or pre not in _PRE_TOKENIZERS:
        raise ModelFormatError(
            f"{file.path}: pre-tokenizer {pre!r} is not supported; known are "
            + ", ".join(_PRE_TOKENIZERS)
        )
    merges = [line.split(" ") for line in _list_of(file, "tokenizer.ggml.merges", str)]
    if any(len(pair) != 2 for pair in merges):
        raise ModelFormatError(f"{file.path}: tokenizer.ggml.merges holds a line that is no pair")
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added_tokens(tokens, types),
        "normalizer": {"type": "NFC"} if pre == "qwen2" else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": _PRE_TOKENIZERS[pre]},
        "post_processor": {**_BYTE_LEVEL, "use_regex": False},
        "decoder": {**_BYTE_LEVEL, "use_regex": False},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": pre == "llama-bpe",
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": merges,
        },
    }


def _sentencepiece_bpe(file: GGUFFile, tokens: list[str], types: list[int]) -> dict[str, Any]:
    """Llama 2's kind: pieces with scores, a space is U+2581, unknown characters fall to bytes."""
    scores = _list_of(file, "tokenizer.ggml.scores", float)
    if len(scores) < len(tokens):
        raise ModelFormatError(f"{file.path}: tokenizer.ggml.scores is too short")
    prefix = bool(file.metadata.get("tokenizer.ggml.add_space_prefix", True))
    unknown = [
        token for token, kind in zip(tokens, types, strict=True) if kind == TokenType.UNKNOWN
    ]
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    normalizers = [*([{"type": "Prepend", "prepend": "▁"}] if prefix else []), replace]
    decoders: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if prefix:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added_tokens(tokens, types),
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": next(iter(unknown), None),
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": _merges_of_scores(tokens, types, scores),
        },
    }


def _merges_of_scores(
    tokens: Sequence[str], types: Sequence[int], scores: Sequence[float]
) -> list[tuple[str, str]]:
    """Every way to make a piece of two others, the best piece first: SentencePiece's BPE order."""
    ids = {token: i for i, token in enumerate(tokens) if types[i] == TokenType.NORMAL}
    pairs = [
        (-scores[i], ids[token[:cut]], ids[token[cut:]])
        for token, i in ids.items()
        for cut in range(1, len(token))
        if token[:cut] in ids and token[cut:] in ids
    ]
    return [(tokens[left], tokens[right]) for _, left, right in sorted(pairs)]


def _added_tokens(tokens: list[str], types: list[int]) -> list[dict[str, Any]]:
    special = (TokenType.CONTROL, TokenType.UNKNOWN)
    return [
        {
            "id": i,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": kind in special,
        }
        for i, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if kind in (*special, TokenType.USER_DEFINED)
    ]


def _tokenizer_config(file: GGUFFile, tokens: list[str], context_length: int) -> dict[str, Any]:
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": context_length,
    }
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        token_id = _token_id(file, f"tokenizer.ggml.{key}_token_id", tokens)
        if token_id is not None:
            config[f"{name}_token"] = tokens[token_id]
    template = file.metadata.get("tokenizer.chat_template")
    if isinstance(template, str):
        config["chat_template"] = template
    return config


def _generation_config(file: GGUFFile, tokens: list[str]) -> dict[str, Any]:
    """The end-of-turn tokens: those the file names, then those the vocabulary is known for."""
    ids = {token: i for i, token in enumerate(tokens) if re.fullmatch(r"<.*>", token)}
    named = [
        _token_id(file, f"tokenizer.ggml.{name}_token_id", tokens) for name in ("eos", "eot", "eom")
    ]
    ends = [*named, *(ids.get(token) for token in _END_OF_TURN)]
    config: dict[str, Any] = {"eos_token_id": list(dict.fromkeys(i for i in ends if i is not None))}
    for name, key in (("bos", "bos"), ("pad", "padding")):
        token_id = _token_id(file, f"tokenizer.ggml.{key}_token_id", tokens)
        if token_id is not None:
            config[f"{name}_token_id"] = token_id
    return config


def _token_id(file: GGUFFile, key: str, tokens: list[str]) -> int | None:
    value = file.metadata.get(key)
    if value is None:
        return None
    if not isinstance(value, int) or not 0 <= value < len(tokens):
        raise ModelFormatError(f"{file.path}: {key} = {value!r} is not in the vocabulary")
    return value


def _list_of(file: GGUFFile, key: str, kind: type[_T]) -> list[_T]:
    value = file.metadata.get(key)
    if not isinstance(value, list) or not all(isinstance(item, kind) for item in value):
        raise ModelFormatError(f"{file.path}: {key} is missing or no list of {kind.__name__}")
    return value
