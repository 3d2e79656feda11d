"""Features by transformers, for training on a GPU; the same example as the engine's own decoder."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor

from dspark_backend.catalog.files import ModelFiles
from dspark_backend.training.features import Example, outside_mass
from dspark_backend.training.rollout import Rollout


class TransformersFeatures:
    """The target in bfloat16 on ``device``. ``taps`` and ``d2t`` as :class:`DecoderFeatures`."""

    def __init__(
        self, files: ModelFiles, taps: tuple[int, ...], d2t: Tensor | None, device: torch.device
    ) -> None:
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            files.folder, dtype=torch.bfloat16, local_files_only=True
        )
        self._model = model.to(device).eval()
        self._taps = taps
        self._d2t = None if d2t is None else d2t.to(device)
        self._device = device

    @torch.no_grad()
    def example(self, rollout: Rollout) -> Example:
        """One pass over the whole rollout; tensors stay on the CPU, where batches are put together.

        Hidden states are numbered from the embedding output, and the last one is normed.
        """
        tokens, first = torch.tensor(rollout.tokens), len(rollout.prompt)
        out = self._model(
            tokens[None].to(self._device), output_hidden_states=True, logits_to_keep=len(tokens)
        )
        rows = slice(first - 1, -1)
        logits = out.logits[0, rows].float()
        features = torch.cat([out.hidden_states[tap + 1][0] for tap in self._taps], dim=-1)
        return Example(
            rollout=rollout,
            tokens=tokens,
            first=first,
            features=features.bfloat16().cpu(),
            hidden=out.hidden_states[-1][0, rows].bfloat16().cpu(),
            outside=outside_mass(logits, self._d2t).cpu(),
            greedy=logits.argmax(dim=-1).cpu(),
        )
