"""Cycles of steps under a grammar, whose verdicts wait for masks and for nothing else.

A mask is the host's, and depends on the tokens before it. So the host is not a cycle behind here,
but a pass: while the device computes one, the host reads the verdict on the one before and the
drafts that are being computed, makes their masks, and launches what follows.

    device   | drafts 0 | pass 0 ............ | verdict 0, drafts 1 | pass 1 ............ |
    host               reads drafts 0, masks them, launches
                                                               reads both, masks, launches
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from dspark_backend.ahead.cycle import DeviceCycle
from dspark_backend.ahead.protocol import Brought, Masked, Plan, Start
from dspark_backend.ahead.route import Arrays, Leg, Route
from dspark_backend.kernels.download import Download
from dspark_backend.kernels.recording import Tensors
from dspark_backend.kernels.upload import upload
from dspark_backend.kv.pages import PagePool
from dspark_backend.sampling.device import answered, mask_arrays
from dspark_backend.sampling.verifier import Answer


@dataclass(frozen=True, slots=True)
class _Passing:
    """A pass under way: how it is laid out, what it goes over and what it leaves."""

    leg: Leg
    said: Tensor
    logits: Tensor


class DeviceGuidedFlight:
    """See :class:`~dspark_backend.ahead.protocol.GuidedFlight`. What comes before a pass, the
    verdict on the one before and drafts, is one recording, and the pass another."""

    def __init__(self, parts: DeviceCycle, starts: Sequence[Start]) -> None:
        self._parts = parts
        self._route = Route(starts, parts.block_size, recorded=parts.recordings is not None)
        self._state = upload(self._route.state, parts.decoder.device)
        self._passing: _Passing | None = None

    def launch(self, plan: Plan | None, masks: Sequence[Masked]) -> DeviceGuidedLanding:
        """As :meth:`GuidedFlight.launch`."""
        judged, self._passing = self._passing, None
        before = None if judged is None else judged.leg.plan
        leg = None if plan is None else self._route.leg(plan)
        made = self._before(judged, leg, masks)
        self._state = {"length": made[0], "token": made[1]}
        wanted = [] if judged is None else [*made[2:4]]
        if leg is not None and leg.blocks:
            wanted.append(made[-1])
        # Its copy goes before the pass: the host reads it while the device computes that.
        landing = DeviceGuidedLanding(self, before, plan, masks, wanted)
        if leg is not None:
            said = made[-2]
            self._passing = _Passing(leg, said, self._pass(leg, said))
        return landing

    def landed(
        self,
        judged: Plan | None,
        drafted: Plan | None,
        masks: Sequence[Masked],
        arrays: Sequence[NDArray[Any]],
    ) -> Brought:
        """What was ``judged``, whose steps are no further than that any more, and what was
        ``drafted``."""
        answers: list[Answer] = []
        if judged is not None:
            vocab = self._parts.decoder.config.vocab_size
            accepted, tokens, *arrays = arrays
            verdicts = self._route.judged(judged, accepted, tokens)
            for (stood, token), own in zip(verdicts, masks, strict=True):
                answers.append(partial(answered, stood, token, vocab, own))
        plan = Plan.plain(len(self._route.kvs)) if drafted is None else drafted
        return Brought(answers, self._parts.proposals(plan, arrays[0] if arrays else ()))

    def _before(self, judged: _Passing | None, leg: Leg | None, masks: Sequence[Masked]) -> Tensors:
        parts, pool = self._parts, self._route.pool
        arrays: Arrays = {}
        left = dict(self._state)
        longest, small = 0, leg is None or leg.small
        if judged is not None:
            rows = judged.leg.rows
            longest, small = judged.leg.longest, small and judged.leg.small
            arrays |= self._route.settings
            arrays |= {name: rows[name] for name in ("request", "column", "offsets")}
            arrays |= _masks(masks, judged.leg.plan, len(rows["request"]))
            left |= {"said": judged.said, "logits": judged.logits}
        if leg is not None:
            arrays |= {**leg.blocks, "table": leg.table}
        run = partial(_judge_and_draft, parts, pool, longest)
        return parts.run(("guided drafts", longest), run, arrays, left, pool, small=small)

    def _pass(self, leg: Leg, said: Tensor) -> Tensor:
        parts, pool = self._parts, self._route.pool
        run, key = partial(_compute, parts, pool, leg.longest), ("guided pass", leg.longest)
        arrays = {**leg.rows, "table": leg.table}
        left = {"length": self._state["length"], "said": said}
        (logits,) = parts.run(key, run, arrays, left, pool, small=leg.small)
        parts.count += 1
        return logits


class DeviceGuidedLanding:
    """See :class:`~dspark_backend.ahead.protocol.GuidedLanding`."""

    def __init__(
        self,
        flight: DeviceGuidedFlight,
        judged: Plan | None,
        drafted: Plan | None,
        masks: Sequence[Masked],
        wanted: Sequence[Tensor],
    ) -> None:
        self._flight, self._judged, self._drafted, self._masks = flight, judged, drafted, masks
        self._download = Download(wanted) if wanted else None

    def read(self) -> Brought:
        """As :meth:`GuidedLanding.read`."""
        arrays = [] if self._download is None else self._download.arrays()
        return self._flight.landed(self._judged, self._drafted, self._masks, arrays)


def _judge_and_draft(
    parts: DeviceCycle, pool: PagePool, longest: int, there: Mapping[str, Tensor]
) -> Tensors:
    """Committed lengths and last tokens after the pass that left ``logits``; its accepted lengths
    and next tokens, where there is one; and where a pass follows, what is said and the blocks, as
    :meth:`DeviceCycle.drafts`."""
    verdict: Tensors = ()
    if "logits" in there:
        length, token, *rest = parts.judge(there, there["said"], there["logits"], longest)
        verdict = tuple(rest)
        there = {**there, "length": length, "token": token}
    said = parts.drafts(there, pool) if "table" in there else ()
    return there["length"], there["token"], *verdict, *said


def _compute(
    parts: DeviceCycle, pool: PagePool, longest: int, there: Mapping[str, Tensor]
) -> Tensors:
    return (parts.compute(there, there["said"], pool, longest),)


def _masks(masks: Sequence[Masked], plan: Plan, rows: int) -> Arrays:
    """Those of a pass over ``plan``, filled up to ``rows`` rows and as many masks: how many masks
    there are is not to make a recording of its own."""
    counts = [1 + length for length in plan.lengths]
    made = mask_arrays(zip(masks, counts, strict=True))
    if not made:
        return made
    words, of_row = made["mask_words"], made["mask_of_row"]
    return {
        "mask_words": np.pad(words, ((0, rows - len(words)), (0, 0))),
        "mask_of_row": np.pad(of_row, (0, rows - len(of_row)), constant_values=-1),
    }
