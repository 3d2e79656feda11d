"""The seam between a benchmark and whoever takes part in it: our engine and its peers.

A contender keeps one conversation as token ids. Every contender is given the same ids for the
same given text; what it wrote itself stays in its log as it wrote it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from dspark_backend.grammar.spec import TurnSpec
from dspark_backend.metrics import EngineMetrics
from dspark_backend.request import ForcedMode
from dspark_backend.speculation.account import CycleAccount
from dspark_backend.speculation.signals import Signals


@dataclass(frozen=True, slots=True)
class ContenderSpec:
    """What a contender loads. ``folder`` holds the converted weights and the tokenizer, ``gguf``
    the file they were converted from; ``end_token_ids`` end a turn; ``dialect`` names how this
    model writes tool calls. ``speculation`` and ``drafter`` (a checkpoint folder; ``None`` for the
    one that ships) are our engine's alone, as are ``policy`` (a budget policy's name, None for the
    engine's own), ``signals`` (None for all of them), ``forced`` (how tokens without a choice are
    taken) and ``kv_bytes`` (None for the engine's usual grant). ``device`` is a GPU that all
    compute on, None for the CPU."""

    model: str
    folder: Path
    gguf: Path | None
    dialect: str
    end_token_ids: tuple[int, ...]
    precision: str | None
    threads: int
    max_context: int
    speculation: bool = False
    drafter: Path | None = None
    policy: str | None = None
    signals: Signals | None = None
    forced: ForcedMode = ForcedMode.CANONICAL
    kv_bytes: int | None = None
    device: str | None = None


@dataclass(frozen=True, slots=True)
class Turn:
    """One model turn: ``tokens`` are appended to the conversation, then up to ``max_new_tokens``
    are written under ``spec`` (``None``: free text). Temperature 0 is greedy. ``explain`` asks our
    engine for an account of every cycle."""

    tokens: tuple[int, ...]
    max_new_tokens: int
    spec: TurnSpec | None = None
    temperature: float = 0.0
    seed: int = 0
    explain: bool = False


@dataclass(frozen=True, slots=True)
class Sample:
    """What a turn wrote and when. Seconds run from the turn's start, by the contender's own clock.

    ``token_ids`` include the end token if one was written; ``text`` does not. ``metrics`` of a
    peer fill in what can be seen from outside: prefill counts, ``ttft_s``, totals.
    """

    token_ids: tuple[int, ...]
    text: str
    ttft_s: float
    total_s: float
    metrics: EngineMetrics
    cycles: tuple[CycleAccount, ...] = ()

    @property
    def decode_s(self) -> float:
        """Seconds from the first new token to the last."""
        return self.total_s - self.ttft_s

    @property
    def tok_per_s(self) -> float | None:
        """Tokens after the first over ``decode_s``; ``None`` for a turn of a single token."""
        if len(self.token_ids) < 2 or self.decode_s <= 0.0:
            return None
        return (len(self.token_ids) - 1) / self.decode_s


@dataclass(frozen=True, slots=True)
class Loaded:
    """A contender that is ready. ``precision`` names the form of the weights; ``load_s`` is what
    loading took from files that were there already."""

    precision: str
    load_s: float


class Contender(Protocol):
    """A model that writes turns. Built from a :class:`ContenderSpec` in a process of its own."""

    loaded: Loaded

    def start(self) -> None:
        """Begins a new conversation; an earlier one's prefix may still be re-used."""
        ...

    def turn(self, turn: Turn) -> Sample:
        """Appends, writes, and keeps what was written in the conversation."""
        ...

    def close(self) -> None:
        """Releases the model."""
        ...
