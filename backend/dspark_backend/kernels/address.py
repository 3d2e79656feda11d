"""Arrays by their address: how one kernel reads the caches of many sequences."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import numpy as np
from numba import carray  # type: ignore[attr-defined]
from numba.core import types
from numba.extending import intrinsic
from numpy.typing import NDArray

from dspark_backend.kernels.jit import kernel

_FLOATS: Any = types.CPointer(types.float32)  # type: ignore[no-untyped-call]


@intrinsic
def _pointer_at(typingctx: Any, address: Any) -> Any:

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        return b.inttoptr(args[0], context.get_value_type(_FLOATS))

    return _FLOATS(types.int64), codegen


_pointer = cast("Callable[[int], Any]", _pointer_at)


@kernel
def floats_at(address: int, shape: tuple[int, int, int]) -> NDArray[np.float32]:
    """The contiguous float32 array of ``shape`` at ``address``; whoever owns it must outlive it."""
    array: NDArray[np.float32] = carray(_pointer(address), shape)
    return array
