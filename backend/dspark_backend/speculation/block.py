"""The block that one pass verifies: drafts, held against the grammar, with what it forces between.

Exact against plain decoding in the same mode (DSPARK.md, section 6): every row's mask is the one
that plain decoding would have used there, and where canonical mode would have committed a forced
token without a choice, the mask holds that token alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from dspark_backend.grammar.bitmask import is_allowed
from dspark_backend.speculation.distribution import Distribution
from dspark_backend.speculation.protocol import Proposal
from dspark_backend.speculation.trail import Trail

FORCED = "forced"


@dataclass(frozen=True, slots=True)
class Offer:
    """A proposal and the survival that experience gives its tokens, non-increasing."""

    proposal: Proposal
    survival: tuple[float, ...]

    @classmethod
    def as_said(cls, proposal: Proposal) -> Offer:
        """With the survival that the proposer itself states."""
        return cls(proposal, proposal.survival)

    @property
    def gain(self) -> float:
        """The tokens that it is expected to add, were all of it verified."""
        return sum(self.survival)


Extend = Callable[[Sequence[int]], Offer | None]
"""What may follow the log and these tokens, None or an offer that is not empty: asked where a block
would end otherwise."""

Origin = tuple[int, int] | None

# Where a block that goes on and on is cut: each of its places costs a mask, and the rest of what it
# would say is proposed again by the next cycle.
_LONGEST = 48
# A continuation that is less likely to be reached and right than this is not worth looking at.
_FLOOR = 0.1


@dataclass(frozen=True, slots=True)
class Block:
    """``tokens[i]`` was proposed by ``sources[i]`` and drawn from ``distributions[i]``, None where
    it is a function of the context; empty where all are. ``masks[i]`` is what may follow the first
    i of them, one more than tokens, None where anything may (or nothing is looked at any more).

    ``survival[i]`` is the probability that tokens 0..i all stand. ``origins[i]`` says which token
    of which of the ``offers`` it is, None for one that the grammar spliced in; ``refused`` is the
    origin of the draft that the grammar did not allow after the last token.
    """

    tokens: tuple[int, ...] = ()
    sources: tuple[str, ...] = ()
    masks: tuple[torch.Tensor | None, ...] | None = None
    distributions: tuple[Distribution | None, ...] = ()
    survival: tuple[float, ...] = ()
    offers: tuple[Offer, ...] = ()
    origins: tuple[Origin, ...] = ()
    refused: Origin = None

    def first(self, count: int) -> Block:
        """The block of its first ``count`` tokens."""
        if count >= len(self.tokens):
            return self
        return Block(
            self.tokens[:count],
            self.sources[:count],
            None if self.masks is None else self.masks[: count + 1],
            self.distributions[:count],
            self.survival[:count],
            self.offers,
            self.origins[:count],
        )

    @property
    def free(self) -> int:
        """Leading tokens that the grammar forces."""
        count = 0
        while count < len(self.tokens) and self.survival[count] == 1.0:
            if self.sources[count] is not FORCED:
                break
            count += 1
        return count

    def judged(self, accepted: int) -> list[tuple[Offer, int, int]]:
        """What a verification that accepted the first ``accepted`` tokens says of each offer:
        ``(offer, held, seen)``, of whose first ``seen`` tokens the first ``held`` stood. A draft
        that the grammar refused was seen, and did not stand."""
        held, seen = [0] * len(self.offers), [0] * len(self.offers)
        for place, origin in enumerate(self.origins[: accepted + 1]):
            if origin is not None:
                which, k = origin
                seen[which] = k + 1
                held[which] = k + (place < accepted)
        if self.refused is not None and accepted == len(self.tokens):
            which, k = self.refused
            seen[which], held[which] = k + 1, k
        return [(offer, held[i], seen[i]) for i, offer in enumerate(self.offers) if seen[i] > 0]


def unconstrained(offer: Offer, *, room: int, extend: Extend | None = None) -> Block:
    """The block of a step without a grammar, at most ``room`` tokens."""
    writer = _Writer(room, extend)
    writer.take(offer)
    while (draft := writer.next()) is not None:
        writer.write(draft)
    return writer.block(masks=None)


def constrained(
    trail: Trail, offer: Offer | None, *, room: int, extend: Extend | None = None
) -> Block:
    """Lay a step's drafts out under its grammar, at most ``room`` tokens.

    Forced spans (canonical mode) are spliced in where they arise, also after the last draft; drafts
    that disagree with one are dropped. A draft that is not legal ends the block: *before* it where
    it is a function of the context, *after* it where it was sampled, for there it has to be
    rejected into the residual (dropping it would look at x_k to decide about position k).

    Raises GrammarError when the grammar dies on the way.
    """
    writer = _Writer(room, extend)
    if offer is not None:
        writer.take(offer)
    masks: list[torch.Tensor | None] = []
    refused: Origin = None
    while True:
        if writer.tokens and trail.over(writer.tokens):
            masks.append(None)  # the step ends here: no token is chosen from this row
            break
        mask = trail.mask(writer.tokens)
        masks.append(mask)
        if writer.full:
            break
        span = trail.span(writer.tokens)
        if span:
            writer.force(span[0])
            continue
        draft = writer.next()
        if draft is None:
            break
        legal = is_allowed(mask, draft.token)
        if not legal and draft.distribution is None:
            refused = draft.origin
            break
        writer.write(draft)
        if not legal:
            masks.append(None)  # it is rejected for certain: this row is not looked at
            break
    return writer.block(tuple(masks), refused)


def verbatim(trail: Trail | None, offer: Offer | None, count: int) -> Block:
    """The first ``count`` drafts as they are, where a pass computes them already. One that is not
    legal falls, and what comes after it is not looked at. One after the end of the turn may stand:
    the step is over before it, and it is no part of the block.

    Raises GrammarError when the grammar dies on the way.
    """
    writer = _Writer(count, None)
    if offer is not None:
        writer.take(offer)
    masks: list[torch.Tensor | None] = []
    looking = trail is not None
    while True:
        draft = writer.next()
        if trail is not None:
            if looking and writer.tokens and trail.over(writer.tokens):
                return writer.block((*masks, None))
            mask = trail.mask(writer.tokens) if looking else None
            masks.append(mask)
            looking = mask is not None and draft is not None and is_allowed(mask, draft.token)
        if draft is None:
            return writer.block(None if trail is None else tuple(masks))
        writer.write(draft)


@dataclass(frozen=True, slots=True)
class _Draft:
    token: int
    survival: float
    distribution: Distribution | None
    origin: tuple[int, int]


class _Writer:
    """A block on its way, and the drafts that wait to be written."""

    def __init__(self, room: int, extend: Extend | None) -> None:
        self.tokens: list[int] = []
        self._room = min(room, _LONGEST)
        self._extend = extend
        self._offers: list[Offer] = []
        self._waiting: list[_Draft] = []
        self._sources: list[str] = []
        self._survival: list[float] = []
        self._drawn: list[Distribution | None] = []
        self._origins: list[Origin] = []

    @property
    def full(self) -> bool:
        return len(self.tokens) >= self._room

    def take(self, offer: Offer) -> None:
        """Draft ``offer`` after what is written; its survivals hold given that this stands."""
        alive = self._survival[-1] if self._survival else 1.0
        proposal, which = offer.proposal, len(self._offers)
        drawn = proposal.distributions or (None,) * len(proposal.tokens)
        self._offers.append(offer)
        self._waiting = [
            _Draft(token, alive * survival, distribution, (which, k))
            for k, (token, survival, distribution) in enumerate(
                zip(proposal.tokens, offer.survival, drawn, strict=True)
            )
        ]

    def next(self) -> _Draft | None:
        """The draft that waits first; where none does, what may follow is asked for."""
        if self.full:
            return None
        if not self._waiting and self._extend is not None:
            further = self._extend(self.tokens)
            alive = self._survival[-1] if self._survival else 1.0
            if further is not None and alive * further.survival[0] >= _FLOOR:
                self.take(further)
        return self._waiting[0] if self._waiting else None

    def write(self, draft: _Draft) -> None:
        """Put down the draft that :meth:`next` gave."""
        del self._waiting[0]
        source = self._offers[draft.origin[0]].proposal.source
        self._put(draft.token, source, draft.survival, draft.distribution, draft.origin)

    def force(self, token: int) -> None:
        """Put down what the grammar forces. Drafts that said so go on behind it."""
        agrees = bool(self._waiting) and self._waiting[0].token == token
        origin = self._waiting[0].origin if agrees else None
        self._waiting = self._waiting[1:] if agrees else []
        alive = self._survival[-1] if self._survival else 1.0
        self._put(token, FORCED, alive, None, origin)

    def _put(
        self,
        token: int,
        source: str,
        survival: float,
        drawn: Distribution | None,
        origin: Origin,
    ) -> None:
        before = self._survival[-1] if self._survival else 1.0
        self.tokens.append(token)
        self._sources.append(source)
        # What waits behind a forced token may have said that it was unsure of it: it is not.
        self._survival.append(min(survival, before))
        self._drawn.append(drawn)
        self._origins.append(origin)

    def block(self, masks: tuple[torch.Tensor | None, ...] | None, refused: Origin = None) -> Block:
        sampled = any(distribution is not None for distribution in self._drawn)
        return Block(
            tuple(self.tokens),
            tuple(self._sources),
            masks,
            tuple(self._drawn) if sampled else (),
            tuple(self._survival),
            tuple(self._offers),
            tuple(self._origins),
            refused,
        )
