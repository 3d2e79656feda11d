"""Small passes of a device's target recorded once as CUDA graphs, and replayed.

A pass of a few rows is bound by launching its kernels; a graph launches them all at once. What
changes from pass to pass (tokens, places, tables) lies in tensors that a recording reads in place.
The engine does not use this yet: it has never run on hardware, see docs/device.md.
"""

from __future__ import annotations

import logging
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch

from dspark_backend.checkpoint.config import TargetConfig
from dspark_backend.kernels.upload import Mailbox
from dspark_backend.kv.budget import KVShape
from dspark_backend.kv.paged_storage import PagedStorage
from dspark_backend.kv.pages import PagePool
from dspark_backend.target.batch import Batch
from dspark_backend.target.device import DeviceDecoder
from dspark_backend.target.paged_rows import Layout
from dspark_backend.target.protocol import Pass

_log = logging.getLogger(__name__)

ROWS = 256
"""Passes of more rows are not recorded: launching is not what they wait for."""
COLUMNS = 16
"""Tables are widened to a multiple of this many pages, so that a growing context does not ask for
another recording at every page."""
_SEEN = 2  # passes of a shape before it is recorded: what compiles on first use is compiled by then

Capture = Callable[[Callable[[], Pass]], tuple[Callable[[], object], Pass]]
"""Records a function; gives what replays it, and where its results then lie."""


@dataclass(slots=True)
class GraphCounts:
    """Passes that were replayed, passes that were not (too large, seen for the first times, or
    after a recording failed), and recordings that were made."""

    hits: int = 0
    misses: int = 0
    recorded: int = 0


@dataclass(frozen=True, slots=True)
class _Recording:
    pool: PagePool  # what it writes to: alive as long as the recording is
    mailbox: Mailbox
    replay: Callable[[], object]
    result: Pass


class GraphedDecoder:
    """``decoder`` with its small passes replayed; the same bits. At most ``most`` recordings are
    kept, the one that was used last longest ago leaves first. Not thread-safe."""

    def __init__(
        self, decoder: DeviceDecoder, capture: Capture | None = None, most: int = 32
    ) -> None:
        self.decoder = decoder
        self.counts = GraphCounts()
        self._capture = capture or cuda_capture()
        self._most = most
        self._seen: Counter[object] = Counter()
        self._kept: OrderedDict[object, _Recording] = OrderedDict()
        self._failed = False

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
        key = (id(layout.pool), layout.shape, tuple(taps))
        recording = self._kept.get(key)
        if recording is None:
            recording = self._recorded(key, layout, taps)
        if recording is None:
            self.counts.misses += 1
            return self.decoder.run(layout.on(self.decoder.device), taps)
        self._kept.move_to_end(key)
        self.counts.hits += 1
        recording.mailbox.refill(layout.arrays)
        recording.replay()
        # The next replay writes to the same place.
        return Pass(recording.result.logits.clone(), recording.result.features.clone())

    def wait(self) -> None:
        """As :meth:`Target.wait`."""
        self.decoder.wait()

    def _recorded(self, key: object, layout: Layout, taps: Collection[int]) -> _Recording | None:
        """A recording for passes like ``layout``, where it is time for one."""
        self._seen[key] += 1
        if self._failed or layout.rows > ROWS or self._seen[key] <= _SEEN:
            return None
        mailbox = Mailbox(layout.arrays, self.decoder.device)
        rows = layout.reading(mailbox.tensors)
        try:
            replay, result = self._capture(lambda: self.decoder.run(rows, taps))
        except RuntimeError:
            _log.exception("a pass could not be recorded: all passes are launched one by one")
            self._failed = True
            return None
        self.counts.recorded += 1
        self._kept[key] = _Recording(layout.pool, mailbox, replay, result)
        if len(self._kept) > self._most:
            gone, _ = self._kept.popitem(last=False)
            del self._seen[gone]
        return self._kept[key]


def cuda_capture() -> Capture:
    """Recording as CUDA graphs, which share one pool of memory: one's results are read before
    another one runs."""
    pool = torch.cuda.graph_pool_handle()

    def capture(run: Callable[[], Pass]) -> tuple[Callable[[], object], Pass]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            result = run()
        return graph.replay, result

    return capture
