"""The inner loops of attention as LLVM IR on 16-wide float vectors.

Numba's loops spill their accumulators at every step, since it cannot tell LLVM that the arrays do
not overlap; here they stay in registers. The vectors are LLVM's own type, so any processor runs
them, a narrower one in several instructions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

LANES = 16
_DEPTH = 8  # products a turn of the scores' loop

_F32, _I64 = ir.FloatType(), ir.IntType(64)
_VECTOR = ir.VectorType(_F32, LANES)
_PICK = ir.VectorType(ir.IntType(32), LANES)
_SIGNATURE = types.void(*([types.intp] * 6))


def _function(module: ir.Module, name: str, kind: ir.FunctionType) -> Any:
    return module.globals.get(name) or ir.Function(module, kind, name)


def _multiply_add(b: Any, x: Any, y: Any, z: Any) -> Any:
    fma = _function(
        b.module, "llvm.fmuladd.v16f32", ir.FunctionType(_VECTOR, [_VECTOR, _VECTOR, _VECTOR])
    )
    return b.call(fma, [x, y, z])


def _address(b: Any, base: Any, row: Any, stride: Any, chunk: int) -> Any:
    """``base + 4 * (row * stride + chunk * LANES)``."""
    element = b.add(b.mul(row, stride), ir.Constant(_I64, chunk * LANES))
    return b.add(base, b.mul(ir.Constant(_I64, 4), element))


def _load(b: Any, kind: Any, address: Any) -> Any:
    value = b.load(b.inttoptr(address, kind.as_pointer()))
    value.align = 4
    return value


def _splat(b: Any, scalar: Any) -> Any:
    empty = ir.Constant(_VECTOR, ir.Undefined)
    first = b.insert_element(empty, scalar, ir.Constant(ir.IntType(32), 0))
    lanes = ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES)
    return b.shuffle_vector(first, empty, lanes)


def _counted(b: Any, count: Any, carried: list[Any], body: Callable[..., list[Any]]) -> list[Any]:
    """``for j in range(count)``, count >= 1; ``body(j, values)`` returns the next values."""
    entry = b.block
    loop, done = b.append_basic_block("loop"), b.append_basic_block("done")
    b.branch(loop)
    b.position_at_end(loop)
    j = b.phi(_I64)
    j.add_incoming(ir.Constant(_I64, 0), entry)
    phis = []
    for value in carried:
        phi = b.phi(value.type)
        phi.add_incoming(value, entry)
        phis.append(phi)
    following = body(j, phis)
    step = b.add(j, ir.Constant(_I64, 1))
    j.add_incoming(step, b.block)
    for phi, value in zip(phis, following, strict=True):
        phi.add_incoming(value, b.block)
    b.cbranch(b.icmp_signed("<", step, count), loop, done)
    b.position_at_end(done)
    return following


def turn_tile(width: int) -> Any:
    """An intrinsic ``turn(keys, count, out)``: sixteen keys on their side.

    Addresses of float32 ``keys`` [>= count, width] and ``out`` [width, LANES]; 1 <= ``count`` <=
    LANES. Lanes past ``count`` repeat the last key, so nothing beyond it is read.
    """
    chunks = width // LANES

    @intrinsic
    def turn(typingctx: Any, keys: Any, count: Any, out: Any) -> Any:
        def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
            keys, count, out = args
            stride, one = ir.Constant(_I64, width), ir.Constant(_I64, 1)
            last = b.sub(count, one)
            rows = []
            for lane in range(LANES):
                row = ir.Constant(_I64, lane)
                rows.append(b.select(b.icmp_signed("<", row, last), row, last))
            for chunk in range(chunks):
                lines = [_load(b, _VECTOR, _address(b, keys, row, stride, chunk)) for row in rows]
                for i, line in enumerate(_transposed(b, lines)):
                    element = ir.Constant(_I64, 4 * LANES * (chunk * LANES + i))
                    to = b.inttoptr(b.add(out, element), _VECTOR.as_pointer())
                    b.store(line, to).align = 4
            return context.get_dummy_value()

        return types.void(*([types.intp] * 3)), codegen

    return turn


def _transposed(b: Any, lines: list[Any]) -> list[Any]:
    """Sixteen vectors as a matrix, transposed: in each of four rounds, two vectors that are a power
    of two apart exchange halves of pieces of that size."""
    for distance in (1, 2, 4, 8):
        exchanged = list(lines)
        low = [lane if not lane & distance else LANES + lane - distance for lane in range(LANES)]
        high = [lane + distance if not lane & distance else LANES + lane for lane in range(LANES)]
        for i in range(LANES):
            if i & distance:
                continue
            pair = lines[i], lines[i + distance]
            exchanged[i] = b.shuffle_vector(*pair, ir.Constant(_PICK, low))
            exchanged[i + distance] = b.shuffle_vector(*pair, ir.Constant(_PICK, high))
        lines = exchanged
    return lines


def score_tile(queries: int, width: int) -> Any:
    """An intrinsic ``score(q, keys, out, ldo)``: ``queries`` queries with sixteen turned keys.

    Addresses of float32 ``q`` [queries, width], ``keys`` [width, LANES] as :func:`turn_tile` lays
    them out, ``out`` [queries, LANES] with ``ldo`` elements a row. ``width`` is a multiple of
    ``2 * LANES``. The even and the odd products are summed apart, which hides half of the latency;
    a score has the same bits whatever ``queries`` is.
    """

    @intrinsic
    def score(typingctx: Any, q: Any, keys: Any, out: Any, ldo: Any) -> Any:
        def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
            q, keys, out, ldo = args
            stride = ir.Constant(_I64, width)
            zero = ir.Constant(_VECTOR, [0.0] * LANES)

            def body(turn: Any, sums: list[Any]) -> list[Any]:
                first = b.mul(turn, ir.Constant(_I64, _DEPTH))
                grown = list(sums)
                for step in range(_DEPTH):
                    at = b.add(first, ir.Constant(_I64, step))
                    lanes = ir.Constant(_I64, LANES)
                    key = _load(b, _VECTOR, _address(b, keys, at, lanes, 0))
                    for h in range(queries):
                        element = b.add(b.mul(stride, ir.Constant(_I64, h)), at)
                        place = b.add(q, b.mul(ir.Constant(_I64, 4), element))
                        value = _splat(b, _load(b, _F32, place))
                        cell = 2 * h + step % 2
                        grown[cell] = _multiply_add(b, value, key, grown[cell])
                return grown

            turns = ir.Constant(_I64, width // _DEPTH)
            sums = _counted(b, turns, [zero] * (2 * queries), body)
            for h in range(queries):
                element = b.mul(ldo, ir.Constant(_I64, 4 * h))
                to = b.inttoptr(b.add(out, element), _VECTOR.as_pointer())
                b.store(b.fadd(sums[2 * h], sums[2 * h + 1]), to).align = 4
            return context.get_dummy_value()

        return types.void(*([types.intp] * 4)), codegen

    return score


def mix_tile(heads: int, width: int) -> Any:
    """An intrinsic ``mix(weights, ldw, values, count, out, _)``: weighted sums of value rows.

    Addresses of float32 ``weights`` [heads, >= count] with ``ldw`` elements a row, ``values``
    [count, width], ``out`` [heads, width]. ``width`` is a multiple of :data:`LANES`; ``count`` is
    at least 1.
    """
    chunks = width // LANES

    @intrinsic
    def mix(
        typingctx: Any, weights: Any, ldw: Any, values: Any, count: Any, out: Any, _: Any
    ) -> Any:
        def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
            weights, ldw, values, count, out, _ = args
            stride = ir.Constant(_I64, width)

            def body(j: Any, sums: list[Any]) -> list[Any]:
                value = [
                    _load(b, _VECTOR, _address(b, values, j, stride, c)) for c in range(chunks)
                ]
                grown = []
                for h in range(heads):
                    element = b.add(b.mul(ldw, ir.Constant(_I64, h)), j)
                    at = b.add(weights, b.mul(ir.Constant(_I64, 4), element))
                    weight = _splat(b, _load(b, _F32, at))
                    for c in range(chunks):
                        grown.append(_multiply_add(b, weight, value[c], sums[h * chunks + c]))
                return grown

            zero = ir.Constant(_VECTOR, [0.0] * LANES)
            sums = _counted(b, count, [zero] * (heads * chunks), body)
            for h in range(heads):
                for c in range(chunks):
                    to = _address(b, out, ir.Constant(_I64, h), stride, c)
                    stored = b.store(sums[h * chunks + c], b.inttoptr(to, _VECTOR.as_pointer()))
                    stored.align = 4
            return context.get_dummy_value()

        return _SIGNATURE, codegen

    return mix
