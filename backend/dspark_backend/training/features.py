"""What the target makes of a rollout: context features, and its distribution at every answer token.

Computed on the fly by the target that will be served, in its precision; nothing goes to disk. What
was computed may stay in memory (:class:`FeatureMemory`), since a rollout is seen several times.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from dspark_backend.catalog.files import ModelFiles
from dspark_backend.kernels import jit
from dspark_backend.kernels.mass import mass_outside
from dspark_backend.kernels.norm.cpu import rms_norm
from dspark_backend.target.batch import Batch, Rows
from dspark_backend.target.load import load_decoder
from dspark_backend.target.precision import Precision
from dspark_backend.training.rollout import Rollout

CHUNK_ROWS = 256


@dataclass(frozen=True, slots=True)
class Example:
    """A rollout of T tokens with A answer tokens, as the target sees it.

    ``tokens`` int64 [T], of which the answer begins at ``first``; ``features`` bfloat16
    [T, feature_size]; ``hidden`` bfloat16 [A, d], the target's normed last hidden states, row i
    predicting token ``first + i``; ``outside`` float32 [A], the probability that row i gives to
    tokens which the drafter cannot say; ``greedy`` int64 [A], row i's most likely token.
    """

    rollout: Rollout
    tokens: Tensor
    first: int
    features: Tensor
    hidden: Tensor
    outside: Tensor
    greedy: Tensor

    @property
    def bytes(self) -> int:
        tensors = (self.tokens, self.features, self.hidden, self.outside, self.greedy)
        return sum(tensor.nbytes for tensor in tensors)


class FeatureSource(Protocol):
    """Where examples come from: the engine's own decoder, or transformers on a GPU."""

    def example(self, rollout: Rollout) -> Example: ...


class DecoderFeatures:
    """Features by the decoder that serves the model on a CPU.

    ``taps`` are the drafter's ``target_layer_ids``; ``d2t`` its vocabulary, None for all of it.
    """

    def __init__(
        self,
        files: ModelFiles,
        precision: Precision,
        taps: tuple[int, ...],
        d2t: Tensor | None,
        max_tokens: int,
        threads: int = 1,
    ) -> None:
        self._config = files.config
        self._decoder = load_decoder(files, precision, max_tokens)
        # The stream after the last layer is tapped too: normed, it is what the head reads.
        self._taps = (*taps, files.config.num_layers - 1)
        self._norm = files.tensors().get("model.norm.weight").float().numpy()
        self._d2t = d2t
        self._threads = threads
        room = 2 * max_tokens * self._decoder.kv_shape.bytes_per_token
        self._storage = self._decoder.storage(None, room)

    def example(self, rollout: Rollout) -> Example:
        """Run the target over the rollout in chunks of 256 rows, as the engine prefills."""
        tokens, first = rollout.tokens, len(rollout.prompt)
        kv = self._storage.new()
        features, outside, greedy = [], [], []
        threads = torch.get_num_threads()
        try:
            kv.reserve(len(tokens))
            for start in range(0, len(tokens), CHUNK_ROWS):
                piece = tokens[start : start + CHUNK_ROWS]
                end = start + len(piece)
                # Rows first - 1 .. T - 2 predict the answer; the last token's row predicts nothing
                # that is known, but a chunk's wanted rows are its last ones.
                wanted = min(len(piece), max(0, end - (first - 1)))
                with jit.threads(self._threads):
                    result = self._decoder.forward(Batch([Rows(kv, piece, wanted)]), self._taps)
                kv.length = end
                features.append(result.features)
                outside.append(outside_mass(result.logits, self._d2t))
                greedy.append(torch.from_numpy(result.logits.numpy().argmax(axis=-1)))
        finally:
            kv.close()
            # Numba's OpenMP layer sets the number of threads that torch goes by as well.
            torch.set_num_threads(threads)
        stream = torch.cat(features)
        width = self._config.hidden_size
        last = np.ascontiguousarray(stream[first - 1 : -1, -width:].numpy())
        hidden = np.empty_like(last)
        rms_norm(last, self._norm, self._config.rms_norm_eps, hidden)
        return Example(
            rollout=rollout,
            tokens=torch.tensor(tokens),
            first=first,
            features=stream[:, :-width].bfloat16(),
            hidden=torch.from_numpy(hidden).bfloat16(),
            outside=torch.cat(outside)[:-1],
            greedy=torch.cat(greedy)[:-1],
        )


class FeatureMemory:
    """Examples of ``source``, the latest ``limit_bytes`` of them kept in memory."""

    def __init__(self, source: FeatureSource, limit_bytes: int) -> None:
        self._source = source
        self._limit = limit_bytes
        self._held = 0
        self._kept: OrderedDict[str, Example] = OrderedDict()

    def example(self, rollout: Rollout) -> Example:
        kept = self._kept.get(rollout.key)
        if kept is not None:
            self._kept.move_to_end(rollout.key)
            return kept
        example = self._source.example(rollout)
        self._kept[rollout.key] = example
        self._held += example.bytes
        while self._held > self._limit:
            self._held -= self._kept.popitem(last=False)[1].bytes
        return example


def outside_mass(logits: Tensor, d2t: Tensor | None) -> Tensor:
    """``logits`` [R, V] -> float32 [R]: the probability of what is not in the draft vocabulary."""
    if d2t is None or not len(logits):
        return torch.zeros(len(logits))
    if logits.device.type == "cpu" and logits.dtype is torch.float32:
        inside = torch.zeros(logits.shape[1], dtype=torch.bool)
        inside[d2t] = True
        out = torch.empty(len(logits))
        mass_outside(logits.contiguous().numpy(), inside.numpy(), out.numpy())
        return out
    said = torch.logsumexp(logits[:, d2t], dim=-1) - torch.logsumexp(logits, dim=-1)
    return -torch.expm1(said.clamp_max(0.0))
