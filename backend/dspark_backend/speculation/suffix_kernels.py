"""The two loops of the suffix index: who ends like the log, and what they say comes next."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dspark_backend.kernels.jit import exact_kernel

Ids = NDArray[np.int32]


@exact_kernel
def matching_ends(
    log: Ids, text: Ids, previous: Ids, end: int, floor: int, extents: Ids, own: bool, ends: Ids
) -> tuple[int, int, int]:
    """Find the positions of ``text`` [m] whose last tokens are the longest ending of ``log`` [n].

    ``end`` is the last position of ``text`` that holds the log's last token, ``previous`` [m] leads
    from each to the one before it (-1: none); those before ``floor`` are forgotten. Matches do not
    reach across a negative token (a document's border), and a position with nothing behind it is
    none. ``ends`` [c] receives the most recent c of them, most recent first.

    With ``own``, text is the log and ``extents`` [n] is written: extents[d] is the length of the
    match that ends d tokens before the log's end, 0 where the chain does not come by. Without, the
    extents of the log's own search are read.

    This is the Z algorithm (Gusfield 1997, section 1.4) on both texts reversed, over the chain
    alone: what lies inside the last match is known from the log's match with itself, so nothing is
    compared twice.

    Returns length, how many ``ends`` were written, and operations: positions visited plus tokens
    compared, together at most three for each position of ``text``.
    """
    n, m = len(log), len(text)
    best, count, work = 0, 0, 0
    left, right = 0, 0  # the match that reaches furthest back: text reversed [left, right)
    j = end
    while j >= floor:
        at = m - 1 - j  # of the reversed text
        length = 0
        known = False
        if at < right:  # as far as the last match reaches, this place equals one near the log's end
            within = at - left
            if within < n:
                length = extents[within]
            known = length < right - at
            length = min(length, right - at)
        work += 1
        if not known:
            while length < n and length <= j:
                work += 1
                if text[j - length] != log[n - 1 - length]:
                    break
                length += 1
            if at + length > right:
                left, right = at, at + length
        if own:
            extents[at] = length
        if j + 1 < m and text[j + 1] >= 0 and length >= best:
            if length > best:
                best, count = length, 0
            if count < len(ends):
                ends[count] = j
                count += 1
        j = previous[j]
    return best, count, work


@exact_kernel
def continuation(text: Ids, ends: Ids, own: bool, tokens: Ids, votes: Ids, voters: Ids) -> int:
    """What followed ``ends`` [c], most recent first, in ``text`` [m]: one token after another.

    At every place the followers that are left vote with their next token; the most frequent wins,
    the most recent among equals, and those that said otherwise leave. ``tokens`` [limit] gets the
    winners, ``votes`` and ``voters`` [limit] how many said so and out of how many. With ``own`` the
    text goes on with ``tokens``, which is what a period needs; without it a follower leaves at the
    end of its document. ``ends`` is used up.

    Returns how many tokens were written.
    """
    m, alive = len(text), len(ends)
    said = np.empty(len(ends), np.int32)
    for k in range(len(tokens)):
        asked = 0
        for v in range(alive):
            at = ends[v] + 1 + k
            token = np.int32(-1)
            if at < m:
                token = text[at]
            elif own:
                token = tokens[at - m]
            if token >= 0:
                ends[asked] = ends[v]
                said[asked] = token
                asked += 1
        if asked == 0:
            return k
        most = 0
        for v in range(asked):
            agreeing = 0
            for w in range(v, asked):
                if said[w] == said[v]:
                    agreeing += 1
            if agreeing > most:
                most = agreeing
                tokens[k] = said[v]
        votes[k], voters[k] = most, asked
        alive = 0
        for v in range(asked):
            if said[v] == tokens[k]:
                ends[alive] = ends[v]
                alive += 1
    return len(tokens)
