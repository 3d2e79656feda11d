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
from dspark_backend.kernels.recording import Piece, Tensors
from dspark_backend.kernels.upload import upload
from dspark_backend.kv.pages import PagePool
from dspark_backend.sampling.device import answered
from dspark_backend.sampling.verifier import Answer


@dataclass(frozen=True, slots=True)
class _Passing:
    """A pass under way: what it was laid out as, what it goes over and what it leaves."""

    plan: Plan
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
        judged = self._passing
        before = None if judged is None else judged.plan
        leg = None if plan is None else self._route.leg(plan)
        made = self._before(judged, leg, masks)
        self._state = {"length": made[0], "token": made[1]}
        wanted = [] if judged is None else [*made[2:4]]
        self._passing = None
        if plan is not None and leg is not None:
            said, blocks = made[-2:]
            if plan.drafting:
                wanted.append(blocks)
            # Its copy goes first: the host reads it while the device computes the pass.
            landing = DeviceGuidedLanding(self, before, plan, masks, wanted)
            self._passing = _Passing(plan, leg, said, self._pass(leg, said))
            return landing
        return DeviceGuidedLanding(self, before, None, masks, wanted)

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
            for place, length in enumerate(judged.lengths):
                stood, token = int(accepted[place]), int(tokens[place])
                self._route.fell(place, length - stood)
                answers.append(partial(answered, stood, token, vocab, masks[place]))
        blocks = arrays[0] if arrays else ()
        plan = Plan.plain(0) if drafted is None else drafted
        return Brought(answers, self._parts.proposals(plan, len(self._route.kvs), blocks))

    def _before(self, judged: _Passing | None, leg: Leg | None, masks: Sequence[Masked]) -> Tensors:
        parts, pool = self._parts, self._route.pool
        arrays: Arrays = {}
        parted = dict(self._state)
        longest, small = 0, leg is None or leg.small
        if judged is not None:
            rows = judged.leg.rows
            longest, small = judged.leg.longest, small and judged.leg.small
            arrays |= self._route.settings
            arrays |= {name: rows[name] for name in ("request", "column", "offsets")}
            arrays |= _mask_arrays(masks, len(rows["request"]), rows["offsets"])
            parted |= {"said": judged.said, "logits": judged.logits}
        if leg is not None:
            arrays |= {**leg.blocks, "table": leg.table}
        drafting = None if leg is None else leg.drafting
        run = partial(_judge_and_draft, parts, pool, longest, drafting)
        key = ("guided drafts", id(parts), id(pool), longest, drafting)
        pieces = {name: Piece(tensor, len(tensor)) for name, tensor in parted.items()}
        return parts.run(key, run, arrays, pieces, pool, small=small)

    def _pass(self, leg: Leg, said: Tensor) -> Tensor:
        parts, pool = self._parts, self._route.pool
        run = partial(_compute, parts, pool, leg.longest)
        key = ("guided pass", id(parts), id(pool), leg.longest)
        parted = {"length": self._state["length"], "said": said}
        pieces = {name: Piece(tensor, len(tensor)) for name, tensor in parted.items()}
        arrays = {**leg.rows, "table": leg.table}
        (logits,) = parts.run(key, run, arrays, pieces, pool, small=leg.small)
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
    parts: DeviceCycle,
    pool: PagePool,
    longest: int,
    drafting: bool | None,
    there: Mapping[str, Tensor],
) -> Tensors:
    """Committed lengths and last tokens after the pass that is judged (``longest`` is 0 where there
    is none); accepted lengths and next tokens where there is one; and unless ``drafting`` is None,
    what is said and the blocks, as :meth:`DeviceCycle.drafts`."""
    verdict: Tensors = ()
    if longest:
        length, token, *rest = parts.judge(there, there["said"], there["logits"], longest)
        verdict = tuple(rest)
        there = {**there, "length": length, "token": token}
    said = () if drafting is None else parts.drafts(there, pool, drafting=drafting)
    return there["length"], there["token"], *verdict, *said


def _compute(
    parts: DeviceCycle, pool: PagePool, longest: int, there: Mapping[str, Tensor]
) -> Tensors:
    return (parts.compute(there, there["said"], pool, longest),)


def _mask_arrays(masks: Sequence[Masked], rows: int, offsets: NDArray[np.int32]) -> Arrays:
    """The masks of a pass of ``rows`` rows, one a row, so that their number follows from that."""
    of_row = np.full(rows, -1, np.int32)
    words: NDArray[np.int32] | None = None
    for start, own in zip(offsets.tolist(), masks, strict=False):
        for row, mask in enumerate(own or (), start):
            if mask is not None:
                if words is None:
                    words = np.zeros((rows, len(mask)), np.int32)
                words[row], of_row[row] = mask.numpy(), row
    return {} if words is None else {"mask_words": words, "mask_of_row": of_row}
