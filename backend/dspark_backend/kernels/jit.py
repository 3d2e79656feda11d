"""How the CPU kernels are compiled: Numba, which brings its own LLVM, so no compiler is needed.

``kernel`` and ``parallel_kernel`` are the only two ways a kernel is compiled. Results are cached on
disk, so the first load on a machine pays the compilation (a dozen seconds), later ones do not.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ParamSpec, TypeVar, cast

import numba
import torch

P = ParamSpec("P")
T = TypeVar("T")

# No "nnan"/"ninf": -inf and NaN must behave. "reassoc" lets reductions vectorise; the order that
# the compiler picks is fixed in the machine code, hence the same for every row.
_FLOAT_FLAGS = {"reassoc", "contract", "arcp", "nsz"}

_lock = threading.Lock()


def kernel(fn: Callable[P, T]) -> Callable[P, T]:
    """Compile a serial kernel; callable from other kernels."""
    compile_ = numba.njit(
        fastmath=_FLOAT_FLAGS, nogil=True, cache=True, error_model="numpy", boundscheck=False
    )
    return cast("Callable[P, T]", compile_(fn))


def exact_kernel(fn: Callable[P, T]) -> Callable[P, T]:
    """Compile a serial kernel whose floating-point operations happen exactly as written."""
    compile_ = numba.njit(nogil=True, cache=True, error_model="numpy", boundscheck=False)
    return cast("Callable[P, T]", compile_(fn))


def parallel_kernel(fn: Callable[P, T]) -> Callable[P, T]:
    """Compile a kernel whose ``prange`` loops run on Numba's threads."""
    compile_ = numba.njit(
        fastmath=_FLOAT_FLAGS,
        nogil=True,
        cache=True,
        parallel=True,
        error_model="numpy",
        boundscheck=False,
    )
    return cast("Callable[P, T]", compile_(fn))


prange: Any = numba.prange


def default_threads() -> int:
    """How many threads Numba launched: the cores that this process may use."""
    return int(vars(numba.config)["NUMBA_NUM_THREADS"])


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Run the kernels of this block on ``count`` threads, one engine of the process at a time.

    The lock is there because Numba's fallback threading layer may not be entered twice, and
    because two engines taking turns beat two engines fighting over the same cores. Numba's OpenMP
    layer sets the thread count that torch reads as well, so that one is restored too.
    """
    with _lock:
        before, torch_before = numba.get_num_threads(), torch.get_num_threads()
        numba.set_num_threads(max(1, min(count, default_threads())))
        try:
            yield
        finally:
            numba.set_num_threads(before)
            if torch.get_num_threads() != torch_before:
                torch.set_num_threads(torch_before)
