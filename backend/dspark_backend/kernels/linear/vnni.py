"""The inner tile of the int8 matrix product, written as LLVM IR around ``vpdpbusd`` (AVX-512 VNNI).

LLVM does not find this instruction from a loop, and everything else in the product is memory
bandwidth: one pass over the weights serves every row of the tile, so verifying eight tokens costs
little more than decoding one. A tile of one channel reads its weights strictly in order, which the
hardware's prefetcher rewards with twice the bandwidth of four interleaved channels; a tile of four
loads the activations a quarter as often, which pays once those no longer fit the first cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

LANES = 64  # bytes a step along k; callers pad k to a multiple of it
_GROUP = 4  # accumulators that are summed together

_I8, _I32, _I64 = ir.IntType(8), ir.IntType(32), ir.IntType(64)
_ACC = ir.VectorType(_I32, 16)
# LLVM 22 gave the operands their true element type.
_OPERAND = ir.VectorType(_I8, 64) if llvm.llvm_version_info[0] >= 22 else _ACC


def available() -> bool:
    """Whether this processor executes ``vpdpbusd`` on 512-bit registers."""
    features = llvm.get_host_cpu_features()
    return bool(features.get("avx512vnni") and features.get("avx512f"))


def _declare(module: ir.Module, name: str, kind: ir.FunctionType) -> Any:
    return module.globals.get(name) or ir.Function(module, kind, name)


def _shuffle(b: Any, x: Any, y: Any, lanes: Sequence[int]) -> Any:
    return b.shuffle_vector(x, y, ir.Constant(ir.VectorType(_I32, len(lanes)), list(lanes)))


def _halves(b: Any, x: Any) -> Any:
    """The lower half of a vector plus its upper half."""
    half = x.type.count // 2
    return b.add(_shuffle(b, x, x, range(half)), _shuffle(b, x, x, range(half, 2 * half)))


def _sums(b: Any, accumulators: Sequence[Any]) -> list[Any]:
    """The lane sum of each accumulator.

    A whole group is summed like a transposition, in a third of the instructions of one by one.
    """
    if len(accumulators) < _GROUP:
        total = _declare(b.module, "llvm.vector.reduce.add.v16i32", ir.FunctionType(_I32, [_ACC]))
        return [b.call(total, [accumulator]) for accumulator in accumulators]
    quarters = [_halves(b, _halves(b, accumulator)) for accumulator in accumulators]
    evens, odds = (0, 2, 4, 6), (1, 3, 5, 7)
    left, right = (
        b.add(_shuffle(b, x, y, evens), _shuffle(b, x, y, odds))
        for x, y in (quarters[:2], quarters[2:])
    )
    sums = b.add(_shuffle(b, left, right, evens), _shuffle(b, left, right, odds))
    return [b.extract_element(sums, ir.Constant(_I32, i)) for i in range(_GROUP)]


def dot_tile(rows: int, cols: int) -> Any:
    """An intrinsic ``tile(x, ldx, w, ldw, k, out, ldo)`` for ``rows`` x ``cols`` dot products.

    ``x`` address of uint8 ``[rows, k]`` (row stride ``ldx`` bytes), ``w`` address of int8
    ``[cols, k]`` (``ldw`` bytes), ``out`` address of int32 ``[rows, cols]`` (``ldo`` elements).
    ``k`` is a positive multiple of :data:`LANES`. Exact: products accumulate in int32.
    """

    @intrinsic
    def tile(typingctx: Any, x: Any, ldx: Any, w: Any, ldw: Any, k: Any, out: Any, ldo: Any) -> Any:
        signature = types.void(*([types.intp] * 7))

        def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
            x, ldx, w, ldw, depth, out, ldo = args
            dot = _declare(
                b.module,
                "llvm.x86.avx512.vpdpbusd.512",
                ir.FunctionType(_ACC, [_ACC, _OPERAND, _OPERAND]),
            )
            entry = b.block
            body, done = b.append_basic_block("k"), b.append_basic_block("done")
            b.branch(body)
            b.position_at_end(body)
            at = b.phi(_I64)
            at.add_incoming(ir.Constant(_I64, 0), entry)
            acc = [[b.phi(_ACC) for _ in range(cols)] for _ in range(rows)]
            for row in acc:
                for cell in row:
                    cell.add_incoming(ir.Constant(_ACC, [0] * 16), entry)

            def load(base: Any, stride: Any, index: int) -> Any:
                address = b.add(base, b.add(at, b.mul(stride, ir.Constant(_I64, index))))
                value = b.load(b.inttoptr(address, _OPERAND.as_pointer()))
                value.align = 1
                return value

            weights = [load(w, ldw, n) for n in range(cols)]
            grown = []
            for m in range(rows):
                activation = load(x, ldx, m)
                grown.append(
                    [b.call(dot, [acc[m][n], activation, weights[n]]) for n in range(cols)]
                )
            following = b.add(at, ir.Constant(_I64, LANES))
            end = b.block
            at.add_incoming(following, end)
            for m in range(rows):
                for n in range(cols):
                    acc[m][n].add_incoming(grown[m][n], end)
            b.cbranch(b.icmp_signed("<", following, depth), body, done)
            b.position_at_end(done)
            cells = [(m, n) for m in range(rows) for n in range(cols)]
            for first in range(0, len(cells), _GROUP):
                group = cells[first : first + _GROUP]
                for (m, n), value in zip(
                    group, _sums(b, [grown[m][n] for m, n in group]), strict=True
                ):
                    element = b.add(b.mul(ldo, ir.Constant(_I64, m)), ir.Constant(_I64, n))
                    address = b.add(out, b.mul(ir.Constant(_I64, 4), element))
                    b.store(value, b.inttoptr(address, _I32.as_pointer()))
            return context.get_dummy_value()

        return signature, codegen

    return tile
