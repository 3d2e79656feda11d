"""The sequential stage on the device (DSPARK.md, section 1): slots left to right, each seeing the
token before it.

Blocks that nobody guides are chained on the device and copied back together: by
``kernels/markov`` where the head is vanilla and the whole block is drafted, else slot by slot in
torch. A guide decides on the host, about slots that were guessed (``device_guided.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dspark_backend.drafter.calibration import Calibration
from dspark_backend.drafter.chain import SOURCE
from dspark_backend.drafter.config import DrafterConfig, HeadType
from dspark_backend.drafter.device_guided import GuidedBlocks
from dspark_backend.drafter.device_slots import DeviceSlots
from dspark_backend.drafter.device_weights import DeviceDraftWeights
from dspark_backend.kernels.download import download
from dspark_backend.kernels.markov.contract import Blocks, Head
from dspark_backend.kernels.markov.triton import draft
from dspark_backend.kernels.recording import Recordings
from dspark_backend.speculation.protocol import Anchor, Proposal
from dspark_backend.speculation.vocabulary import DraftVocabulary


@dataclass(frozen=True, slots=True)
class Groups:
    """Places of anchors: ``free`` blocks are drafted whole by ``kernels/markov``, ``known`` ones
    slot by slot, those that are ``guided`` with the host."""

    free: list[int]
    known: list[int]
    guided: list[int]


class DeviceSequentialStage:
    """Hidden states in, proposals out, with calibrated confidences."""

    def __init__(
        self, weights: DeviceDraftWeights, config: DrafterConfig, calibration: Calibration
    ) -> None:
        self._weights = weights
        self._config = config
        self._slots = DeviceSlots(weights, config, calibration)
        self._vocabulary = DraftVocabulary(weights.ids.cpu().numpy())
        self._head: Head | None = None
        if weights.sequential is not None and config.head is HeadType.VANILLA:
            whole = config.draft_vocab_size is None
            ids = None if whole else weights.ids.int()
            self._head = Head(weights.sequential.w1, weights.sequential.w2.weight, ids)

    def groups(self, anchors: Sequence[Anchor]) -> Groups:
        """Which of ``anchors`` are drafted how."""
        alone = [i for i, anchor in enumerate(anchors) if anchor.guide is None]
        known = [i for i in alone if anchors[i].known or self._head is None]
        return Groups(
            free=[i for i in alone if i not in known],
            known=known,
            guided=[i for i, anchor in enumerate(anchors) if anchor.guide is not None],
        )

    def arrays(
        self, anchors: Sequence[Anchor], groups: Groups, size: Callable[[int], int]
    ) -> dict[str, NDArray[Any]]:
        """What :meth:`chained` reads of ``anchors``, each group filled up to ``size`` of it with
        what nobody looks at."""
        arrays: dict[str, NDArray[Any]] = {}
        if groups.free:
            count = size(len(groups.free))
            arrays["free"] = np.zeros(count, np.int64)
            arrays["free_first"] = np.zeros(count, np.int32)
            for place, i in enumerate(groups.free):
                arrays["free"][place], arrays["free_first"][place] = i, anchors[i].token
        if groups.known:
            count = size(len(groups.known))
            arrays["known"] = np.zeros(count, np.int64)
            arrays["known_first"] = np.zeros(count, np.int64)
            arrays["known_given"] = np.full((count, self._config.block_size), -1)
            for place, i in enumerate(groups.known):
                arrays["known"][place], arrays["known_first"][place] = i, anchors[i].token
                arrays["known_given"][place, : len(anchors[i].known)] = anchors[i].known
        if groups.guided:
            arrays["guided"] = np.zeros(size(len(groups.guided)), np.int64)
            arrays["guided"][: len(groups.guided)] = groups.guided
        return arrays

    def chained(self, hidden: Tensor, there: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """Launch what needs nobody on the host, ``hidden`` [S, g, d] of the weights' dtype being
        the block of each anchor and ``there`` what :meth:`arrays` gave. Tokens and survivals
        float64 [n, 2 g] of each group there is; of guided blocks, theirs of ``hidden`` and of the
        base logits [S, g, D]."""
        base = self._weights.head(hidden.flatten(0, 1)).view(*hidden.shape[:2], -1)
        made = []
        if "free" in there:
            made.append(self._drafted(hidden, base, there))
        if "known" in there:
            made.append(self._chained(hidden, base, there))
        if "guided" in there:
            made += [hidden[there["guided"]], base[there["guided"]]]
        return tuple(made)

    def unguided(self, hidden: Tensor, first: Tensor) -> Tensor:
        """As :meth:`chained`, of blocks after the tokens ``first`` int32 [S] of the device: tokens
        and survivals float64 [S, 2 g]."""
        all_of_them = torch.arange(len(first), device=first.device)
        if self._head is not None:
            there = {"free": all_of_them, "free_first": first}
        else:
            given = torch.full(hidden.shape[:2], -1, device=first.device)
            there = {"known": all_of_them, "known_first": first.long(), "known_given": given}
        (made,) = self.chained(hidden, there)
        return made

    def proposal(self, block: NDArray[np.float64]) -> Proposal:
        """A row of what :meth:`unguided` gives."""
        size = self._config.block_size
        return _proposal(block[:size], block[size:], 0)

    def proposals(
        self,
        anchors: Sequence[Anchor],
        groups: Groups,
        made: Sequence[Tensor],
        recordings: Recordings | None = None,
    ) -> list[Proposal]:
        """The blocks of ``anchors``, of what :meth:`chained` gave; with ``recordings``, guesses are
        replayed."""
        chained = made[:-2] if groups.guided else made
        decided: GuidedBlocks | None = None
        if groups.guided:
            own = [anchors[i] for i in groups.guided]
            decided = GuidedBlocks(
                self._slots, self._vocabulary, made[-2], made[-1], own, recordings
            )
        guesses = () if decided is None else decided.guess()
        # The one wait, unless a guide does not take what was guessed for it.
        answers = download([*chained, *guesses])
        size = self._config.block_size
        proposals = {}
        members = [group for group in (groups.free, groups.known) if group]
        for group, rows in zip(members, answers, strict=False):
            for i, row in zip(group, rows, strict=False):
                proposals[i] = _proposal(row[:size], row[size:], len(anchors[i].known))
        if decided is not None:
            while guesses:
                decided.decide(*answers[-len(guesses) :])
                guesses = decided.guess()
                answers = download(guesses)
            proposals.update(zip(groups.guided, decided.proposals(), strict=True))
        return [proposals[i] for i in range(len(anchors))]

    def _drafted(self, hidden: Tensor, base: Tensor, there: Mapping[str, Tensor]) -> Tensor:
        """Whole blocks, by the kernel."""
        assert self._head is not None
        first = there["free_first"]
        own = base[there["free"]].contiguous()
        tokens = draft(Blocks(own, first, self._head))
        # A slot without a token (-1) ends the block: what the next ones read does not matter.
        before = torch.cat([first[:, None], tokens[:, :-1]], dim=1).clamp(min=0)
        previous = self._head.w1[before.long()]
        sure = self._slots.confidence(hidden[there["free"]], previous, slice(None))
        return torch.cat([tokens.double(), sure.cumprod(dim=1)], dim=1)

    def _chained(self, hidden: Tensor, base: Tensor, there: Mapping[str, Tensor]) -> Tensor:
        """Slot by slot: for any head, and for blocks that begin with known tokens."""
        given, token = there["known_given"], there["known_first"]
        hidden, base = hidden[there["known"]], base[there["known"]]
        state: Tensor | None = None
        tokens, sure = [], []
        for k in range(hidden.shape[1]):
            row, previous, state = self._slots.after(hidden[:, k], base[:, k], token, state)
            confidence = self._slots.confidence(hidden[:, k], previous, k)
            is_given = given[:, k] >= 0
            token = torch.where(is_given, given[:, k], self._weights.ids[row.argmax(1)])
            tokens.append(token)
            sure.append(torch.where(is_given, 1.0, confidence))
        survival = torch.stack(sure, dim=1).cumprod(dim=1)
        return torch.cat([torch.stack(tokens, dim=1).double(), survival], dim=1)


def _proposal(tokens: NDArray[np.float64], survival: NDArray[np.float64], first: int) -> Proposal:
    """Of a block of which the first ``first`` slots were known; -1 ends it."""
    ended = np.flatnonzero(tokens < 0)
    last = int(ended[0]) if len(ended) else len(tokens)
    drafts = tokens[first:last].astype(np.int64).tolist()
    return Proposal(tuple(drafts), tuple(survival[first:last].tolist()), SOURCE)
