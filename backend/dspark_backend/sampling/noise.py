"""Randomness keyed by what it is for: ``(seed, stream, position, slot)``, then by the token id.

Nothing here has state. A draw is a hash of its key, so it is the same on every machine, at every
thread count and in every batch, and any part of a row can be computed without the rest. Integer
arithmetic is done in numpy, where unsigned overflow wraps by definition.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np
import torch
from numpy.typing import NDArray

_MASK64 = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


class Stream(IntEnum):
    """Which decision a draw feeds. Two decisions that shared a stream would be dependent, and
    speculative sampling would no longer emit the target's distribution (DSPARK.md, section 6)."""

    TARGET = 0  # the target's own token: plain decoding and coupled verification
    DRAFT = 1  # the drafter's token; position is the anchor's, slot the place in the block
    ACCEPT = 2  # the ratio test of rejection sampling
    RESIDUAL = 3  # the correction after a rejection, and the bonus token after none


class Noise:
    """One row of independent draws, one for each token id, under one key.

    A draw is a uniform ``w`` in (0, 1) with 52 random bits: 32 *coarse* ones, and 20 that are only
    computed where they matter. ``-log1p(-w)`` is exponential, ``-log`` of that is Gumbel; the form
    keeps the bits where they count, at small ``w``, which is where unlikely tokens win.
    """

    __slots__ = ("_coarse_keys", "_fine_keys")

    def __init__(self, seed: int, stream: Stream, position: int, slot: int = 0) -> None:
        # The seed is mixed before a word meets it: small seeds and small words would cancel out.
        state = _mix64((seed + _GOLDEN) & _MASK64)
        for word in (stream.value, position, slot):
            state = _mix64(((state + _GOLDEN) & _MASK64) ^ (word & _MASK64))
        coarse = _mix64((state + _GOLDEN) & _MASK64)
        fine = _mix64((state + 2 * _GOLDEN) & _MASK64)
        self._coarse_keys = (coarse & 0xFFFFFFFF, coarse >> 32)
        self._fine_keys = (fine & 0xFFFFFFFF, fine >> 32)

    def floor(self, ids: NDArray[np.uint32]) -> NDArray[np.float32]:
        """A cheap lower bound of :meth:`uniform`, within 2**-32 and a float32 rounding of it."""
        floor = _hash(ids, *self._coarse_keys).astype(np.float32)
        floor *= np.float32(2.0**-32)
        return floor

    def uniform(self, ids: NDArray[np.uint32]) -> NDArray[np.float64]:
        """``w`` in (0, 1) for each of ``ids``, ``[N]``: an odd multiple of 2**-53, never 0 or 1."""
        draw = _hash(ids, *self._coarse_keys).astype(np.float64)
        draw *= 2.0**20
        draw += _hash(ids, *self._fine_keys) >> np.uint32(12)
        draw += 0.5
        draw *= 2.0**-52
        return draw

    def exponential(self, ids: NDArray[np.uint32]) -> NDArray[np.float64]:
        """Unit exponentials ``[N]``, at least ``w`` and at most 36.8."""
        draw = self.uniform(ids)
        np.negative(draw, out=draw)
        np.log1p(draw, out=draw)
        return np.negative(draw, out=draw)

    def gumbel(self, ids: NDArray[np.uint32]) -> NDArray[np.float64]:
        """Standard Gumbel draws ``[N]``, at most 36.8."""
        draw = self.exponential(ids)
        np.log(draw, out=draw)
        return np.negative(draw, out=draw)


def coupled_noise(seed: int, position: int, vocab: int) -> torch.Tensor:
    """The Gumbel row ``G[position]`` of coupled sampling, ``[vocab] float64``.

    The definition that :func:`dspark_backend.sampling.choose.coupled_choice` evaluates lazily.
    """
    ids = np.arange(vocab, dtype=np.uint32)
    return torch.from_numpy(Noise(seed, Stream.TARGET, position).gumbel(ids))


def acceptance_uniform(seed: int, position: int) -> float:
    """The uniform in (0, 1) that the ratio test at ``position`` compares with."""
    return float(Noise(seed, Stream.ACCEPT, position).uniform(np.zeros(1, dtype=np.uint32))[0])


def _mix64(x: int) -> int:
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014): a bijection of 64 bits."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK64
    return x ^ (x >> 31)


def _hash(ids: NDArray[np.uint32], first: int, second: int) -> NDArray[np.uint32]:
    """Two keyed rounds of a 32-bit bijection, so that 64 key bits reach every output bit."""
    x = ids ^ np.uint32(first)
    scratch = np.empty_like(x)
    _mix32(x, scratch)
    x += np.uint32(second)
    _mix32(x, scratch)
    return x


def _mix32(x: NDArray[np.uint32], scratch: NDArray[np.uint32]) -> None:
    """In place: xor-shift-multiply with the `lowbias32` constants (Wellons 2018, hash-prospector),
    whose avalanche bias is 0.17 of a percent."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        np.right_shift(x, np.uint32(shift), out=scratch)
        x ^= scratch
        x *= np.uint32(factor)
    np.right_shift(x, np.uint32(16), out=scratch)
    x ^= scratch
