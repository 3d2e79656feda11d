"""Which tokens a drafter with a reduced vocabulary can say (DSPARK.md, section 4)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

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


def with_vocabulary(
    state: Mapping[str, Tensor], old: Tensor | None, new: Tensor | None
) -> dict[str, Tensor]:
    """A drafter's trained tensors as they are with the draft vocabulary ``new``, a superset of the
    ``old`` one they are of (``d2t`` both, or None both): the head's bias of a token that is new is
    0, so it begins with what the target's LM head says of it."""
    name = "markov_head.markov_w2.weight"
    if old is None or new is None or name not in state:
        return dict(state)
    rows = state[name]
    wide = rows.new_zeros(len(new), rows.shape[1])
    wide[torch.searchsorted(new, old)] = rows
    return {**state, name: wide}


def draft_ids(d2t: Tensor | None, vocab_size: int) -> Tensor:
    """The inverse, int64 [vocab_size]: target id to draft id, -1 for what cannot be said."""
    if d2t is None:
        return torch.arange(vocab_size)
    inverse = torch.full((vocab_size,), -1, dtype=torch.int64)
    inverse[d2t] = torch.arange(len(d2t))
    return inverse


def _by_frequency(counts: Counter[int]) -> list[int]:
    return sorted(counts, key=lambda token: (-counts[token], token))
