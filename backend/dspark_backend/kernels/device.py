"""How the GPU kernels are compiled: Triton, or its interpreter where ``TRITON_INTERPRET=1`` was set
before its first import."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl


def device_kernel(fn: Callable[..., Any]) -> Any:
    """Compile ``fn`` for the GPU; launched as ``fn[grid](...)``, callable from other kernels."""
    return triton.jit(fn)


def kernel_of_varying(*names: str) -> Callable[[Callable[..., Any]], Any]:
    """As :func:`device_kernel`, for numbers called ``names`` that change from launch to launch.

    Triton compiles a kernel anew for an integer of 1 and for multiples of 16. What follows from a
    model's shapes may gain by that; what follows from who takes part in a step would have steps
    wait for the compiler.
    """
    return lambda fn: triton.jit(fn, do_not_specialize=names)


@device_kernel
def product(a: tl.tensor, b: tl.tensor, UPCAST: tl.constexpr) -> tl.tensor:  # noqa: N803
    """a @ b in float32, of float32 operands without TF32's rounding. ``UPCAST`` under the
    interpreter, whose product does not know bfloat16: float32 holds such operands exactly."""
    if UPCAST:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")
