"""The budget policies by name, and the two that look at no cost."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Final

from dspark_backend.speculation.candidate import BudgetError, BudgetPolicy, Candidate, CycleCost
from dspark_backend.speculation.step_aware import StepAware
from dspark_backend.speculation.throughput import PrefixThroughput, StaleCapacity


@dataclass(frozen=True, slots=True)
class Fixed:
    """Verify ``length`` drafts of every request, beside its certain tokens; 0 is plain decoding.

    Raises BudgetError for a negative length.
    """

    parks: ClassVar[bool] = False

    length: int

    def __post_init__(self) -> None:
        if self.length < 0:
            raise BudgetError(f"a fixed length is at least 0, not {self.length}")

    def lengths(self, candidates: Sequence[Candidate], cost: CycleCost) -> list[int]:
        return [min(each.certain + self.length, each.most) for each in candidates]


@dataclass(frozen=True, slots=True)
class Threshold:
    """Verify at most ``length`` drafts of every request, beside its certain tokens, and none whose
    survival is below ``survival``. Non-anticipating: a survival knows no token but those before.

    Raises BudgetError for a negative length and for no probability.
    """

    parks: ClassVar[bool] = False

    length: int
    survival: float

    def __post_init__(self) -> None:
        if self.length < 0 or not 0.0 <= self.survival <= 1.0:
            raise BudgetError(
                "a threshold has a length of at least 0 and a survival in [0, 1], "
                f"not {self.length} and {self.survival}"
            )

    def lengths(self, candidates: Sequence[Candidate], cost: CycleCost) -> list[int]:
        return [self._length(each) for each in candidates]

    def _length(self, each: Candidate) -> int:
        length, end = each.certain, min(each.certain + self.length, each.most)
        while length < end and each.survival[length] >= self.survival:
            length += 1
        return length


def named(name: str, block_size: int) -> BudgetPolicy:
    """The policy of that name for blocks of ``block_size`` drafts, as the command line spells it.

    ``plain``, ``fixed`` (whole blocks), ``fixed-K``, ``threshold`` (0.5), ``threshold-P``,
    ``prefix_throughput``, ``stale_capacity``, ``step_aware``, ``step_aware_sampled`` (which does
    not anticipate). Raises BudgetError for any other name.
    """
    if name in _NAMED:
        return _NAMED[name](block_size)
    kind, _, value = name.partition("-")
    try:
        if kind == "fixed":
            return Fixed(int(value))
        if kind == "threshold":
            return Threshold(block_size, float(value))
    except ValueError as error:
        raise BudgetError(f"{name}: {value!r} is no number") from error
    known = ", ".join([*_NAMED, "fixed-K", "threshold-P"])
    raise BudgetError(f"there is no policy {name!r}: {known}")


_NAMED: Final[Mapping[str, Callable[[int], BudgetPolicy]]] = {
    "plain": lambda block_size: Fixed(0),
    "fixed": Fixed,
    "threshold": lambda block_size: Threshold(block_size, 0.5),
    "prefix_throughput": lambda block_size: PrefixThroughput(),
    "stale_capacity": lambda block_size: StaleCapacity(),
    "step_aware": lambda block_size: StepAware(block_size=block_size),
    "step_aware_sampled": lambda block_size: StepAware(anticipating=False, block_size=block_size),
}
