"""The block that one pass verifies: drafts, held against the grammar, with what it forces between.

Exact against plain decoding in the same mode (DSPARK.md, section 6): every row's mask is the one
that plain decoding would have used there, and where canonical mode would have committed a forced
token without a choice, the mask holds that token alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dspark_backend.grammar.bitmask import is_allowed
from dspark_backend.speculation.distribution import Distribution
from dspark_backend.speculation.trail import Trail

FORCED = "forced"

Distributions = tuple[Distribution | None, ...]


@dataclass(frozen=True, slots=True)
class Block:
    """``tokens[i]`` was proposed by ``sources[i]`` and drawn from ``distributions[i]``, None where
    it is a function of the context; empty where all are. ``masks[i]`` is what may follow the first
    i of them, one more than tokens, None where anything may (or nothing is looked at any more)."""

    tokens: tuple[int, ...] = ()
    sources: tuple[str, ...] = ()
    masks: tuple[torch.Tensor | None, ...] | None = None
    distributions: Distributions = ()


def unconstrained(
    drafts: Sequence[int], source: str, distributions: Sequence[Distribution | None] = ()
) -> Block:
    """The block of a step without a grammar."""
    return Block(tuple(drafts), (source,) * len(drafts), None, tuple(distributions))


def constrained(
    trail: Trail,
    drafts: Sequence[int],
    source: str,
    *,
    room: int,
    distributions: Sequence[Distribution | None] = (),
) -> Block:
    """Lay ``drafts`` out under the grammar, at most ``room`` tokens.

    Forced spans (canonical mode) are spliced in where they arise, also after the last draft; drafts
    that disagree with one are dropped. A draft that is not legal ends the block: *before* it where
    it is a function of the context, *after* it where it was sampled, for there it has to be
    rejected into the residual (dropping it would look at x_k to decide about position k).

    Raises GrammarError when the grammar dies on the way.
    """
    tokens: list[int] = []
    sources: list[str] = []
    masks: list[torch.Tensor | None] = []
    drawn: list[Distribution | None] = []
    waiting = list(zip(drafts, distributions or [None] * len(drafts), strict=True))
    while True:
        if tokens and trail.over(tokens):
            masks.append(None)  # the step ends here: no token is chosen from this row
            break
        mask = trail.mask(tokens)
        masks.append(mask)
        if len(tokens) >= room:
            break
        span = trail.span(tokens)
        if span:
            waiting = waiting[1:] if waiting and waiting[0][0] == span[0] else []
            tokens.append(span[0])
            sources.append(FORCED)
            drawn.append(None)
            continue
        if not waiting:
            break
        (token, distribution), *waiting = waiting
        legal = is_allowed(mask, token)
        if not legal and distribution is None:
            break
        tokens.append(token)
        sources.append(source)
        drawn.append(distribution)
        if not legal:
            masks.append(None)  # it is rejected for certain: this row is not looked at
            break
    sampled = any(distribution is not None for distribution in drawn)
    return Block(tuple(tokens), tuple(sources), tuple(masks), tuple(drawn) if sampled else ())
