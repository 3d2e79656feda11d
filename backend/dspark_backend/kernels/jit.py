"""How the CPU kernels are compiled: Numba, which brings its own LLVM, so no compiler is needed.

``kernel``, ``exact_kernel`` and ``parallel_kernel`` are the only ways a kernel is compiled. Results
are cached on disk, so the first load on a machine pays the compilation (a dozen seconds), later
ones do not.
"""

from __future__ import annotations

import hashlib
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, ParamSpec, TypeVar, cast

import numba
import torch

P = ParamSpec("P")
T = TypeVar("T")

# No "nnan"/"ninf": -inf and NaN must behave. "reassoc" lets reductions vectorise; the order that
# the compiler picks is fixed in the machine code, hence the same for every row.
_FLOAT_FLAGS = {"reassoc", "contract", "arcp", "nsz"}

_lock = threading.Lock()
_config: Any = numba.config  # whose settings are made as it is loaded


def cache_folder(sources: Path, base: Path) -> Path:
    """Where kernels compiled from ``sources`` are kept under ``base``: a folder of their own for
    every state of any of the files.

    Numba looks at the file of a function alone, so a kernel would be taken from the cache with the
    old code of one that it calls out of another file. Folders of other states go a day after they
    were made, when no process that runs now was started with them.
    """
    digest = hashlib.sha256()
    for path in sorted(sources.rglob("*.py")):
        digest.update(path.relative_to(sources).as_posix().encode() + b"\0")
        digest.update(path.read_bytes() + b"\0")
    own = base / f"kernels-{digest.hexdigest()[:16]}"
    for other in base.glob("kernels-*"):
        try:
            if other != own and time.time() - other.stat().st_mtime > _DAY:
                shutil.rmtree(other, ignore_errors=True)
        except OSError:
            continue  # another process was quicker
    return own


_DAY: Final = 86_400.0
_HERE: Final = Path(__file__).parent
_CACHE: Final = cache_folder(_HERE, Path(_config.CACHE_DIR or _HERE / "__pycache__"))


@contextmanager
def _own_cache() -> Iterator[None]:
    """Numba reads the folder when a function is decorated: others' functions keep theirs. Where it
    cannot be written, Numba goes on to its usual places."""
    before = _config.CACHE_DIR
    _config.CACHE_DIR = str(_CACHE)
    try:
        yield
    finally:
        _config.CACHE_DIR = before


def _compiled(fn: Callable[P, T], **options: Any) -> Callable[P, T]:
    compile_ = numba.njit(nogil=True, cache=True, error_model="numpy", boundscheck=False, **options)
    with _own_cache():
        return cast("Callable[P, T]", compile_(fn))


def kernel(fn: Callable[P, T]) -> Callable[P, T]:
    """Compile a serial kernel; callable from other kernels."""
    return _compiled(fn, fastmath=_FLOAT_FLAGS)


def exact_kernel(fn: Callable[P, T]) -> Callable[P, T]:
    """Compile a serial kernel whose floating-point operations happen exactly as written."""
    return _compiled(fn)


def parallel_kernel(fn: Callable[P, T]) -> Callable[P, T]:
    """Compile a kernel whose ``prange`` loops run on Numba's threads."""
    return _compiled(fn, fastmath=_FLOAT_FLAGS, parallel=True)


prange: Any = numba.prange


def default_threads() -> int:
    """How many threads Numba launched: the cores that this process may use."""
    return int(_config.NUMBA_NUM_THREADS)


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
