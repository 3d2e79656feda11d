"""Who decides which token a slot of the drafter's chain holds (DSPARK.md, sections 1 and 6).

The backbone and the Markov head know nothing of grammars or of sampling: left to right, they bring
each slot's logits to a guide, and go on from the token that it took.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from dspark_backend.errors import GrammarError
from dspark_backend.grammar import bitmask
from dspark_backend.speculation.distribution import Distribution
from dspark_backend.speculation.trail import Trail
from dspark_backend.speculation.vocabulary import DraftVocabulary


@dataclass(frozen=True, slots=True)
class Slot:
    """What a slot holds.

    ``legal_mass`` is the probability that the draft distribution (softmax of the slot's logits)
    gives to the tokens of the mask, ``mask_width`` how many those are (0: anything goes).
    ``forced`` tokens are output by definition (canonical mode): no choice is made there.
    ``distribution`` is what the token was drawn from, None where it is a function of the context.
    """

    token: int
    legal_mass: float = 1.0
    mask_width: int = 0
    forced: bool = False
    distribution: Distribution | None = None

    def confidence(self, unmasked: float) -> float:
        """c_k, given what the confidence head says, which has not seen the mask.

        1 where the mask leaves one token. Else, with the legal mass m, ``c m / (c m + 1 - c)``: its
        log-odds moved by ln m. By Bayes' rule: if the drafter is on the target's track (c), a token
        drawn there is legal with probability m; if not (1 - c), legality says nothing against it.
        So a mask that rules out what the drafter wanted to say lowers its confidence, one that
        rules out nothing leaves it, and x_k itself is not looked at.
        """
        if self.mask_width == 1 or unmasked >= 1.0:
            return 1.0
        on_track = unmasked * self.legal_mass
        return on_track / (on_track + 1.0 - unmasked)


@dataclass(frozen=True, slots=True)
class Foresight:
    """What can be said about the next slots of a block before their logits are there: ``tokens``
    that the first of them hold whatever their logits are, then the ``mask`` ([words] int32) of the
    slot after those, None where anything goes or nothing is known; or that the block has ``ended``
    after those tokens."""

    tokens: tuple[int, ...] = ()
    mask: torch.Tensor | None = None
    ended: bool = False


class Guide(Protocol):
    """Asked once a slot, left to right, for one block."""

    def choose(self, logits: NDArray[np.float32], vocabulary: DraftVocabulary) -> Slot | None:
        """The token of the next slot, given its ``logits`` [D] over ``vocabulary``; None ends the
        block before it, and nothing is asked after that. Slots that were foreseen are asked about
        as well; their logits are not looked at."""

    def foresee(self, most: int) -> Foresight:
        """Of the next slots, ``most`` at most, what does not depend on their logits; decides about
        none."""


@dataclass(frozen=True, slots=True, eq=False)
class Allowed:
    """A grammar's ``mask`` ([words] int32), and the draft ids (ascending, at least one) in it."""

    mask: torch.Tensor
    draft_ids: NDArray[np.intp]


class Choice(Protocol):
    """How a token is picked where there is a choice."""

    def pick(
        self,
        logits: NDArray[np.float32],
        vocabulary: DraftVocabulary,
        allowed: Allowed | None,
        path: Sequence[int],
    ) -> tuple[int, Distribution | None] | None:
        """One of the tokens ``allowed`` after ``path`` (None: all), and what it was drawn from
        (None: it is a function of the arguments); None where there is none to pick."""


class Likeliest:
    """The most likely of the legal tokens, the lowest id among equals: a greedy chain."""

    def pick(
        self,
        logits: NDArray[np.float32],
        vocabulary: DraftVocabulary,
        allowed: Allowed | None,
        path: Sequence[int],
    ) -> tuple[int, Distribution | None] | None:
        if allowed is None:
            return int(vocabulary.ids[logits.argmax()]), None
        legal = allowed.draft_ids
        return int(vocabulary.ids[legal[logits[legal].argmax()]]), None


class ChainGuide:
    """Legal tokens only, at most ``room`` of them; forced ones where canonical mode forces them.

    ``trail`` is None without a grammar. The block ends at the end of the turn, where the grammar
    is terminated, and where nothing that the drafter can say is legal. ``grammar_s`` are the
    seconds spent on the grammar.
    """

    def __init__(self, trail: Trail | None, room: int, choice: Choice) -> None:
        self.grammar_s = 0.0
        self._trail = trail
        self._room = room
        self._choice = choice
        self._path: list[int] = []

    def choose(self, logits: NDArray[np.float32], vocabulary: DraftVocabulary) -> Slot | None:
        if len(self._path) >= self._room:
            return None
        slot = (
            self._picked(logits, vocabulary, None, 0)
            if self._trail is None
            else self._constrained(self._trail, logits, vocabulary)
        )
        if slot is not None:
            self._path.append(slot.token)
        return slot

    def foresee(self, most: int) -> Foresight:
        path, tokens = [*self._path], list[int]()
        while len(tokens) < most:
            if len(path) >= self._room:
                return Foresight(tuple(tokens), ended=True)
            if self._trail is None:
                break
            here = self._allowed(self._trail, path)
            if here is None:
                return Foresight(tuple(tokens), ended=True)
            if not isinstance(here, Slot):
                return Foresight(tuple(tokens), here[0])
            tokens.append(here.token)
            path.append(here.token)
        return Foresight(tuple(tokens))

    def _constrained(
        self, trail: Trail, logits: NDArray[np.float32], vocabulary: DraftVocabulary
    ) -> Slot | None:
        here = self._allowed(trail, self._path)
        if here is None or isinstance(here, Slot):
            return here
        mask, width = here
        legal = vocabulary.legal(mask)
        if not len(legal):
            return None
        return self._picked(logits, vocabulary, Allowed(mask, legal), width)

    def _allowed(self, trail: Trail, path: Sequence[int]) -> Slot | tuple[torch.Tensor, int] | None:
        """The slot after ``path`` where the grammar leaves one token, else its mask and how many
        tokens that allows; None where the block ends."""
        started = time.perf_counter()
        try:
            if path and trail.over(path):
                return None
            span = trail.span(path)
            if span:
                return Slot(span[0], mask_width=1, forced=True)
            mask, width = trail.mask(path), trail.width(path)
        except GrammarError:
            # The step meets the same error where its block is laid out, if it gets that far; here
            # it would take the drafts of all its neighbours along.
            return None
        finally:
            self.grammar_s += time.perf_counter() - started
        return Slot(bitmask.sole(mask), mask_width=1) if width == 1 else (mask, width)

    def _picked(
        self,
        logits: NDArray[np.float32],
        vocabulary: DraftVocabulary,
        allowed: Allowed | None,
        width: int,
    ) -> Slot | None:
        picked = self._choice.pick(logits, vocabulary, allowed, self._path)
        if picked is None:
            return None
        token, distribution = picked
        mass = 1.0 if allowed is None else _mass(logits, allowed.draft_ids)
        return Slot(token, mass, width, distribution=distribution)


def _mass(logits: NDArray[np.float32], legal: NDArray[np.intp]) -> float:
    """The share of softmax(logits) on ``legal``."""
    if len(legal) == len(logits):
        return 1.0
    weights = np.exp(logits - logits.max())
    return float(weights[legal].sum(dtype=np.float64) / weights.sum(dtype=np.float64))
