"""What is asked about a pass, in sizes that recordings are made for.

All of them go on with their last entry, and nothing of that changes a bit. Rows and requests are
nobody's. Where an entry writes, all that is written is computed before any of it is: the same bits
are written to the same place again. A token that has several columns of draft probabilities reads
the same in each of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dspark_backend.kernels.recording import bucket

Arrays = dict[str, NDArray[Any]]

_CUT = 64
_LISTED = 2**22
# Axes along which the entries of lists are counted: how many there are has little to do with how
# large a step is, so sizes are few.
_LONG = {"bias_at": 1, "bias": 0, "penalty_at": 1, "penalty": 1, "q": 1, "q_ids": 0}


def padded(arrays: Mapping[str, NDArray[Any]], rows: int) -> Arrays | None:
    """``arrays``, as :class:`DeviceVerifier` asks, for ``rows`` rows, a mask and draft
    probabilities for each where there are any, and for requests without rows up to a size that
    recordings are made for. Lists of logits to move and of drafted tokens have 64, 256, 1024 and so
    on entries.

    None for what had better be launched: more than 64 rows to cut, whose sorting takes longer than
    its launches and whose memory recordings would hold; or more than 4 MiB of lists, which a
    recording would hold too.
    """
    if len(arrays.get("cut_rows", ())) > _CUT:
        return None
    requests = bucket(len(arrays["rules"]))
    sizes = {"offsets": requests + 1, "drafts": rows, "q": rows}
    sizes |= dict.fromkeys(("mask_of_row", "mask_words", "q_of_row"), rows)
    made = {}
    for name, array in arrays.items():
        more = [0] * array.ndim
        if name in _LONG:
            more[_LONG[name]] = _long(array.shape[_LONG[name]]) - array.shape[_LONG[name]]
        if name.startswith("cut_"):
            more[0] = bucket(len(array)) - len(array)
        elif name in sizes or name not in _LONG:
            more[0] = sizes.get(name, requests) - len(array)
        # Rows that requests lack end where the last one does.
        made[name] = np.pad(array, [(0, count) for count in more], mode="edge")
    listed = sum(made[name].nbytes for name in _LONG if name in made)
    return None if listed > _LISTED else made


def _long(count: int) -> int:
    size = 64
    while size < count:
        size *= 4
    return size
