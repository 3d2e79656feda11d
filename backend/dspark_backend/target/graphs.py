"""Passes of a device's target, recorded where they are small and replayed.

The engine does this where it is asked to alone: recording has never run on hardware, see
docs/device.md.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import Tensor

from dspark_backend.checkpoint.config import TargetConfig
from dspark_backend.kernels.recording import Recordings, Tensors, bucket
from dspark_backend.kv.budget import KVShape
from dspark_backend.kv.paged_storage import PagedStorage
from dspark_backend.target.batch import Batch
from dspark_backend.target.device import DeviceDecoder
from dspark_backend.target.protocol import Pass

ROWS = 256
"""Passes of more rows are not recorded: launching is not what they wait for."""
COLUMNS = 16
"""Tables are widened to a multiple of this many pages, so that a growing context does not ask for
another recording at every page."""


class GraphedDecoder:
    """``decoder`` with its small passes replayed; the same bits. Not thread-safe."""

    def __init__(self, decoder: DeviceDecoder, recordings: Recordings) -> None:
        self.decoder = decoder
        self.recordings = recordings

    @property
    def config(self) -> TargetConfig:
        return self.decoder.config

    @property
    def max_positions(self) -> int:
        return self.decoder.max_positions

    @property
    def kv_shape(self) -> KVShape:
        return self.decoder.kv_shape

    def storage(self, draft: KVShape | None, limit_bytes: int) -> PagedStorage:
        """As :meth:`Target.storage`."""
        return self.decoder.storage(draft, limit_bytes)

    def forward(self, batch: Batch, taps: Collection[int] = ()) -> Pass:
        """As :meth:`Target.forward`."""
        layout = self.decoder.lay_out(batch, COLUMNS)
        rows, wanted = layout.rows, len(layout.arrays["wanted"])
        small = rows <= ROWS
        if small:
            size = bucket(rows)
            layout = layout.padded(size, ids=size, wanted=bucket(wanted))

        def run(there: Mapping[str, Tensor]) -> Tensors:
            made = self.decoder.run(layout.reading(there), taps)
            return made.logits, made.features

        if small:
            key = ("pass", id(self), id(layout.pool), layout.longest, tuple(taps))
            made = self.recordings.run(key, run, layout.arrays, holds=(self, layout.pool))
        else:
            made = self.recordings.launch(run, layout.arrays)
        logits, features = made
        return Pass(logits[:wanted], features[:rows])

    def wait(self) -> None:
        """As :meth:`Target.wait`."""
        self.decoder.wait()
