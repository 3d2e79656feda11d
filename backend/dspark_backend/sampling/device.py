"""Blocks judged where their logits lie: one batch of questions, one copy back.

What :meth:`Sampler.verify` decides step by step, ``kernels/verify`` decides for all steps of a
pass; the host learns how many drafts stand and which token follows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dspark_backend.errors import BackendError, GrammarError
from dspark_backend.kernels.contract import Masks
from dspark_backend.kernels.recording import Piece, Recordings, bucket
from dspark_backend.kernels.upload import upload
from dspark_backend.kernels.verify.contract import Batch, DraftProbabilities, Rule
from dspark_backend.kernels.verify.triton import verify
from dspark_backend.sampling.device_padding import padded
from dspark_backend.sampling.device_rewriting import rewriting, rewritten
from dspark_backend.sampling.device_truncation import truncated, truncation
from dspark_backend.sampling.mask import unpack
from dspark_backend.sampling.sampler import Sampler
from dspark_backend.sampling.verifier import Answer, Question
from dspark_backend.sampling.verify import Acceptance
from dspark_backend.speculation.distribution import Distribution

Arrays = dict[str, NDArray[Any]]


class DeviceVerifier:
    """Judges on the device of the logits, as :meth:`Sampler.verify` does: the same tokens where
    verification is greedy or coupled, up to how logarithms are rounded and where a nucleus ends;
    the same distribution by rejection. With ``recordings``, verdicts are replayed, but for those
    that :func:`padded` says to launch."""

    def __init__(self, recordings: Recordings | None = None) -> None:
        self._recordings = recordings

    def ask(self, logits: Tensor, questions: Sequence[Question]) -> list[Answer]:
        """As :meth:`Verifier.ask`; waits for the device, once."""
        if not questions:
            return []
        arrays = {
            **_blocks(questions),
            **_masks(questions),
            **_drawn(questions),
            **rewriting(questions),
            **truncation(questions),
        }
        longest = max(question.rows for question in questions)
        if self._recordings is None:
            both = _judged(logits, upload(arrays, logits.device), longest)
        else:
            both = self._replayed(self._recordings, logits, arrays, longest)
        vocab = logits.shape[1]
        verdicts = both.cpu().tolist()  # the one copy back
        return [
            partial(answered, accepted, token, vocab, question.masks)
            for question, accepted, token in zip(questions, *verdicts, strict=False)
        ]

    def _replayed(
        self, recordings: Recordings, logits: Tensor, arrays: Arrays, longest: int
    ) -> Tensor:
        """As :func:`_judged`, for at least as many requests."""
        rows = bucket(len(logits))
        sized = padded(arrays, rows)
        if sized is None:
            run = partial(_judgement, longest=longest)
            (both,) = recordings.launch(run, arrays, {"logits": Piece(logits, len(logits))})
            return both
        longest = 1 << (longest - 1).bit_length()
        run = partial(_judgement, longest=longest)
        pieces = {"logits": Piece(logits, rows)}
        kind = "cut verdict" if "cut_rows" in sized else "verdict"
        (both,) = recordings.run((kind, longest), run, sized, pieces)
        return both


def _judgement(there: Mapping[str, Tensor], longest: int) -> tuple[Tensor]:
    rest = {name: tensor for name, tensor in there.items() if name != "logits"}
    return (_judged(there["logits"], rest, longest),)


def _judged(logits: Tensor, there: dict[str, Tensor], longest: int) -> Tensor:
    """Accepted lengths and next tokens, int32 [2, B], on the device."""
    masks = Masks(there["mask_words"], there["mask_of_row"]) if "mask_words" in there else None
    if any(name in there for name in ("bias", "penalty", "cut_rows")):
        logits = truncated(rewritten(logits, there), masks, there)
    batch = Batch(
        logits=logits,
        offsets=there["offsets"],
        drafts=there["drafts"],
        rules=there["rules"],
        temperatures=there["temperatures"],
        seeds=there["seeds"],
        positions=there["positions"],
        longest=longest,
        masks=masks,
        q=_probabilities(there, logits.shape[1]),
    )
    verdict = verify(batch)
    return torch.stack([verdict.accepted, verdict.tokens])


def answered(
    accepted: int, token: int, vocab: int, masks: Sequence[Tensor | None] | None = None
) -> Acceptance:
    """A verdict as the device gives it, ``masks`` being those of the block's rows.

    Raises GrammarError or BackendError, as an :data:`Answer` does, where ``token`` is -1.
    """
    if token >= 0:
        return Acceptance(accepted, token)
    mask = masks[accepted] if masks is not None and accepted < len(masks) else None
    if mask is not None and not unpack(mask, vocab).any():
        raise GrammarError(
            "the grammar's mask allows no token: its matcher has ended or is in error, "
            "and must not be asked for another token"
        )
    raise BackendError(
        f"no token can follow draft {accepted} of the block: of all that the grammar and the "
        "logit biases allow none has a finite logit (the biases rule all of it out), or there is a "
        "NaN or +inf among them (the forward pass went wrong: damaged weights, or an overflow)"
    )


def _blocks(questions: Sequence[Question]) -> Arrays:
    samplers = [question.sampler for question in questions]
    sampled = [sampler.params.temperature > 0.0 for sampler in samplers]
    return {
        "offsets": np.cumsum([0, *(question.rows for question in questions)]).astype(np.int32),
        # A block's last row judges no draft: what stands there is not looked at.
        "drafts": np.array([t for q in questions for t in (*q.drafts, -1)], np.int32),
        "rules": np.array([_rule(sampler) for sampler in samplers], np.int32),
        "temperatures": np.array(
            [s.params.temperature if on else 1.0 for s, on in zip(samplers, sampled, strict=True)],
            np.float32,
        ),
        "seeds": np.array([wrapped(sampler.params.seed) for sampler in samplers], np.int64),
        "positions": np.array([sampler.position for sampler in samplers], np.int64),
    }


def _rule(sampler: Sampler) -> Rule:
    if sampler.params.temperature == 0.0:
        return Rule.GREEDY
    return Rule.REJECTION if sampler.rejects else Rule.COUPLED


def wrapped(seed: int) -> int:
    """The 64 bits of a seed that noise looks at, as an int64."""
    return (seed + 2**63) % 2**64 - 2**63


def _masks(questions: Sequence[Question]) -> Arrays:
    return mask_arrays((question.masks, question.rows) for question in questions)


def mask_arrays(blocks: Iterable[tuple[Sequence[Tensor | None] | None, int]]) -> Arrays:
    """The masks of blocks that follow one another, each with its number of rows: ``mask_words``
    int32 [M, W] and ``mask_of_row`` int32 [R], as :class:`Masks`; nothing where there is none."""
    words: list[NDArray[np.int32]] = []
    of_row: list[int] = []
    for given, rows in blocks:
        masks = [*(given or ())][:rows]
        for mask in (*masks, *[None] * (rows - len(masks))):
            of_row.append(-1 if mask is None else len(words))
            if mask is not None:
                words.append(mask.numpy())
    if not words:
        return {}
    return {"mask_words": np.stack(words), "mask_of_row": np.array(of_row, np.int32)}


def _drawn(questions: Sequence[Question]) -> Arrays:
    """q' of all drafts that were sampled, over the tokens that any of them gives a probability."""
    drawn: list[Distribution] = []
    of_row: list[int] = []
    for question in questions:
        known = question.distributions or (None,) * len(question.drafts)
        for distribution in (*known, None):
            of_row.append(-1 if distribution is None else len(drawn))
            if distribution is not None:
                drawn.append(distribution)
    if not drawn:
        return {}
    ids = np.unique(np.concatenate([distribution.ids for distribution in drawn]))
    q = np.zeros((len(drawn), len(ids)))
    for row, distribution in zip(q, drawn, strict=True):
        row[np.searchsorted(ids, distribution.ids)] = distribution.probabilities
    return {"q": q, "q_of_row": np.array(of_row, np.int32), "q_ids": ids.astype(np.int64)}


def _probabilities(there: dict[str, Tensor], vocab: int) -> DraftProbabilities | None:
    if "q" not in there:
        return None
    ids = there["q_ids"]
    columns = torch.full((vocab,), -1, dtype=torch.int32, device=ids.device)
    columns[ids] = torch.arange(len(ids), dtype=torch.int32, device=ids.device)
    return DraftProbabilities(there["q"], there["q_of_row"], columns)
