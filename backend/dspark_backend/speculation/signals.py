"""Which of the scheduler's signals are in use: all, but for an ablation."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Signals:
    """What proposals and budgets may look at; none of it changes the output.

    ``copies``: the suffix index over the session's log proposes too. ``splice``: a block goes on
    with a copy where its drafts or a forced span end. ``guided``: drafts are chosen under the
    grammar, and confidences corrected by the mass it masks. ``known``: drafting goes on over
    committed tokens that are not computed yet. ``calibration``: survivals follow what is accepted,
    by step kind and mask width. ``parking``: under a policy that parks, the
    drafter is not asked where it does not pay.
    """

    copies: bool = True
    splice: bool = True
    guided: bool = True
    known: bool = True
    calibration: bool = True
    parking: bool = True

    @classmethod
    def drafts_alone(cls) -> Signals:
        """Nothing but the drafter's blocks, drafted under the grammar: what a test of them, or a
        comparison with other engines, wants."""
        return cls(copies=False, splice=False, calibration=False, parking=False)
