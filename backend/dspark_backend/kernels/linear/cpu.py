"""The quantised linear layer on the CPU: int8 weights, 8- or 16-bit activations, exact sums.

Activations are quantised per row (Dettmers et al. 2022 call it vector-wise) into one or two planes
of bytes. The second plane holds eight more bits and costs one more row in the tile: nothing while
the product is bound by reading the weights. Sums are integers, so a row's result is the same bit
for bit whatever else is in the call. The oracle is ``reference.py``.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dspark_backend.kernels.jit import exact_kernel, kernel, parallel_kernel, prange
from dspark_backend.kernels.linear import vnni

BLOCK = 32  # output channels a work item: its weights stay in the first cache over all rows
MAX_DEPTH = 2**31 // (255 * 127)  # longest dot product that cannot overflow int32

# Activations of at most this many bytes stay in the first cache beside a stream of weights.
NARROW_BYTES = 16384

_tile_1x1, _tile_2x1, _tile_3x1, _tile_4x1 = (vnni.dot_tile(rows, 1) for rows in (1, 2, 3, 4))
_tile_5x1, _tile_6x1, _tile_7x1, _tile_8x1 = (vnni.dot_tile(rows, 1) for rows in (5, 6, 7, 8))
_tile_1x4, _tile_2x4 = vnni.dot_tile(1, 4), vnni.dot_tile(2, 4)
_tile_4x4, _tile_6x4 = vnni.dot_tile(4, 4), vnni.dot_tile(6, 4)


def padded(k: int) -> int:
    """``k`` rounded up to what the tile reads at a time."""
    return -(-k // vnni.LANES) * vnni.LANES


@kernel
def _quantise(
    x: NDArray[np.float32], planes: int, q: NDArray[np.uint8], scale: NDArray[np.float32]
) -> None:
    """``x`` [R, K] -> ``q`` [R * planes, Kp] (high plane first, offset 128), ``scale`` [R]."""
    rows, depth = x.shape
    levels = np.float32(127.0) if planes == 1 else np.float32(127.0 * 256.0 + 255.0)
    for r in range(rows):
        top = np.float32(0.0)
        for i in range(depth):
            top = max(top, abs(x[r, i]))
        step = top / levels
        scale[r] = step
        inverse = np.float32(1.0) / step if step > 0 else np.float32(0.0)
        if planes == 1:
            for i in range(depth):
                v = np.int32(np.rint(x[r, i] * inverse))
                q[r, i] = np.uint8(max(np.int32(-127), min(np.int32(127), v)) + 128)
        else:
            for i in range(depth):
                v = np.int32(np.rint(x[r, i] * inverse))
                v = max(np.int32(-32767), min(np.int32(32767), v))
                q[2 * r, i] = np.uint8((v >> 8) + 128)
                q[2 * r + 1, i] = np.uint8(v & 255)


@kernel
def _dot_channel(x: int, w: int, k: int, out: int, ldo: int, rows: int) -> None:
    """All rows against one channel."""
    while rows >= 8:
        _tile_8x1(x, k, w, k, k, out, ldo)
        x += 8 * k
        out += 4 * 8 * ldo
        rows -= 8
    if rows == 1:
        _tile_1x1(x, k, w, k, k, out, ldo)
    elif rows == 2:
        _tile_2x1(x, k, w, k, k, out, ldo)
    elif rows == 3:
        _tile_3x1(x, k, w, k, k, out, ldo)
    elif rows == 4:
        _tile_4x1(x, k, w, k, k, out, ldo)
    elif rows == 5:
        _tile_5x1(x, k, w, k, k, out, ldo)
    elif rows == 6:
        _tile_6x1(x, k, w, k, k, out, ldo)
    elif rows == 7:
        _tile_7x1(x, k, w, k, k, out, ldo)


@kernel
def _dot_rows(x: int, w: int, k: int, out: int, ldo: int, step: int, cols: int) -> None:
    """``step`` rows (1, 2, 4 or 6) against ``cols`` channels, four at a time."""
    n = 0
    while n + 4 <= cols:
        at, to = w + n * k, out + 4 * n
        if step == 6:
            _tile_6x4(x, k, at, k, k, to, ldo)
        elif step == 4:
            _tile_4x4(x, k, at, k, k, to, ldo)
        elif step == 2:
            _tile_2x4(x, k, at, k, k, to, ldo)
        else:
            _tile_1x4(x, k, at, k, k, to, ldo)
        n += 4
    while n < cols:
        _dot_channel(x, w + n * k, k, out + 4 * n, ldo, step)
        n += 1


@kernel
def _dot_block_simd(
    q: NDArray[np.uint8], w: NDArray[np.int8], first: int, cols: int, acc: NDArray[np.int32]
) -> None:
    rows, k, ldo = q.shape[0], q.shape[1], acc.shape[1]
    x, out = q.ctypes.data, acc.ctypes.data
    weights = w.ctypes.data + first * k
    if rows * k <= NARROW_BYTES:
        for n in range(cols):
            _dot_channel(x, weights + n * k, k, out + 4 * n, ldo, rows)
        return
    m = 0
    while m < rows:
        left = rows - m
        step = 6 if left >= 6 else (4 if left >= 4 else (2 if left >= 2 else 1))
        _dot_rows(x + m * k, weights, k, out + 4 * m * ldo, ldo, step, cols)
        m += step


@kernel
def _dot_block_plain(
    q: NDArray[np.uint8], w: NDArray[np.int8], first: int, cols: int, acc: NDArray[np.int32]
) -> None:
    for n in range(cols):
        for m in range(q.shape[0]):
            total = np.int32(0)
            for i in range(q.shape[1]):
                total += np.int32(q[m, i]) * np.int32(w[first + n, i])
            acc[m, n] = total


_dot_block = _dot_block_simd if vnni.available() else _dot_block_plain


@exact_kernel
def _finish(
    acc: NDArray[np.int32],
    planes: int,
    row_scale: NDArray[np.float32],
    scale: NDArray[np.float32],
    sums: NDArray[np.int32],
    bias: NDArray[np.float32],
    first: int,
    cols: int,
    out: NDArray[np.float32],
) -> None:
    """Take the offset of 128 out of the integer sums, then scale; one rounding for one plane's
    sums, none before the scale for two."""
    for r in range(row_scale.shape[0]):
        step = row_scale[r]
        if planes == 1:
            for c in range(cols):
                n = first + c
                whole = np.float32(acc[r, c] - np.int32(128) * sums[n])
                out[r, n] = whole * (step * scale[n])
        else:
            for c in range(cols):
                n = first + c
                high = np.float64(acc[2 * r, c] - np.int32(128) * sums[n])
                exact = high * 256.0 + np.float64(acc[2 * r + 1, c])
                out[r, n] = np.float32(exact * np.float64(step * scale[n]))
        if bias.shape[0] > 0:
            for c in range(cols):
                out[r, first + c] += bias[first + c]


@parallel_kernel
def linear_int8(
    x: NDArray[np.float32],
    weight: NDArray[np.int8],
    scale: NDArray[np.float32],
    sums: NDArray[np.int32],
    bias: NDArray[np.float32],
    planes: int,
    out: NDArray[np.float32],
) -> None:
    """``out[R, N] = x[R, K] @ (weight * scale).T + bias``.

    ``x`` float32 [R, K]; ``weight`` int8 [N, Kp], Kp = :func:`padded` (K), zeros in the padding;
    ``scale`` float32 [N]; ``sums`` int32 [N], the row sums of ``weight``; ``bias`` float32 [N] or
    [0] for none; ``planes`` 1 (8-bit activations) or 2 (16-bit). ``out`` must not alias ``x``.
    """
    rows, channels, depth = x.shape[0], weight.shape[0], weight.shape[1]
    q = np.zeros((rows * planes, depth), np.uint8)
    row_scale = np.empty(rows, np.float32)
    _quantise(x, planes, q, row_scale)
    for block in prange((channels + BLOCK - 1) // BLOCK):
        first = block * BLOCK
        cols = min(BLOCK, channels - first)
        acc = np.empty((rows * planes, BLOCK), np.int32)
        _dot_block(q, weight, first, cols, acc)
        _finish(acc, planes, row_scale, scale, sums, bias, first, cols, out)
