"""Whole cycles on a device: drafts, the pass over them, the draft contexts and the verdict, one
after the other, without a decision of the host in between.

What a cycle starts from, the committed length of every step and its last token, is what the cycle
before it left on the device. All else the host knows beforehand (``route.py``), but for the masks
of a grammar (``guided.py``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from numpy.typing import NDArray
from torch import Tensor

from dspark_backend.ahead.cycle import BlockDrafter, DeviceCycle
from dspark_backend.ahead.guided import DeviceGuidedFlight
from dspark_backend.ahead.protocol import Landed, Plan, Start
from dspark_backend.ahead.route import Route
from dspark_backend.kernels.download import Download
from dspark_backend.kernels.recording import Recordings, Tensors
from dspark_backend.kernels.upload import upload
from dspark_backend.kv.pages import PagePool
from dspark_backend.sampling.device import answered
from dspark_backend.target.device import DeviceDecoder


class DeviceFlights:
    """Flights of ``decoder`` and, where there is one, ``drafter``. With ``recordings``, cycles of
    few rows are recorded and replayed. Not thread-safe."""

    def __init__(
        self,
        decoder: DeviceDecoder,
        drafter: BlockDrafter | None,
        recordings: Recordings | None = None,
    ) -> None:
        self.parts = DeviceCycle(decoder, drafter, recordings)
        self.block_size = self.parts.block_size

    @property
    def cycles(self) -> int:
        return self.parts.count

    def begin(self, starts: Sequence[Start]) -> DeviceFlight:
        """As :meth:`Flights.begin`."""
        return DeviceFlight(self.parts, starts)

    def begin_guided(self, starts: Sequence[Start]) -> DeviceGuidedFlight:
        """As :meth:`Flights.begin_guided`."""
        return DeviceGuidedFlight(self.parts, starts)


class DeviceFlight:
    """See :class:`~dspark_backend.ahead.protocol.Flight`. A cycle is recorded whole."""

    def __init__(self, parts: DeviceCycle, starts: Sequence[Start]) -> None:
        self._parts = parts
        self._route = Route(starts, parts.block_size, recorded=parts.recordings is not None)
        self._state = upload(self._route.state, parts.decoder.device)

    def launch(self, plan: Plan) -> DeviceLanding:
        """As :meth:`Flight.launch`."""
        parts, pool, leg = self._parts, self._route.pool, self._route.leg(plan)
        arrays = {**self._route.settings, **leg.rows, **leg.blocks, "table": leg.table}
        run = partial(_cycle, parts, pool, leg.longest)
        made = parts.run(("cycle", leg.longest), run, arrays, self._state, pool, small=leg.small)
        parts.count += 1
        self._state = {"length": made[0], "token": made[1]}
        return DeviceLanding(self, plan, Download(made[2:]))

    def landed(self, plan: Plan, arrays: Sequence[NDArray[Any]]) -> list[Landed]:
        """What a cycle of ``plan`` brought; its steps are no further than that any more."""
        accepted, tokens, blocks = arrays
        vocab = self._parts.decoder.config.vocab_size
        verdicts = self._route.judged(plan, accepted, tokens)
        proposals = self._parts.proposals(plan, blocks)
        return [
            Landed(partial(answered, stood, token, vocab), proposal)
            for (stood, token), proposal in zip(verdicts, proposals, strict=True)
        ]


def _cycle(
    parts: DeviceCycle, pool: PagePool, longest: int, there: Mapping[str, Tensor]
) -> Tensors:
    """Launch a cycle: committed lengths and last tokens after it, accepted lengths and next tokens
    (-1: none), int32 [B] each, and the blocks."""
    said, blocks = parts.drafts(there, pool)
    logits = parts.compute(there, said, pool, longest)
    return *parts.judge(there, said, logits, longest), blocks


class DeviceLanding:
    """See :class:`~dspark_backend.ahead.protocol.Landing`."""

    def __init__(self, flight: DeviceFlight, plan: Plan, download: Download) -> None:
        self._flight, self._plan, self._download = flight, plan, download

    def read(self) -> list[Landed]:
        """As :meth:`Landing.read`."""
        return self._flight.landed(self._plan, self._download.arrays())
