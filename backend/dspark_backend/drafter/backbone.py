"""The parallel stage (DSPARK.md, section 2) as a torch module: what is trained, on CPU or CUDA.

Batched over sequences *and* over anchors: blocks of many anchors attend in one call, each to the
context before its anchor and to itself.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from dspark_backend.checkpoint.config import TargetConfig


class RMSNorm(nn.Module):
    """Zhang and Sennrich 2019, computed in float32 whatever the input is."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        inverse = torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + self.eps)
        return (wide * inverse * self.weight.float()).to(x.dtype)


class Attention(nn.Module):
    """Queries from the block; keys and values of ``[context ; block]``, without a causal mask."""

    def __init__(self, shape: TargetConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.width = shape.num_heads, shape.num_kv_heads, shape.head_dim
        bias = shape.attention_bias
        self.q_proj = nn.Linear(shape.hidden_size, self.heads * self.width, bias=bias)
        self.k_proj = nn.Linear(shape.hidden_size, self.kv_heads * self.width, bias=bias)
        self.v_proj = nn.Linear(shape.hidden_size, self.kv_heads * self.width, bias=bias)
        self.o_proj = nn.Linear(
            self.heads * self.width, shape.hidden_size, bias=bias and shape.family != "qwen2"
        )
        normed = shape.family == "qwen3"
        eps = shape.rms_norm_eps
        self.q_norm: nn.Module = RMSNorm(self.width, eps) if normed else nn.Identity()
        self.k_norm: nn.Module = RMSNorm(self.width, eps) if normed else nn.Identity()

    def forward(
        self, context: Tensor, block: Tensor, rotation: Tensor, block_rotation: Tensor, mask: Tensor
    ) -> Tensor:
        """``context`` [B, T, d], ``block`` [B, R, d] -> [B, R, d].

        ``rotation``, ``block_rotation`` [B, T or R, 2, hd / 2]: cosines and sines of their
        positions; ``mask`` bool [B, 1, R, T + R], True where a row may look.
        """
        both = torch.cat([context, block], dim=1)
        q = self.q_norm(self.q_proj(block).unflatten(-1, (self.heads, self.width)))
        k = self.k_norm(self.k_proj(both).unflatten(-1, (self.kv_heads, self.width)))
        v = self.v_proj(both).unflatten(-1, (self.kv_heads, self.width))
        q = rotate(q, block_rotation)
        k = rotate(k, torch.cat([rotation, block_rotation], dim=1))
        mixed = functional.scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            attn_mask=mask,
            enable_gqa=self.heads != self.kv_heads,
        )
        out: Tensor = self.o_proj(mixed.transpose(1, 2).flatten(2))
        return out


class MLP(nn.Module):
    """SwiGLU (Shazeer 2020)."""

    def __init__(self, shape: TargetConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.up_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.down_proj = nn.Linear(shape.intermediate_size, shape.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class DraftLayer(nn.Module):
    """A layer of the target's family; the context skips ``input_layernorm``."""

    def __init__(self, shape: TargetConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self.self_attn = Attention(shape)
        self.post_attention_layernorm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self.mlp = MLP(shape)

    def forward(
        self, context: Tensor, x: Tensor, rotation: Tensor, block_rotation: Tensor, mask: Tensor
    ) -> Tensor:
        """As :meth:`Attention.forward`."""
        normed = self.input_layernorm(x)
        x = x + self.self_attn(context, normed, rotation, block_rotation, mask)
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """RoPE as Llama halves heads: ``x`` [B, R, H, hd], ``rotation`` [B, R, 2, hd / 2]."""
    cos, sin = rotation[:, :, None, 0], rotation[:, :, None, 1]
    first, second = x.float().chunk(2, dim=-1)
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return turned.to(x.dtype)


def block_mask(anchors: Tensor, context_length: int, block_size: int) -> Tensor:
    """What each row sees of ``[context ; blocks]``: positions before its anchor, its own block.

    ``anchors`` int64 [B, A] are positions; returns bool [B, 1, A * g, T + A * g].
    """
    batch, count = anchors.shape
    device = anchors.device
    before = torch.arange(context_length, device=device) < anchors[:, :, None]
    before = before.repeat_interleave(block_size, dim=1)
    owner = torch.arange(count, device=device).repeat_interleave(block_size)
    own = (owner[:, None] == owner[None, :]).expand(batch, -1, -1)
    return torch.cat([before, own], dim=-1)[:, None]
