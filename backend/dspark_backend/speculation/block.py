"""The block that one pass verifies: drafts, held against the grammar, with what it forces between.

Exact against plain decoding in the same mode (DSPARK.md, section 6): every row's mask is the one
that plain decoding would have used there, and where canonical mode would have committed a forced
token without a choice, the mask holds that token alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from dspark_backend.grammar.matcher import Matcher

FORCED = "forced"


@dataclass(frozen=True, slots=True)
class Block:
    """``tokens[i]`` was proposed by ``sources[i]``; ``masks[i]`` is what may follow the first i of
    them, one more than tokens, None where anything may (or nothing is looked at any more)."""

    tokens: tuple[int, ...] = ()
    sources: tuple[str, ...] = ()
    masks: tuple[torch.Tensor | None, ...] | None = None


def unconstrained(drafts: Sequence[int], source: str) -> Block:
    """The block of a step without a grammar."""
    return Block(tuple(drafts), (source,) * len(drafts))


def constrained(
    matcher: Matcher, drafts: Sequence[int], source: str, *, canonical: bool, room: int
) -> Block:
    """Lay ``drafts`` out under the grammar, at most ``room`` tokens; the matcher ends as it began.

    A draft that is not legal ends the block, as does one that disagrees with a forced span (in
    ``canonical`` mode spans are spliced in where they arise, also after the last draft).

    Raises GrammarError when the grammar dies on the way.
    """
    tokens: list[int] = []
    sources: list[str] = []
    masks: list[torch.Tensor | None] = []
    waiting = list(drafts)
    try:
        while True:
            if tokens and (tokens[-1] == matcher.end_of_turn_id or matcher.is_terminated):
                masks.append(None)  # the step ends here: no token is chosen from this row
                break
            span = matcher.forced() if canonical else []
            if span and len(tokens) >= room:
                masks.append(_only(span[0], matcher.words))
                break
            if span:
                span = span[: room - len(tokens)]
                waiting = waiting[len(span) :] if waiting[: len(span)] == span else []
                for token in span:
                    masks.append(_only(token, matcher.words))
                    matcher.accept([token])
                    tokens.append(token)
                    sources.append(FORCED)
                continue
            mask = torch.empty(matcher.words, dtype=torch.int32)
            matcher.fill_mask(mask)
            masks.append(mask)
            if not waiting or len(tokens) >= room or not matcher.accepts_prefix(waiting[:1]):
                break
            token = waiting.pop(0)
            matcher.accept([token])
            tokens.append(token)
            sources.append(source)
    finally:
        matcher.rollback(len(tokens))
    return Block(tuple(tokens), tuple(sources), tuple(masks))


def _only(token: int, words: int) -> torch.Tensor:
    mask = torch.zeros(words, dtype=torch.int32)
    # Bit 31 is the sign bit of an int32 word.
    bit = token % 32
    mask[token // 32] = -(2**31) if bit == 31 else 2**bit
    return mask
