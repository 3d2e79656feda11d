"""The noise of :mod:`dspark_backend.sampling.noise` in a kernel: equal bits up to the logarithm.

SplitMix64 finalisers key a row (a few scalar operations a program), two keyed rounds of a 32-bit
bijection draw for each token id.
"""

from __future__ import annotations

import triton.language as tl

from dspark_backend.kernels.device import device_kernel

_GOLDEN = tl.constexpr(0x9E3779B97F4A7C15)


@device_kernel
def row_keys(seed: tl.tensor, stream: tl.tensor, position: tl.tensor) -> tl.tensor:
    """The (coarse, fine) uint64 keys of a row at slot 0; ``seed``, ``position`` int64."""
    state = _mix64(seed.to(tl.uint64) + _GOLDEN)
    state = _mix64((state + _GOLDEN) ^ stream)
    state = _mix64((state + _GOLDEN) ^ position.to(tl.uint64))
    state = _mix64(state + _GOLDEN)  # slot 0
    coarse = _mix64(state + _GOLDEN)
    fine = _mix64(state + _GOLDEN + _GOLDEN)
    return coarse, fine


@device_kernel
def uniform(ids: tl.tensor, coarse: tl.tensor, fine: tl.tensor) -> tl.tensor:
    """``w`` in (0, 1) for each of ``ids`` (uint32): float64, an odd multiple of 2**-53."""
    draw = _hash(ids, coarse).to(tl.float64) * 1048576.0
    draw += (_hash(ids, fine) >> 12).to(tl.float64)
    return (draw + 0.5) * 2.220446049250313e-16


@device_kernel
def gumbel(ids: tl.tensor, coarse: tl.tensor, fine: tl.tensor) -> tl.tensor:
    """Standard Gumbel draws, float64. ``1 - w`` is exact for an odd multiple of 2**-53, so its
    logarithm is ``log1p(-w)``, to which Triton's interpreter has no access."""
    return -tl.log(-tl.log(1.0 - uniform(ids, coarse, fine)))


@device_kernel
def _mix64(x: tl.tensor) -> tl.tensor:
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014)."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@device_kernel
def _hash(ids: tl.tensor, key: tl.tensor) -> tl.tensor:
    x = _mix32(ids ^ (key & 0xFFFFFFFF).to(tl.uint32))
    return _mix32(x + (key >> 32).to(tl.uint32))


@device_kernel
def _mix32(x: tl.tensor) -> tl.tensor:
    """`lowbias32` (Wellons 2018, hash-prospector)."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)
