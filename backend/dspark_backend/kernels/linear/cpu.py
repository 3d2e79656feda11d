"""The quantised linear layer on the CPU: int8 weights, 8- or 16-bit activations, exact sums.

Activations are quantised per row (Dettmers et al. 2022 call it vector-wise) into one or two planes
of bytes. The second plane holds eight more bits and costs one more row in the tile: nothing while
the product is bound by reading the weights. Sums are integers, so a row's result is the same bit
for bit whatever else is in the call. The oracle is ``reference.py``.
"""

from __future__ import annotations

import numba
import numpy as np
from numpy.typing import NDArray

from dspark_backend.kernels.jit import exact_kernel, kernel, parallel_kernel, prange
from dspark_backend.kernels.linear import amx, vnni
from dspark_backend.kernels.linear.panels import PANEL, QUAD
from dspark_backend.kernels.maximum import largest_magnitude

MAX_DEPTH = 2**31 // (255 * 127)  # longest dot product that cannot overflow int32

# Up to twelve rows: their 24 sums, two registers of weights and a broadcast fill the register file.
_tile_1, _tile_2, _tile_3, _tile_4 = (vnni.panel_tile(rows) for rows in (1, 2, 3, 4))
_tile_5, _tile_6, _tile_7, _tile_8 = (vnni.panel_tile(rows) for rows in (5, 6, 7, 8))
_tile_9, _tile_10, _tile_11, _tile_12 = (vnni.panel_tile(rows) for rows in (9, 10, 11, 12))
_tile_group, _tile_groups = amx.panel_product(1), amx.panel_product(2)

# Panels whose sums are scaled together: reading sums that were stored just now waits for them.
_TOGETHER = 8

TILED_FROM = 5
"""Rows, planes counted, from which tile registers are used. Below, both wait for the weights."""


@kernel
def _quantise_row(
    x: NDArray[np.float32], row: int, planes: int, q: NDArray[np.uint8], scale: NDArray[np.float32]
) -> None:
    """Row ``row`` of ``x`` [R, K] -> its rows of ``q`` [R * planes, Kp] (high plane first, offset
    128) and ``scale[row]``."""
    depth = x.shape[1]
    levels = np.float32(127.0) if planes == 1 else np.float32(127.0 * 256.0 + 255.0)
    step = largest_magnitude(x[row]) / levels
    scale[row] = step
    inverse = np.float32(1.0) / step if step > 0 else np.float32(0.0)
    if planes == 1:
        for i in range(depth):
            v = np.int32(np.rint(x[row, i] * inverse))
            q[row, i] = np.uint8(max(np.int32(-127), min(np.int32(127), v)) + 128)
    else:
        for i in range(depth):
            v = np.int32(np.rint(x[row, i] * inverse))
            v = max(np.int32(-32767), min(np.int32(32767), v))
            q[2 * row, i] = np.uint8((v >> 8) + 128)
            q[2 * row + 1, i] = np.uint8(v & 255)


@kernel
def _dot_tile(x: int, k: int, weights: int, out: int, rows: int) -> None:
    """1 to 12 rows against one panel."""
    if rows == 12:
        _tile_12(x, k, weights, k, out)
    elif rows == 1:
        _tile_1(x, k, weights, k, out)
    elif rows == 2:
        _tile_2(x, k, weights, k, out)
    elif rows == 3:
        _tile_3(x, k, weights, k, out)
    elif rows == 4:
        _tile_4(x, k, weights, k, out)
    elif rows == 5:
        _tile_5(x, k, weights, k, out)
    elif rows == 6:
        _tile_6(x, k, weights, k, out)
    elif rows == 7:
        _tile_7(x, k, weights, k, out)
    elif rows == 8:
        _tile_8(x, k, weights, k, out)
    elif rows == 9:
        _tile_9(x, k, weights, k, out)
    elif rows == 10:
        _tile_10(x, k, weights, k, out)
    elif rows == 11:
        _tile_11(x, k, weights, k, out)


@kernel
def _dot_panel_simd(
    q: NDArray[np.uint8], w: NDArray[np.int8], index: int, acc: NDArray[np.int32]
) -> None:
    """All rows ``q`` [R, Kp] against panel ``index``: ``acc`` [R, PANEL]."""
    rows, k = q.shape[0], q.shape[1]
    x, out, weights = q.ctypes.data, acc.ctypes.data, w.ctypes.data + index * w.shape[1]
    while rows > 12:
        # Two equal halves rather than twelve and a rest that would read the weights for little.
        done = 12 if rows >= 24 else (rows + 1) // 2
        _dot_tile(x, k, weights, out, done)
        x += done * k
        out += 4 * done * PANEL
        rows -= done
    _dot_tile(x, k, weights, out, rows)


@kernel
def _dot_panel_plain(
    q: NDArray[np.uint8], w: NDArray[np.int8], index: int, acc: NDArray[np.int32]
) -> None:
    """As :func:`_dot_panel_simd`, for processors without the instruction."""
    for m in range(q.shape[0]):
        for n in range(PANEL):
            total = np.int32(0)
            for i in range(0, q.shape[1], QUAD):
                for j in range(QUAD):
                    total += np.int32(q[m, i + j]) * np.int32(w[index, PANEL * i + QUAD * n + j])
            acc[m, n] = total


