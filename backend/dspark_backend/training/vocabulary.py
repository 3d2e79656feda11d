"""Which tokens a drafter with a reduced vocabulary can say (DSPARK.md, section 4)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import torch
from torch import Tensor

from dspark_backend.training.errors import TrainingError
from dspark_backend.training.rollout import Rollout


def draft_vocabulary(
    rollouts: Iterable[Rollout], vocab_size: int, size: int, always: Iterable[int] = ()
) -> Tensor:
    """``d2t``, int64 [size], ascending: draft id to target id.

    ``always`` (the end-of-turn tokens) come first, then answer tokens by frequency, then prompt
    tokens by frequency; what room is left goes to the lowest ids, which a byte-pair tokenizer
    learned first and which are the most frequent in general.

    Raises TrainingError for a size outside 1..vocab_size.
    """
    if not 1 <= size <= vocab_size:
        raise TrainingError(f"a draft vocabulary has 1..{vocab_size} tokens, not {size}")
    answers: Counter[int] = Counter()
    prompts: Counter[int] = Counter()
    for rollout in rollouts:
        answers.update(rollout.answer)
        prompts.update(rollout.prompt)
    chosen: dict[int, None] = {}
    ranked = (always, _by_frequency(answers), _by_frequency(prompts), range(vocab_size))
    for candidates in ranked:
        for token in candidates:
            if len(chosen) == size:
                break
            if token < vocab_size:
                chosen.setdefault(token)
    return torch.tensor(sorted(chosen), dtype=torch.int64)


def draft_ids(d2t: Tensor | None, vocab_size: int) -> Tensor:
    """The inverse, int64 [vocab_size]: target id to draft id, -1 for what cannot be said."""
    if d2t is None:
        return torch.arange(vocab_size)
    inverse = torch.full((vocab_size,), -1, dtype=torch.int64)
    inverse[d2t] = torch.arange(len(d2t))
    return inverse


def _by_frequency(counts: Counter[int]) -> list[int]:
    return sorted(counts, key=lambda token: (-counts[token], token))
