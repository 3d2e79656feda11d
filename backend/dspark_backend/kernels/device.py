"""How the GPU kernels are compiled: Triton, or its interpreter where ``TRITON_INTERPRET=1`` was set
before its first import."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import triton


def device_kernel(fn: Callable[..., Any]) -> Any:
    """Compile ``fn`` for the GPU; launched as ``fn[grid](...)``, callable from other kernels."""
    return triton.jit(fn)
