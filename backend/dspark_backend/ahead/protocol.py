"""What the engine's loop asks of a device that runs ahead of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from dspark_backend.kv.sequence import KV
from dspark_backend.request import SamplingParams
from dspark_backend.sampling.verifier import Answer
from dspark_backend.speculation.protocol import Proposal


@dataclass(frozen=True, slots=True)
class Start:
    """Where a step goes on: ``token`` is its last committed one, at position ``kv.length``, and the
    only one that is not computed. ``kv`` has room for all that the flight may compute, and its
    draft context, if there is one, is as long. ``sampling`` is greedy or coupled, with nothing that
    rewrites or cuts logits."""

    kv: KV
    token: int
    sampling: SamplingParams


@dataclass(frozen=True, slots=True)
class Plan:
    """One cycle, as the host decides it before anything of it is computed: ``drafting`` are the
    places of the steps to draft for, and ``lengths[i]`` says how many drafts of step i are verified
    (0 where it is not among them)."""

    drafting: tuple[int, ...]
    lengths: tuple[int, ...]

    @classmethod
    def plain(cls, steps: int) -> Plan:
        """A token for each of ``steps``, and no drafts."""
        return cls((), (0,) * steps)


@dataclass(frozen=True, slots=True)
class Landed:
    """What a cycle brought one step: the verdict on the drafts that were verified, and all of the
    ``proposal`` (empty where nothing was drafted)."""

    answer: Answer
    proposal: Proposal


Masked = tuple[Tensor | None, ...] | None
"""The masks of a step's rows of a pass, as :attr:`Block.masks`: None where anything may follow."""


@dataclass(frozen=True, slots=True)
class Brought:
    """What is known once a guided pass is under way: the ``answers`` to each step about the pass
    before (empty where there was none), and the ``proposals`` that are being computed (empty ones
    where nothing was drafted)."""

    answers: list[Answer]
    proposals: list[Proposal]


class Landing(Protocol):
    """The results of one cycle, on their way."""

    def read(self) -> list[Landed]:
        """One for each step of the flight. Waits for the device; to be called once, in the order of
        the launches."""


class Flight(Protocol):
    """Some steps, whose committed lengths and last tokens are the device's for as long as it lasts.

    A cycle computes the last token and the drafts after it, and writes the draft contexts along;
    what it writes past the committed length is meaningless. The host commits what it reads.
    """

    def launch(self, plan: Plan) -> Landing:
        """Ask for one more cycle, which follows the one before; waits for none of them.

        Raises ValueError where there may be no room for it.
        """


class GuidedLanding(Protocol):
    """Drafts and the verdict before them, on their way."""

    def read(self) -> Brought:
        """Waits for the drafts, not for the pass over them; to be called once, in the order of the
        launches."""


class GuidedFlight(Protocol):
    """As :class:`Flight`, for steps of which some are under a grammar: a pass is judged by the
    launch after it, when the host has read its drafts and knows what may follow them."""

    def launch(self, plan: Plan | None, masks: Sequence[Masked]) -> GuidedLanding:
        """Judge the pass under way by ``masks``, one for each step (none at first, when there is
        none), then draft and go on with another pass; or with None, with nothing. Waits for none of
        it. Drafts know no grammar: those that it does not allow fall.

        Raises ValueError where there may be no room for it.
        """


class Flights(Protocol):
    """What makes flights. Used by the engine's thread only."""

    @property
    def block_size(self) -> int:
        """Most drafts of a step in a cycle; 0 without a drafter."""

    @property
    def cycles(self) -> int:
        """Passes that were launched, in all flights."""

    def begin(self, starts: Sequence[Start]) -> Flight:
        """A flight of steps that stand at ``starts``, at least one."""

    def begin_guided(self, starts: Sequence[Start]) -> GuidedFlight:
        """The same, where a grammar has a say."""
