"""The int8 matrix product on tile registers (Intel AMX), as LLVM IR.

From about five rows on, ``vpdpbusd`` is what a product waits for and no longer the weights; a tile
multiplies sixteen rows in the time of one. The weights stay in the panels of ``panels.py``: sixteen
quads of sixteen channels are a tile operand as they lie there. Sums are int32 and exact, so a row
has the same bits as with ``vnni.py``, whichever of the two a call takes.

The kernel hands the tile registers out on request, once a process (Linux, ``arch_prctl(2)``). The
intrinsics are those of "Intel 64 and IA-32 Architectures Software Developer's Manual", vol. 1,
chapter 18; tile numbers in them are immediates.
"""

from __future__ import annotations

import ctypes
import functools
import platform
import sys
from collections.abc import Callable
from typing import Any, cast

import llvmlite.binding as llvm
import numpy as np
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic
from numpy.typing import NDArray

from dspark_backend.kernels.jit import kernel
from dspark_backend.kernels.linear.panels import DEPTH_STEP, PANEL, QUAD

TILE_ROWS = 16
CONFIG_BYTES = 64

_LINE = 64  # bytes of a tile's row
_LANES = 16  # int32 sums, or channels, in it
_AHEAD = 8192
# Tiles 0 to 3 hold sums (two of channels for each of two groups of rows), the others operands.
_ACTIVATIONS, _WEIGHTS = (4, 5), (6, 7)

_SYS_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XFEATURE_XTILEDATA = 158, 0x1023, 18

_I8, _I32, _I64 = ir.IntType(8), ir.IntType(32), ir.IntType(64)
_POINTER = ir.PointerType(_I8)


def supported() -> bool:
    """Whether this processor has int8 tiles; :func:`permitted` says if the process may use them."""
    features = llvm.get_host_cpu_features()
    return bool(features.get("amx-tile") and features.get("amx-int8"))


@functools.cache
def permitted() -> bool:
    """Ask the operating system for the tile registers; False where it has or gives none."""
    if not (supported() and sys.platform == "linux" and platform.machine() == "x86_64"):
        return False
    call = ctypes.CDLL(None, use_errno=True).syscall
    return int(call(_SYS_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XFEATURE_XTILEDATA)) == 0


def _void(b: Any, name: str, *args: Any) -> None:
    kind = ir.FunctionType(ir.VoidType(), [arg.type for arg in args])
    b.call(b.module.globals.get(name) or ir.Function(b.module, kind, name), args)


def _tile(number: int) -> Any:
    return ir.Constant(_I8, number)


@kernel
def shape_tiles(rows: int, config: NDArray[np.uint8]) -> None:
    """Fill ``config`` (zeros) with what ``ldtilecfg`` reads: palette 1, every tile 64 bytes wide,
    ``rows`` deep for sums and activations, 16 for weights."""
    config[0] = 1
    for tile in range(8):
        config[16 + 2 * tile] = 64
        config[48 + tile] = rows if tile < 6 else 16


@intrinsic
def _configure(typingctx: Any, address: Any) -> Any:
    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        _void(b, "llvm.x86.ldtilecfg", b.inttoptr(args[0], _POINTER))
        return context.get_dummy_value()

    return types.void(types.intp), codegen


@intrinsic
def _release(typingctx: Any) -> Any:
    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        _void(b, "llvm.x86.tilerelease")
        return context.get_dummy_value()

    return types.void(), codegen


configure: Callable[[int], None] = cast("Callable[[int], None]", _configure)
"""Shape this thread's tiles by the ``CONFIG_BYTES`` at an address."""

release: Callable[[], None] = cast("Callable[[], None]", _release)
"""Give this thread's tiles back: a context switch need not save them any more."""


def panel_product(groups: int) -> Any:
    """An intrinsic ``product(x, k, w, out, ldo, rows)``: ``groups`` (1 or 2) tiles of rows against
    one panel.

    ``rows`` is what :func:`configure` shaped the tiles to, at most ``TILE_ROWS``; ``x`` address of
    uint8 ``[groups * rows, k]``, ``w`` address of the panel, ``out`` address of int32
    ``[groups * rows, PANEL]`` with ``ldo`` elements a row. ``k`` is a positive multiple of
    ``DEPTH_STEP``.
    """

    @intrinsic
    def product(typingctx: Any, x: Any, k: Any, w: Any, out: Any, ldo: Any, rows: Any) -> Any:
        signature = types.void(*([types.intp] * 6))

        def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
            x, depth, w, out, ldo, rows = args

            def at(base: Any, offset: int) -> Any:
                return b.inttoptr(b.add(base, ir.Constant(_I64, offset)), _POINTER)

            for number in range(2 * groups):
                _void(b, "llvm.x86.tilezero", _tile(number))
            starts = [x, b.add(x, b.mul(depth, rows))]
            quad_stride = ir.Constant(_I64, PANEL * QUAD)
            entry = b.block
            body, done = b.append_basic_block("k"), b.append_basic_block("done")
            b.branch(body)
            b.position_at_end(body)
            place = b.phi(_I64)
            place.add_incoming(ir.Constant(_I64, 0), entry)
            panel = b.add(w, b.mul(place, ir.Constant(_I64, PANEL)))
            read, near, data = (ir.Constant(_I32, value) for value in (0, 3, 1))
            for line in range(0, DEPTH_STEP * PANEL, _LINE):
                _void(b, "llvm.prefetch.p0", at(panel, line + _AHEAD), read, near, data)
            for half, tile in enumerate(_WEIGHTS):
                weights = at(panel, half * _LINE)
                _void(b, "llvm.x86.tileloadd64", _tile(tile), weights, quad_stride)
            for group in range(groups):
                activations = _tile(_ACTIVATIONS[group])
                row = b.inttoptr(b.add(starts[group], place), _POINTER)
                _void(b, "llvm.x86.tileloadd64", activations, row, depth)
                for half, tile in enumerate(_WEIGHTS):
                    sums = _tile(2 * group + half)
                    _void(b, "llvm.x86.tdpbusd", sums, activations, _tile(tile))
            following = b.add(place, ir.Constant(_I64, DEPTH_STEP))
            place.add_incoming(following, b.block)
            b.cbranch(b.icmp_signed("<", following, depth), body, done)
            b.position_at_end(done)
            row_bytes = b.mul(ldo, ir.Constant(_I64, 4))
            below = b.mul(rows, row_bytes)
            for group in range(groups):
                first = b.add(out, below) if group else out
                for half in range(2):
                    sums = _tile(2 * group + half)
                    lanes = at(first, half * 4 * _LANES)
                    _void(b, "llvm.x86.tilestored64", sums, lanes, row_bytes)
            return context.get_dummy_value()

        return signature, codegen

    return product
