"""``bench quality``: what a precision costs, as perplexity beside bf16 on a fixed text."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Final, Literal

import torch
from pydantic import BaseModel, ConfigDict

from dspark_backend.bench.errors import BenchError
from dspark_backend.bench.host import HostFacts, host_facts
from dspark_backend.catalog import ProgressSink, resolve
from dspark_backend.kernels import jit
from dspark_backend.processor import usable_cores
from dspark_backend.target.batch import Batch, Rows
from dspark_backend.target.decoder import Decoder
from dspark_backend.target.load import load_decoder
from dspark_backend.target.precision import Precision, default_precision

SCHEMA_VERSION: Final = 1
WINDOW = 512
"""Tokens a window; every token but a window's first is scored given those before it in it."""

_CHUNK = 64
_SAMPLE = "quality.txt"
_NO_LIMIT = 1 << 62


class QualityReport(BaseModel):
    """The JSON that ``bench quality`` writes. ``relative_change`` is perplexity over bf16's, less
    one; ``tokens`` counts the scored ones."""

    model_config = ConfigDict(frozen=True)

    schema_version: Literal[1] = SCHEMA_VERSION
    host: HostFacts
    model: str
    text: str
    precision: str
    tokens: int
    window: int
    perplexity: float
    reference_perplexity: float
    relative_change: float


@dataclass(frozen=True, slots=True)
class QualitySettings:
    """What to score. ``precision`` ``None`` takes the model's default, ``text`` ``None`` the
    sample that ships, ``threads`` ``None`` the usable cores."""

    model: str
    precision: str | None = None
    text: Path | None = None
    max_tokens: int = 4096
    threads: int | None = None

    def __post_init__(self) -> None:
        if self.max_tokens < 2:
            raise BenchError(f"tokens must be at least 2, not {self.max_tokens}")


OnTokens = Callable[[int, int], None]
"""Called as ``(tokens read, tokens to read)``, both precisions counted."""


def run_quality(
    settings: QualitySettings,
    *,
    progress: ProgressSink | None = None,
    on_tokens: OnTokens | None = None,
) -> QualityReport:
    """Scores the text twice and compares.

    Raises:
        BenchError: the text cannot be read or is too short.
        BackendError: the model cannot be found, fetched or read.
    """
    name, text = _text(settings.text)
    files = resolve(settings.model, progress=progress)
    if settings.precision is None:
        precision = default_precision(files.name)
    else:
        precision = Precision.parse(settings.precision)
    tokens = files.tokenizer().encode_plain(text)[: settings.max_tokens]
    if len(tokens) < 2:
        raise BenchError(f"{name} has {len(tokens)} tokens: nothing to score")
    # bf16 against itself is 1 by definition, so it is scored once.
    order = list(dict.fromkeys([Precision.BF16, precision]))
    nll: dict[Precision, float] = {}
    scored = 0
    with jit.threads(settings.threads or usable_cores()):
        for turn, each in enumerate(order):
            scored, read, losses = 0, turn * len(tokens), 0.0
            decoder = load_decoder(files, each, WINDOW, progress)
            for window in _windows(tokens):
                losses += _loss(decoder, window)
                scored += len(window) - 1
                read += len(window)
                if on_tokens is not None:
                    on_tokens(read, len(order) * len(tokens))
            nll[each] = losses / scored
    perplexity, reference = math.exp(nll[precision]), math.exp(nll[Precision.BF16])
    return QualityReport(
        host=host_facts(),
        model=settings.model,
        text=name,
        precision=precision.value,
        tokens=scored,
        window=WINDOW,
        perplexity=perplexity,
        reference_perplexity=reference,
        relative_change=perplexity / reference - 1.0,
    )


def _windows(tokens: Sequence[int]) -> Iterator[Sequence[int]]:
    """``tokens`` cut into windows; a last one of a single token has nothing to score."""
    for start in range(0, len(tokens), WINDOW):
        window = tokens[start : start + WINDOW]
        if len(window) > 1:
            yield window


def _loss(decoder: Decoder, window: Sequence[int]) -> float:
    """The summed negative log likelihood of a window's tokens after the first."""
    kv = decoder.storage(None, _NO_LIMIT).new()
    kv.reserve(len(window))
    loss = 0.0
    for first in range(0, len(window) - 1, _CHUNK):
        read = window[first : min(first + _CHUNK, len(window) - 1)]
        logits = decoder.forward(Batch([Rows(kv, read, len(read))])).logits
        kv.length += len(read)
        targets = torch.tensor(window[first + 1 : first + 1 + len(read)])
        loss += torch.nn.functional.cross_entropy(logits, targets, reduction="sum").item()
    return loss


def _text(path: Path | None) -> tuple[str, str]:
    """The text to score and what to call it."""
    if path is None:
        sample = resources.files("dspark_backend.bench").joinpath(_SAMPLE)
        return "sample", sample.read_text(encoding="utf-8")
    try:
        return path.name, path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BenchError(f"cannot read {path}: {error}") from error
