"""What the engine's loop asks of a device that runs ahead of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

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


class Flights(Protocol):
    """What makes flights. Used by the engine's thread only."""

    @property
    def block_size(self) -> int:
        """Most drafts of a step in a cycle; 0 without a drafter."""

    @property
    def cycles(self) -> int:
        """Cycles that were launched, in all flights."""

    def begin(self, starts: Sequence[Start]) -> Flight:
        """A flight of steps that stand at ``starts``, at least one."""
