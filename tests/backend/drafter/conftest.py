"""Fixtures for the drafter's tests: random drafters, and the oracle they are held against.

``Reference`` is DSPARK.md sections 1 and 2 in plain float32 loops, written from the text, one
sequence and one slot at a time; it shares no code with the drafter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dspark_backend.checkpoint.config import TargetConfig
from dspark_backend.drafter.config import DrafterConfig, HeadType
from dspark_backend.drafter.layout import trained_shapes


@dataclass
class Reference:
    """``config`` is a drafter's ``config.json``; ``weights`` its tensors in float32, the target's
    ``embed_tokens.weight`` and ``lm_head.weight`` (rows of the draft vocabulary) among them."""

    config: dict[str, Any]
    weights: dict[str, Tensor]
    d2t: list[int] | None = None

    def draft(
        self,
        features: Tensor,
        anchor: int,
        known: Sequence[int] = (),
        legal: Callable[[list[int]], list[int]] | None = None,
    ) -> tuple[list[int], Tensor, list[float]]:
        """Features [T, n * d] of positions 0 .. T - 1, anchor at T: tokens, logits, confidences.

        The first slots hold ``known``; ``legal(tokens)`` are the target ids that may follow the
        tokens after those (None: all); where there is one it is taken, and the block ends where
        there are more and none that can be said.
        """
        hidden = self.hidden(features, anchor)
        tokens, rows, sure = [], [], []
        previous, state = anchor, None
        for slot, h in enumerate(hidden):
            w1 = self._w1(previous)
            bias, state = self._bias(h, w1, state)
            logits = self.weights["lm_head.weight"] @ h + bias
            ids = list(range(len(logits))) if self.d2t is None else self.d2t
            if slot < len(known):
                previous = known[slot]
            else:
                allowed = ids if legal is None else legal(tokens[len(known) :])
                said = [(float(x), -v) for x, v in zip(logits, ids, strict=True) if v in allowed]
                if not said and len(allowed) != 1:
                    break
                previous = allowed[0] if len(allowed) == 1 else -max(said)[1]
            tokens.append(previous)
            rows.append(logits)
            sure.append(self._confidence(h, w1))
        return tokens, torch.stack(rows), sure

    def hidden(self, features: Tensor, anchor: int) -> list[Tensor]:
        w, c = self.weights, self.config
        start, size = features.shape[0], c["block_size"]
        context = [self._norm(w["fc.weight"] @ f, "hidden_norm.weight") for f in features]
        ids = [anchor] + [c["mask_token_id"]] * (size - 1)
        x = [w["embed_tokens.weight"][i].clone() for i in ids]
        for layer in range(c["num_hidden_layers"]):
            p = f"layers.{layer}."
            normed = [self._norm(row, p + "input_layernorm.weight") for row in x]
            mixed = self._attention(p + "self_attn.", context, normed, start)
            x = [row + m for row, m in zip(x, mixed, strict=True)]
            for i, row in enumerate(x):
                h = self._norm(row, p + "post_attention_layernorm.weight")
                gate = w[p + "mlp.gate_proj.weight"] @ h
                up = w[p + "mlp.up_proj.weight"] @ h
                x[i] = row + w[p + "mlp.down_proj.weight"] @ (gate * torch.sigmoid(gate) * up)
        return [self._norm(row, "norm.weight") for row in x]

    def _attention(
        self, p: str, context: list[Tensor], block: list[Tensor], start: int
    ) -> list[Tensor]:
        c = self.config
        heads, kv_heads, width = c["num_attention_heads"], c["num_key_value_heads"], c["head_dim"]
        keys, values = [], []
        for position, row in enumerate([*context, *block]):
            keys.append(self._heads(p + "k", row, kv_heads, position))
            values.append(self._project(p + "v_proj", row).reshape(kv_heads, width))
        out = []
        for slot, row in enumerate(block):
            q = self._heads(p + "q", row, heads, start + slot)
            pieces = []
            for head in range(heads):
                shared = head // (heads // kv_heads)
                k = torch.stack([key[shared] for key in keys])
                v = torch.stack([value[shared] for value in values])
                pieces.append(torch.softmax(k @ q[head] * width**-0.5, dim=0) @ v)
            out.append(self._project(p + "o_proj", torch.cat(pieces)))
        return out

    def _heads(self, p: str, row: Tensor, count: int, position: int) -> Tensor:
        width = self.config["head_dim"]
        heads = self._project(p + "_proj", row).reshape(count, width)
        if p + "_norm.weight" in self.weights:
            heads = torch.stack([self._norm(head, p + "_norm.weight") for head in heads])
        half = width // 2
        out = heads.clone()
        for i in range(half):
            angle = torch.tensor(position * self.config["rope_theta"] ** (-2 * i / width))
            a, b = heads[:, i], heads[:, i + half]
            out[:, i] = a * torch.cos(angle) - b * torch.sin(angle)
            out[:, i + half] = b * torch.cos(angle) + a * torch.sin(angle)
        return out

    def _project(self, name: str, row: Tensor) -> Tensor:
        out = self.weights[name + ".weight"] @ row
        return out + self.weights[name + ".bias"] if name + ".bias" in self.weights else out

    def _norm(self, row: Tensor, name: str) -> Tensor:
        square = (row * row).mean()
        return row / torch.sqrt(square + self.config["rms_norm_eps"]) * self.weights[name]

    def _w1(self, token: int) -> Tensor:
        table = self.weights.get("markov_head.markov_w1.weight")
        return torch.zeros(0) if table is None else table[token]

    def _bias(self, h: Tensor, w1: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor | None]:
        w, p = self.weights, "markov_head."
        kind = self.config["markov_head_type"]
        if kind == "none":
            return torch.zeros(()), None
        latent = w1
        if kind == "gated":
            gate = w[p + "gate_proj.weight"] @ torch.cat([h, w1]) + w[p + "gate_proj.bias"]
            latent = torch.sigmoid(gate) * w1
        if kind == "rnn":
            s = torch.zeros_like(w1) if state is None else state
            joint = w[p + "joint_proj.weight"] @ torch.cat([s, w1, h]) + w[p + "joint_proj.bias"]
            gate, candidate, output = joint.chunk(3)
            state = torch.sigmoid(gate) * s + (1 - torch.sigmoid(gate)) * torch.tanh(candidate)
            latent = torch.tanh(output)
        return w[p + "markov_w2.weight"] @ latent, state

    def _confidence(self, h: Tensor, w1: Tensor) -> float:
        if not self.config["enable_confidence_head"]:
            return 0.5
        x = torch.cat([h, w1]) if self.config["confidence_head_with_markov"] else h
        w = self.weights
        logit = w["confidence_head.proj.weight"][0] @ x + w["confidence_head.proj.bias"][0]
        return float(torch.sigmoid(logit))


@dataclass
class RandomDrafter:
    """A drafter with random weights for a tiny target: everything an implementation needs."""

    target: TargetConfig
    target_folder: Path
    config: DrafterConfig
    state: dict[str, Tensor]
    embedding: Tensor
    lm_head: Tensor
    d2t: Tensor | None

    def reference(self) -> Reference:
        frozen = {"embed_tokens.weight": self.embedding, "lm_head.weight": self.lm_head}
        d2t = None if self.d2t is None else self.d2t.tolist()
        return Reference(self.config.to_dict(), self.state | frozen, d2t)

    def features(self, length: int, seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(length, self.config.feature_size, generator=generator)


MakeDrafter = Callable[..., RandomDrafter]


@pytest.fixture(scope="session")
def make_drafter(tiny_checkpoint: Callable[..., Path]) -> MakeDrafter:
    """``make_drafter("qwen2", head="rnn", block_size=3, draft_vocab=100, target={...})``."""

    def make(
        family: str = "llama",
        *,
        head: str = "vanilla",
        block_size: int = 5,
        num_layers: int = 2,
        taps: tuple[int, ...] = (-1, 0, 2),
        rank: int = 8,
        confidence: bool = True,
        draft_vocab: int | None = None,
        seed: int = 0,
        **target_fields: Any,
    ) -> RandomDrafter:
        folder = tiny_checkpoint(family, num_hidden_layers=4, **target_fields)
        target = TargetConfig.from_folder(folder)
        config = DrafterConfig.for_target(
            target,
            num_layers=num_layers,
            block_size=block_size,
            mask_token_id=1,
            target_layer_ids=taps,
            head=HeadType(head),
            markov_rank=rank,
            confidence=confidence,
            draft_vocab_size=draft_vocab,
        )
        generator = torch.Generator().manual_seed(seed)

        def weight(name: str, shape: tuple[int, ...]) -> Tensor:
            noise = torch.randn(shape, generator=generator)
            if name.endswith("norm.weight"):
                return 1 + 0.1 * noise
            return noise if len(shape) == 1 or "w1" in name else noise / math.sqrt(shape[-1])

        state = {name: weight(name, shape) for name, shape in trained_shapes(config).items()}
        # Rounded, so that what a bfloat16 file holds is what was made.
        state = {name: tensor.bfloat16().float() for name, tensor in state.items()}
        vocab, hidden = target.vocab_size, target.hidden_size
        embedding = torch.randn(vocab, hidden, generator=generator).bfloat16().float()
        head_rows = torch.randn(vocab, hidden, generator=generator) / math.sqrt(hidden)
        d2t = None
        if draft_vocab is not None:
            d2t = torch.randperm(vocab, generator=generator)[:draft_vocab].sort().values
            head_rows = head_rows[d2t]
        lm_head = head_rows.bfloat16().float()
        return RandomDrafter(target, folder, config, state, embedding, lm_head, d2t)

    return make
