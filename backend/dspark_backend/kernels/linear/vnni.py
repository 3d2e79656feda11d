"""The inner tile of the int8 matrix product, written as LLVM IR around ``vpdpbusd`` (AVX-512 VNNI).

LLVM does not find this instruction from a loop, and everything else in the product is memory
bandwidth: one pass over a panel of weights (``panels.py``) serves every row of the tile, so
verifying eight tokens costs little more than decoding one. Four bytes of a row's activations are
broadcast to all lanes, where each meets the four weights of its own channel.
"""

from __future__ import annotations

from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from dspark_backend.kernels.linear.panels import PANEL, QUAD

_UNROLL = 4  # quads a turn of the loop; a padded depth has a multiple of that

_I8, _I32, _I64 = ir.IntType(8), ir.IntType(32), ir.IntType(64)
_ACC = ir.VectorType(_I32, 16)
# LLVM 22 gave the operands their true element type.
_OPERAND = ir.VectorType(_I8, 64) if llvm.llvm_version_info[0] >= 22 else _ACC
_LINE = 64  # bytes of a register
_LANES = 16
_LINES = PANEL // _LANES  # registers of weights for a quad of inputs
# How far ahead of the sums weights are asked for. The hardware's prefetcher stops at the end of a
# page; asking for what lies past it lets reading and multiplying overlap.
_AHEAD = 4096


def available() -> bool:
    """Whether this processor executes ``vpdpbusd`` on 512-bit registers."""
    features = llvm.get_host_cpu_features()
    return bool(features.get("avx512vnni") and features.get("avx512f"))


def _declare(module: ir.Module, name: str, kind: ir.FunctionType) -> Any:
    return module.globals.get(name) or ir.Function(module, kind, name)


def _at(b: Any, base: Any, kind: Any) -> Any:
    return b.inttoptr(base, kind.as_pointer())


def _broadcast(b: Any, address: Any) -> Any:
    """Four bytes at ``address`` in every lane."""
    quad = b.load(_at(b, address, _I32))
    quad.align = 1
    undefined = ir.Constant(_ACC, ir.Undefined)
    one = b.insert_element(undefined, quad, ir.Constant(_I32, 0))
    lanes = b.shuffle_vector(one, undefined, ir.Constant(ir.VectorType(_I32, 16), [0] * 16))
    return lanes if _OPERAND is _ACC else b.bitcast(lanes, _OPERAND)


def _prefetch(b: Any, address: Any) -> None:
    """Ask for the line at ``address``; one that is not mapped is ignored by the processor."""
    pointer = ir.PointerType(_I8)
    name = f"llvm.prefetch.{'p0' if pointer.is_opaque else 'p0i8'}"
    kind = ir.FunctionType(ir.VoidType(), [pointer, _I32, _I32, _I32])
    read, near, data = (ir.Constant(_I32, value) for value in (0, 3, 1))
    b.call(_declare(b.module, name, kind), [b.inttoptr(address, pointer), read, near, data])


def panel_tile(rows: int) -> Any:
    """An intrinsic ``tile(x, ldx, w, k, out)``: ``rows`` rows against one panel.

    ``x`` address of uint8 ``[rows, k]`` (row stride ``ldx`` bytes), ``w`` address of the panel,
    ``out`` address of int32 ``[rows, PANEL]``. ``k`` is a positive multiple of 16. Exact: products
    accumulate in int32.
    """

    @intrinsic
    def tile(typingctx: Any, x: Any, ldx: Any, w: Any, k: Any, out: Any) -> Any:
        signature = types.void(*([types.intp] * 5))

        def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
            x, ldx, w, depth, out = args
            dot = _declare(
                b.module,
                "llvm.x86.avx512.vpdpbusd.512",
                ir.FunctionType(_ACC, [_ACC, _OPERAND, _OPERAND]),
            )
            row_at = [b.add(x, b.mul(ldx, ir.Constant(_I64, m))) for m in range(rows)]
            entry = b.block
            body, done = b.append_basic_block("k"), b.append_basic_block("done")
            b.branch(body)
            b.position_at_end(body)
            at = b.phi(_I64)
            at.add_incoming(ir.Constant(_I64, 0), entry)
            start = [[b.phi(_ACC) for _ in range(_LINES)] for _ in range(rows)]
            for row in start:
                for cell in row:
                    cell.add_incoming(ir.Constant(_ACC, [0] * _LANES), entry)

            sums = [list(row) for row in start]
            panel = b.add(w, b.mul(at, ir.Constant(_I64, PANEL)))
            for turn in range(_UNROLL):
                weights = []
                for line in range(_LINES):
                    offset = (turn * _LINES + line) * _LINE
                    value = b.load(_at(b, b.add(panel, ir.Constant(_I64, offset)), _OPERAND))
                    value.align = 1
                    weights.append(value)
                    _prefetch(b, b.add(panel, ir.Constant(_I64, offset + _AHEAD)))
                for m in range(rows):
                    place = b.add(row_at[m], b.add(at, ir.Constant(_I64, turn * QUAD)))
                    activation = _broadcast(b, place)
                    for n in range(_LINES):
                        sums[m][n] = b.call(dot, [sums[m][n], activation, weights[n]])
            following = b.add(at, ir.Constant(_I64, _UNROLL * QUAD))
            at.add_incoming(following, b.block)
            for m in range(rows):
                for n in range(_LINES):
                    start[m][n].add_incoming(sums[m][n], b.block)
            b.cbranch(b.icmp_signed("<", following, depth), body, done)
            b.position_at_end(done)
            for m in range(rows):
                for n in range(_LINES):
                    offset = 4 * (PANEL * m + _LANES * n)
                    store = b.store(sums[m][n], _at(b, b.add(out, ir.Constant(_I64, offset)), _ACC))
                    store.align = 1
            return context.get_dummy_value()

        return signature, codegen

    return tile
