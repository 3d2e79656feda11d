"""Sequences of launches recorded once as CUDA graphs, and replayed.

A step of a few rows is bound by launching its kernels; a graph launches them all at once. What
changes from step to step lies in tensors that a recording reads in place: small arrays of the host,
and results that another recording left on the device.
"""

from __future__ import annotations

import logging
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.nn import functional

from dspark_backend.kernels.upload import Arrays, Mailbox, upload

_log = logging.getLogger(__name__)

_SEEN = 2  # calls of a shape before it is recorded: what compiles on first use is compiled by then
_REMEMBERED = 64  # shapes that are counted, for each recording that is kept

Tensors = tuple[Tensor, ...]
Function = Callable[[Mapping[str, Tensor]], Tensors]
"""Launches work on tensors by name and waits for none of it; what it reads of the host depends on
their shapes alone."""
Capture = Callable[[Callable[[], Tensors]], tuple[Callable[[], object], Tensors]]
"""Records a function; gives what replays it, and where its results then lie."""


def bucket(count: int) -> int:
    """The next size up that recordings are made for: powers of two to 8, multiples of 8 to 64,
    then of 32; so at most a few rows are computed in vain."""
    if count <= 8:
        return 0 if count == 0 else 1 << (count - 1).bit_length()
    step = 8 if count <= 64 else 32
    return -(-count // step) * step


@dataclass(slots=True)
class RecordingCounts:
    """Calls that were replayed, calls that were not (too large, of a shape that was seen for the
    first times, or of a kind that failed), recordings that were made, and kinds that failed."""

    hits: int = 0
    misses: int = 0
    recorded: int = 0
    failed: int = 0


@dataclass(frozen=True, slots=True)
class Piece:
    """A result on the device, [n, ...] with n up to ``rows``: the rest is filled with zeros."""

    tensor: Tensor
    rows: int

    @property
    def shape(self) -> tuple[object, ...]:
        return self.rows, *self.tensor.shape[1:], self.tensor.dtype

    def whole(self) -> Tensor:
        """[rows, ...]."""
        missing = self.rows - len(self.tensor)
        dimensions = self.tensor.dim() - 1
        return functional.pad(self.tensor, (0, 0) * dimensions + (0, missing))


@dataclass(frozen=True, slots=True)
class _Recording:
    holds: object  # what it reads and writes besides: alive as long as the recording is
    mailbox: Mailbox
    pieces: Mapping[str, Tensor]
    replay: Callable[[], object]
    results: Tensors


@dataclass(slots=True, eq=False)
class Recordings:
    """All recordings of an engine on ``device``. At most ``most`` are kept, the one that was used
    last longest ago leaves first. Not thread-safe."""

    device: torch.device
    capture: Capture | None = None
    most: int = 64
    counts: RecordingCounts = field(default_factory=RecordingCounts)
    _seen: Counter[Hashable] = field(default_factory=Counter)
    _kept: OrderedDict[Hashable, _Recording] = field(default_factory=OrderedDict)
    _places: WeakValueDictionary[Hashable, Tensor] = field(default_factory=WeakValueDictionary)
    _failed: set[Hashable] = field(default_factory=set)

    def __post_init__(self) -> None:
        if self.capture is None:
            self.capture = cuda_capture()

    def run(
        self,
        key: Hashable,
        function: Function,
        arrays: Arrays,
        pieces: Mapping[str, Piece] | None = None,
        holds: object = None,
    ) -> Tensors:
        """What ``function`` gives for ``arrays`` and ``pieces``, by their names; the caller's own.

        Calls of one ``key``, with arrays and pieces of the same names, shapes and dtypes, launch
        the same: the first function serves them all, and ``holds`` is kept alive for it. A key
        begins with the kind of the call: where one cannot be recorded, none of its kind is.
        """
        parts = {} if pieces is None else pieces
        shapes = tuple((name, array.shape, array.dtype.char) for name, array in arrays.items())
        whole = (key, shapes, tuple((name, piece.shape) for name, piece in parts.items()))
        recording = self._kept.get(whole)
        if recording is None:
            recording = self._recorded(whole, function, arrays, parts, holds)
        if recording is None:
            return self.launch(function, arrays, parts)
        self._kept.move_to_end(whole)
        self.counts.hits += 1
        recording.mailbox.refill(arrays)
        for name, piece in parts.items():
            count = len(piece.tensor)
            recording.pieces[name][:count].copy_(piece.tensor)
            if count < piece.rows:
                recording.pieces[name][count:].zero_()
        recording.replay()
        # The next replay, of any recording, may write to the same place.
        return tuple(result.clone() for result in recording.results)

    def launch(
        self, function: Function, arrays: Arrays, pieces: Mapping[str, Piece] | None = None
    ) -> Tensors:
        """As :meth:`run`, one launch after the other: for what is too large, or of a shape that
        does not come again."""
        self.counts.misses += 1
        there = upload(arrays, self.device)
        return function(there | {name: p.whole() for name, p in (pieces or {}).items()})

    def _recorded(
        self,
        key: tuple[Hashable, ...],
        function: Function,
        arrays: Arrays,
        pieces: Mapping[str, Piece],
        holds: object,
    ) -> _Recording | None:
        """A recording for calls like this one, where it is time for one."""
        if len(self._seen) > _REMEMBERED * self.most:
            self._seen.clear()
        self._seen[key] += 1
        kind = key[0][0] if isinstance(key[0], tuple) else key[0]
        if kind in self._failed or self._seen[key] <= _SEEN:
            return None
        assert self.capture is not None
        mailbox = Mailbox(arrays, self.device)
        own = {name: self._place(name, piece) for name, piece in pieces.items()}
        there: dict[str, Any] = {**mailbox.tensors, **own}
        try:
            replay, results = self.capture(lambda: function(there))
        except RuntimeError:
            # Of another kind, others may be: they launch other operations, and hold less memory.
            _log.exception("%s could not be recorded: all of its kind is launched", kind)
            self._failed.add(kind)
            self.counts.failed += 1
            return None
        self.counts.recorded += 1
        self._kept[key] = _Recording(holds, mailbox, own, replay, results)
        if len(self._kept) > self.most:
            gone, _ = self._kept.popitem(last=False)
            self._seen.pop(gone, None)
        return self._kept[key]

    def _place(self, name: str, piece: Piece) -> Tensor:
        """Where recordings read such a piece: one place for all, since it is filled for each
        replay, and logits of a whole pass are large."""
        place = self._places.get((name, piece.shape))
        if place is None:
            place = self._places[name, piece.shape] = piece.whole().clone()
        return place


def cuda_capture() -> Capture:
    """Recording as CUDA graphs, which share one pool of memory: one's results are read before
    another one runs."""
    pool = torch.cuda.graph_pool_handle()

    def capture(run: Callable[[], Tensors]) -> tuple[Callable[[], object], Tensors]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            results = run()
        return graph.replay, results

    return capture