_dot_panel = _dot_panel_simd if vnni.available() else _dot_panel_plain


@kernel
def _tiles(rows: int) -> tuple[int, int]:
    """How many groups of rows and how high: equal, so that one shape of the tiles serves a call."""
    groups = (rows + amx.TILE_ROWS - 1) // amx.TILE_ROWS
    if groups > 1:
        groups += groups % 2
    return groups, (rows + groups - 1) // groups


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
    # Slices, since LLVM vectorises loops over arrays that begin where the loop does.
    last = first + cols
    own_scale, own_sums = scale[first:last], sums[first:last]
    for r in range(row_scale.shape[0]):
        step, to = row_scale[r], out[r, first:last]
        if planes == 1:
            whole = acc[r, :cols]
            for c in range(cols):
                exact = np.int32(whole[c] - np.int32(128) * own_sums[c])
                to[c] = np.float32(exact) * (step * own_scale[c])
        else:
            high, low = acc[2 * r, :cols], acc[2 * r + 1, :cols]
            for c in range(cols):
                above = np.int32(high[c] - np.int32(128) * own_sums[c])
                both = np.float64(above) * 256.0 + np.float64(low[c])
                to[c] = np.float32(both * np.float64(step * own_scale[c]))
        if bias.shape[0] > 0:
            own_bias = bias[first:last]
            for c in range(cols):
                to[c] += own_bias[c]


@parallel_kernel
def _linear_panels(
    x: NDArray[np.float32],
    weight: NDArray[np.int8],
    scale: NDArray[np.float32],
    sums: NDArray[np.int32],
    bias: NDArray[np.float32],
    planes: int,
    out: NDArray[np.float32],
) -> None:
    """:func:`linear_int8` a panel at a time, on any processor."""
    rows, channels, depth = x.shape[0], scale.shape[0], weight.shape[1] // PANEL
    q = np.zeros((rows * planes, depth), np.uint8)
    row_scale = np.empty(rows, np.float32)
    for row in range(rows):
        _quantise_row(x, row, planes, q, row_scale)
    for index in prange((channels + PANEL - 1) // PANEL):
        acc = np.empty((rows * planes, PANEL), np.int32)
        _dot_panel(q, weight, index, acc)
        first = index * PANEL
        cols = min(PANEL, channels - first)
        _finish(acc, planes, row_scale, scale, sums, bias, first, cols, out)


@kernel
def _dot_tiles(
    q: NDArray[np.uint8], panel: int, groups: int, height: int, out: int, width: int
) -> None:
    """All rows of ``q`` against the panel at that address; ``out`` int32, ``width`` to a row."""
    depth = q.shape[1]
    if groups == 1:
        _tile_group(q.ctypes.data, depth, panel, out, width, height)
    else:
        for row in range(0, groups * height, 2 * height):
            x, to = q.ctypes.data + row * depth, out + 4 * row * width
            _tile_groups(x, depth, panel, to, width, height)


@parallel_kernel
def _linear_tiled(
    x: NDArray[np.float32],
    weight: NDArray[np.int8],
    scale: NDArray[np.float32],
    sums: NDArray[np.int32],
    bias: NDArray[np.float32],
    planes: int,
    threads: int,
    out: NDArray[np.float32],
) -> None:
    """:func:`linear_int8` on tile registers: compiled only where ``amx.permitted()``."""
    rows, channels, depth = x.shape[0], scale.shape[0], weight.shape[1] // PANEL
    groups, height = _tiles(rows * planes)
    q = np.zeros((groups * height, depth), np.uint8)
    row_scale = np.empty(rows, np.float32)
    for row in range(rows):
        _quantise_row(x, row, planes, q, row_scale)
    shape = np.zeros(amx.CONFIG_BYTES, np.uint8)
    amx.shape_tiles(height, shape)
    panels = (channels + PANEL - 1) // PANEL
    # One turn a thread, since shaping the tiles costs as much as a short panel.
    turns = min(threads, panels)
    for turn in prange(turns):
        acc = np.empty((groups * height, _TOGETHER * PANEL), np.int32)
        amx.configure(shape.ctypes.data)
        last = (turn + 1) * panels // turns
        for start in range(turn * panels // turns, last, _TOGETHER):
            end = min(start + _TOGETHER, last)
            for index in range(start, end):
                panel = weight.ctypes.data + index * weight.shape[1]
                sums_at = acc.ctypes.data + 4 * PANEL * (index - start)
                _dot_tiles(q, panel, groups, height, sums_at, acc.shape[1])
            first = start * PANEL
            cols = min(end * PANEL, channels) - first
            _finish(acc, planes, row_scale, scale, sums, bias, first, cols, out)
        amx.release()


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

    ``x`` float32 [R, K]; ``weight`` int8 [P, PANEL * Kp], as :func:`panels.pack` lays it out;
    ``scale`` float32 [N]; ``sums`` int32 [N], the sums over each channel's inputs; ``bias`` float32
    [N] or [0] for none; ``planes`` 1 (8-bit activations) or 2 (16-bit). ``out`` must not alias
    ``x``.
    """
    if x.shape[0] * planes >= TILED_FROM and amx.permitted():
        threads = numba.get_num_threads()
        _linear_tiled(x, weight, scale, sums, bias, planes, threads, out)
    else:
        _linear_panels(x, weight, scale, sums, bias, planes, out)
