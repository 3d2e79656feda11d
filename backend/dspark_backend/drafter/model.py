"""The whole drafter as a torch module, under the tensor names of published checkpoints."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dspark_backend.drafter.backbone import DraftLayer, RMSNorm, block_mask
from dspark_backend.drafter.config import DrafterConfig
from dspark_backend.drafter.heads import ConfidenceHead, markov_head
from dspark_backend.target.rope import tables


class DraftModel(nn.Module):
    """What is trained. The target's embedding and LM head are frozen and no part of the state.

    ``embedding`` [V, d] and ``lm_head`` [output_size, d] (the rows of the draft vocabulary) are
    the target's; ``max_positions`` bounds positions.
    """

    embedding: Tensor
    lm_head: Tensor
    rotation: Tensor

    def __init__(
        self, config: DrafterConfig, embedding: Tensor, lm_head: Tensor, max_positions: int
    ) -> None:
        super().__init__()
        self.config = config
        shape = config.shape
        self.fc = nn.Linear(config.feature_size, shape.hidden_size, bias=False)
        self.hidden_norm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self.layers = nn.ModuleList(DraftLayer(shape) for _ in range(shape.num_layers))
        self.norm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self.markov_head = markov_head(config)
        self.confidence_head = ConfidenceHead(config) if config.confidence else None
        cos, sin = tables(shape, max_positions)
        rotation = torch.stack([torch.from_numpy(cos), torch.from_numpy(sin)], dim=1)
        self.register_buffer("rotation", rotation, persistent=False)
        self.register_buffer("embedding", embedding, persistent=False)
        self.register_buffer("lm_head", lm_head, persistent=False)

    def hidden(self, features: Tensor, anchor_tokens: Tensor, anchors: Tensor) -> Tensor:
        """The parallel stage: normed hidden states of every slot, [B, A, g, d].

        ``features`` [B, T, feature_size] of positions 0 .. T - 1 (past a sequence's end they are
        never looked at); ``anchor_tokens``, ``anchors`` int64 [B, A]: token and position.
        """
        size = self.config.block_size
        batch, count = anchors.shape
        context = self.hidden_norm(self.fc(features))
        inputs = torch.full((batch, count, size), self.config.mask_token_id, device=anchors.device)
        inputs[:, :, 0] = anchor_tokens
        x = self.embedding[inputs.flatten(1)].float()
        positions = (anchors[:, :, None] + torch.arange(size, device=anchors.device)).flatten(1)
        rotation = self.rotation[: features.shape[1]].expand(batch, -1, -1, -1)
        block_rotation = self.rotation[positions]
        mask = block_mask(anchors, features.shape[1], size)
        for layer in self.layers:
            x = layer(context, x, rotation, block_rotation, mask)
        normed: Tensor = self.norm(x)
        return normed.reshape(batch, count, size, -1)

    def latents(self, hidden: Tensor, previous_tokens: Tensor) -> tuple[Tensor | None, Tensor]:
        """The sequential stage with known tokens: latents and confidence logits.

        ``hidden`` [..., g, d]; ``previous_tokens`` int64 [..., g] holds x_{k-1} of every slot, the
        anchor first. Returns ``([..., g, r] or None, [..., g])``; the logits are zeros where there
        is no confidence head.
        """
        head = self.markov_head
        previous: Tensor | None = None
        latents: Tensor | None = None
        if head is not None:
            previous = head.markov_w1(previous_tokens)
            state = head.start(hidden[..., 0, :])
            steps = []
            for k in range(hidden.shape[-2]):
                latent, state = head.step(hidden[..., k, :], previous[..., k, :], state)
                steps.append(latent)
            latents = torch.stack(steps, dim=-2)
        return latents, self._confidence(hidden, previous)

    def base_logits(self, hidden: Tensor) -> Tensor:
        """``lm_head(h)`` over the draft vocabulary, [..., output_size] in lm_head's dtype."""
        return nn.functional.linear(hidden.to(self.lm_head.dtype), self.lm_head)

    def bias(self, latents: Tensor) -> Tensor:
        """``W2 . latent``, as :meth:`base_logits`. Raises ValueError without a Markov head."""
        if self.markov_head is None:
            raise ValueError("this drafter has no Markov head")
        dtype = self.lm_head.dtype
        w2 = self.markov_head.markov_w2.weight
        return nn.functional.linear(latents.to(dtype), w2.to(dtype))

    def logits(self, hidden: Tensor, latents: Tensor | None) -> Tensor:
        """``lm_head(h) + W2 . latent``, float32 [..., output_size]."""
        base = self.base_logits(hidden).float()
        return base if latents is None else base.add_(self.bias(latents))

    @torch.no_grad()
    def chain(
        self, hidden: Tensor, anchor_tokens: Tensor, d2t: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The sequential stage, greedily: every slot sees the drafts before it.

        ``hidden`` [N, g, d], ``anchor_tokens`` int64 [N]. Returns drafts as target ids int64
        [N, g] and the logits of their confidences [N, g].
        """
        base = self.logits(hidden, None)
        head = self.markov_head
        state = hidden if head is None else head.start(hidden[:, 0])
        token, drafts, sure = anchor_tokens, [], []
        for k in range(hidden.shape[1]):
            previous: Tensor | None = None
            row = base[:, k]
            if head is not None:
                previous = head.markov_w1(token)
                latent, state = head.step(hidden[:, k], previous, state)
                row = row + self.bias(latent)
            sure.append(self._confidence(hidden[:, k], previous))
            token = row.argmax(dim=-1)
            token = token if d2t is None else d2t[token]
            drafts.append(token)
        return torch.stack(drafts, dim=1), torch.stack(sure, dim=1)

    def _confidence(self, hidden: Tensor, previous: Tensor | None) -> Tensor:
        if self.confidence_head is None:
            return hidden.new_zeros(hidden.shape[:-1])
        seen = previous if self.config.confidence_with_markov else None
        logit: Tensor = self.confidence_head(hidden, seen)
        return logit
