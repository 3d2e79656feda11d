"""The sequential stage and the confidence head (DSPARK.md, sections 1 and 3), as torch modules.

All heads have one interface: a *latent* ``[..., r]`` of slot k, made of its hidden state and the
token before it, so that the bias of its logits is ``W2 . latent``. A head without the drafts before
it (DFlash) has no latent at all.
"""

from __future__ import annotations

from typing import Protocol, cast

import torch
from torch import Tensor, nn

from dspark_backend.drafter.config import DrafterConfig, HeadType


class MarkovHead(nn.Module):
    """``vanilla``: the latent is ``W1[x_{k-1}]``. Base of the other two."""

    def __init__(self, config: DrafterConfig) -> None:
        super().__init__()
        rank = config.markov_rank
        self.markov_w1 = nn.Embedding(config.shape.vocab_size, rank)
        self.markov_w2 = nn.Linear(rank, config.output_size, bias=False)

    def start(self, like: Tensor) -> Tensor:
        """The state before slot 1, for hidden states like ``like`` [..., d]: nothing to carry."""
        return like.new_zeros((*like.shape[:-1], 0))

    def step(self, hidden: Tensor, previous: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """``hidden`` [..., d] of slot k, ``previous`` = W1[x_{k-1}] [..., r] -> latent, state."""
        return previous, state


class GatedMarkovHead(MarkovHead):
    """The latent is gated by the hidden state: ``sigmoid(gate([h ; W1[x]])) * W1[x]``."""

    def __init__(self, config: DrafterConfig) -> None:
        super().__init__(config)
        rank = config.markov_rank
        self.gate_proj = nn.Linear(config.shape.hidden_size + rank, rank)

    def step(self, hidden: Tensor, previous: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        gate = self.gate_proj(torch.cat([hidden, previous], dim=-1))
        return torch.sigmoid(gate) * previous, state


class RecurrentMarkovHead(MarkovHead):
    """``rnn``: a gated state carries all drafts before slot k, not the last one alone."""

    def __init__(self, config: DrafterConfig) -> None:
        super().__init__(config)
        rank = config.markov_rank
        self.joint_proj = nn.Linear(2 * rank + config.shape.hidden_size, 3 * rank)

    def start(self, like: Tensor) -> Tensor:
        return like.new_zeros((*like.shape[:-1], self.markov_w1.embedding_dim))

    def step(self, hidden: Tensor, previous: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        joint = self.joint_proj(torch.cat([state, previous, hidden], dim=-1))
        gate, candidate, output = joint.chunk(3, dim=-1)
        kept = torch.sigmoid(gate)
        return torch.tanh(output), kept * state + (1 - kept) * torch.tanh(candidate)


class ConfidenceHead(nn.Module):
    """Logit of c_k: that x_k survives, given that the drafts before it do; blind to x_k itself."""

    def __init__(self, config: DrafterConfig) -> None:
        super().__init__()
        self.proj = nn.Linear(config.confidence_size, 1)

    def forward(self, hidden: Tensor, previous: Tensor | None) -> Tensor:
        """``hidden`` [..., d], ``previous`` = W1[x_{k-1}] [..., r] or None -> [...]."""
        x = hidden if previous is None else torch.cat([hidden, previous], dim=-1)
        return cast(Tensor, self.proj(x)).squeeze(-1)


class _HeadClass(Protocol):
    def __call__(self, config: DrafterConfig) -> MarkovHead: ...


_HEADS: dict[HeadType, _HeadClass] = {
    HeadType.VANILLA: MarkovHead,
    HeadType.GATED: GatedMarkovHead,
    HeadType.RNN: RecurrentMarkovHead,
}


def markov_head(config: DrafterConfig) -> MarkovHead | None:
    """The head that ``config`` asks for; None for ``none``."""
    make = _HEADS.get(config.head)
    return None if make is None else make(config)
