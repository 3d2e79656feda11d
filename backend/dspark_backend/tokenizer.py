"""Text to token ids and back: thin over ``tokenizers``, quick to import and to load."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as _Tokenizer

from dspark_backend.errors import ModelFormatError


class Tokenizer:
    """The tokenizer of a checkpoint folder, read from its ``tokenizer.json``.

    Never adds a begin-of-text token by itself: the chat template writes what it wants written.
    """

    def __init__(self, folder: Path) -> None:
        """Load ``tokenizer.json``, and the chat template and end tokens from the files beside it.

        Raises:
            ModelFormatError: the file is missing or damaged.
        """
        self.json_path = folder / "tokenizer.json"
        if not self.json_path.is_file():
            raise ModelFormatError(
                f"{folder} has no tokenizer.json: save the model's fast tokenizer there"
            )
        self._json_bytes = self.json_path.read_bytes()
        try:
            self._core: _Tokenizer = _Tokenizer.from_buffer(self._json_bytes)
        except Exception as error:  # the Rust loader raises bare Exception
            raise ModelFormatError(f"{self.json_path} is not a tokenizer: {error}") from error
        settings = _read_json(folder / "tokenizer_config.json")
        added = self._core.get_added_tokens_decoder()
        self.added_tokens: Mapping[str, int] = {t.content: i for i, t in added.items()}
        self.special_ids: frozenset[int] = frozenset(i for i, t in added.items() if t.special)
        self._added_contents: Mapping[int, str] = {i: t.content for i, t in added.items()}
        self._normalized_added = any(t.normalized for t in added.values())
        self.vocab_size: int = 1 + max(
            self._core.get_vocab_size(with_added_tokens=True) - 1, *added, -1
        )
        self.chat_template: str | None = _chat_template(folder, settings)
        self.eos_token_ids: tuple[int, ...] = end_of_turn_ids(folder)
        self.bos_token_id: int | None = self._named_token(settings.get("bos_token"))
        if not self.eos_token_ids:
            eos = self._named_token(settings.get("eos_token"))
            self.eos_token_ids = () if eos is None else (eos,)

    @property
    def json_text(self) -> str:
        """The whole ``tokenizer.json``, for libraries that build their own tables from it."""
        return self._json_bytes.decode("utf-8")

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``; what looks like a special token becomes that token.

        Bytes that the vocabulary lacks (SmolLM2's lacks a few control bytes) are dropped, as the
        model's own tokenizer does.
        """
        return list(self._core.encode(text, add_special_tokens=False).ids)

    def encode_plain(self, text: str) -> list[int]:
        """Token ids of ``text`` as mere text: no special token, whatever it spells.

        For text from outside (users, tools, files), which must not be able to end a turn.
        """
        seen = text
        if self._normalized_added and self._core.normalizer is not None:
            seen += "\0" + self._core.normalizer.normalize_str(text)
        if not any(content in seen for content in self.added_tokens):
            return self.encode(text)
        return list(self._plain.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int], skip_special: bool = False) -> str:
        """Text of ``ids``; bytes that are no UTF-8 become U+FFFD. Ids past the table are empty."""
        return str(self._core.decode(list(ids), skip_special_tokens=skip_special))

    def token_bytes(self, token_id: int) -> bytes:
        """The exact bytes that a token adds to a text; empty for ids without a token."""
        content = self._added_contents.get(token_id)
        if content is not None:
            return content.encode()
        token = self._core.id_to_token(token_id)
        if token is None:
            return b""
        if self._byte_level:
            return b"".join(
                bytes([value]) if (value := _BYTE_OF_CHAR.get(char)) is not None else char.encode()
                for char in token
            )
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            return bytes([int(token[3:5], 16)])
        return token.replace("▁", " ").encode()

    def stream(self, *, skip_special: bool = False) -> TokenStream:
        """A decoder for tokens that arrive a few at a time."""
        return TokenStream(self, skip_special=skip_special)

    @cached_property
    def _byte_level(self) -> bool:
        decoder = self._core.decoder
        return decoder is not None and b'"ByteLevel"' in decoder.__getstate__()

    @cached_property
    def _plain(self) -> _Tokenizer:
        """The same model without added tokens; built on first need, since few texts need it."""
        document = json.loads(self._json_bytes)
        return _Tokenizer.from_str(json.dumps({**document, "added_tokens": []}))

    def _named_token(self, value: Any) -> int | None:
        content = value.get("content") if isinstance(value, Mapping) else value
        return self._core.token_to_id(content) if isinstance(content, str) else None


class TokenStream:
    """Incremental decoding: text deltas that never hold half a character."""

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special else frozenset()
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, ids: Iterable[int]) -> str:
        """The text that became complete with these tokens; an unfinished character waits."""
        data = b"".join(self._tokenizer.token_bytes(i) for i in ids if i not in self._skipped)
        return self._decoder.decode(data)

    def flush(self) -> str:
        """What still waits, as U+FFFD; the stream can be used again."""
        return self._decoder.decode(b"", final=True)


def end_of_turn_ids(folder: Path) -> tuple[int, ...]:
    """Ids that end a turn, from ``generation_config.json``, else from ``config.json``.

    Empty when neither names one. Raises ModelFormatError when what they name is no token id.
    """
    for name in ("generation_config.json", "config.json"):
        value = _read_json(folder / name).get("eos_token_id")
        if value is None:
            continue
        ids = value if isinstance(value, list) else [value]
        if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
            raise ModelFormatError(f"{folder / name}: eos_token_id = {value!r} is no token id")
        return tuple(ids)
    return ()


def _chat_template(folder: Path, settings: Mapping[str, Any]) -> str | None:
    """``chat_template.jinja`` if there is one, else the (default) template of the config."""
    separate = folder / "chat_template.jinja"
    if separate.is_file():
        return separate.read_text("utf-8")
    template = settings.get("chat_template")
    if isinstance(template, list):
        named = {t.get("name"): t.get("template") for t in template if isinstance(t, Mapping)}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON object; empty when there is no such file."""
    try:
        value = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ModelFormatError(f"{path} is not readable JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelFormatError(f"{path} holds no JSON object")
    return value


def _byte_characters() -> dict[str, int]:
    """GPT-2's table (Radford et al. 2019): each byte has a printable character that stands for it.

    Printable Latin-1 bytes stand for themselves, the others for U+0100 and up, in byte order.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    table.update({chr(0x100 + rank): byte for rank, byte in enumerate(hidden)})
    return table


_BYTE_OF_CHAR = _byte_characters()
