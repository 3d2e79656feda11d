"""What was read, as a JSON string would hold it: what an agent copies into a call or a result.

A file that a tool showed has line ends and quotation marks; written into an argument each becomes a
backslash and a letter, and the tokens around it are others. So no line of the one is followed by
what follows it in the other, and a search of the log alone would end at every line.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import groupby

from dspark_backend.tokenizer import Tokenizer


def quoted(tokens: Sequence[int], tokenizer: Tokenizer) -> list[list[int]]:
    """The texts of ``tokens`` (special tokens part them) as the inside of JSON strings, in tokens.

    Texts that JSON writes as they are, which the log itself holds, are left out.
    """
    special = tokenizer.special_ids
    found = []
    for between, part in groupby(tokens, key=lambda token: token not in special):
        if between:
            lines = tokenizer.decode(list(part)).splitlines(keepends=True)
            inside = [json.dumps(line, ensure_ascii=False)[1:-1] for line in lines]
            if inside != lines:
                # Line by line: a model ends a word at a line's end, where an encoder that sees the
                # whole would take the n of an escaped one for the next word's first letter. What
                # spells a special token becomes one: as a proposal it does no harm, and telling
                # them apart takes tables that take a second to build.
                found.append([token for line in inside for token in tokenizer.encode(line)])
    return found
