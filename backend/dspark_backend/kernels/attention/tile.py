"""The two inner loops of attention as LLVM IR on 16-wide float vectors.

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

_F32, _I64 = ir.FloatType(), ir.IntType(64)
_VECTOR = ir.VectorType(_F32, LANES)
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


def score_tile(heads: int, width: int) -> Any:
    """An intrinsic ``score(q, keys, count, out, ldo, _)``: dot products of ``heads`` queries.

    Addresses of float32 ``q`` [heads, width], ``keys`` [count, width], ``out`` [heads, >= count]
    with ``ldo`` elements a row. ``width`` is a multiple of :data:`LANES`; ``count`` >= 1.
    """
    chunks = width // LANES

    @intrinsic
    def score(typingctx: Any, q: Any, keys: Any, count: Any, out: Any, ldo: Any, _: Any) -> Any:
        def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
            q, keys, count, out, ldo, _ = args
            stride = ir.Constant(_I64, width)
            total = _function(
                b.module, "llvm.vector.reduce.fadd.v16f32", ir.FunctionType(_F32, [_F32, _VECTOR])
            )
            queries = [
                [
                    _load(b, _VECTOR, _address(b, q, ir.Constant(_I64, h), stride, c))
                    for c in range(chunks)
                ]
                for h in range(heads)
            ]

            def body(j: Any, _: list[Any]) -> list[Any]:
                key = [_load(b, _VECTOR, _address(b, keys, j, stride, c)) for c in range(chunks)]
                for h in range(heads):
                    lanes = b.fmul(queries[h][0], key[0])
                    for c in range(1, chunks):
                        lanes = _multiply_add(b, queries[h][c], key[c], lanes)
                    zero = ir.Constant(_F32, 0.0)
                    dot = b.call(total, [zero, lanes], fastmath=("reassoc",))
                    element = b.add(b.mul(ldo, ir.Constant(_I64, h)), j)
                    to = b.add(out, b.mul(ir.Constant(_I64, 4), element))
                    b.store(dot, b.inttoptr(to, _F32.as_pointer()))
                return []

            _counted(b, count, [], body)
            return context.get_dummy_value()

        return _SIGNATURE, codegen

    return score


def mix_tile(heads: int, width: int) -> Any:
    """An intrinsic ``mix(weights, ldw, values, count, out, _)``: weighted sums of value rows.

    Addresses of float32 ``weights`` [heads, >= count] with ``ldw`` elements a row, ``values``
    [count, width], ``out`` [heads, width]. Same demands as :func:`score_tile`.
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
