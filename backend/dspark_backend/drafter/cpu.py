"""The drafter as the engine's loop runs it on a CPU: the target's own kernels on few rows.

The trained module is ``model.py``; this is its fast twin for one block an anchor. Matrices are
int8 with 16-bit activations.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dspark_backend.checkpoint.config import TargetConfig
from dspark_backend.checkpoint.safetensors import TensorStore
from dspark_backend.drafter.checkpoint import DrafterFiles, open_drafter
from dspark_backend.drafter.heads import ConfidenceHead, MarkovHead, markov_head
from dspark_backend.drafter.layout import EMBEDDING, LM_HEAD
from dspark_backend.kernels.attention.cpu import attend
from dspark_backend.kernels.linear.cpu import padded
from dspark_backend.kernels.linear.reference import quantise_weight
from dspark_backend.kernels.norm.cpu import add_rms_norm, rms_norm
from dspark_backend.kernels.rope.cpu import rope_append
from dspark_backend.kernels.swiglu.cpu import silu_mul
from dspark_backend.kv.contiguous import KVShape, SequenceKV
from dspark_backend.speculation.protocol import Anchor, Proposal
from dspark_backend.target.linear import Int8Linear
from dspark_backend.target.rope import tables

SOURCE = "draft"
_PLANES = 2  # 16-bit activations: on so few rows they cost nothing

Array = NDArray[np.float32]


class _Tensors(Protocol):
    def get(self, name: str) -> Tensor: ...


class CpuDrafter:
    """Implements :class:`dspark_backend.speculation.protocol.Drafter`. Not thread-safe."""

    def __init__(self, files: DrafterFiles, target: TensorStore, max_positions: int) -> None:
        """``target`` lends the embedding and LM head where the checkpoint has no copies;
        ``max_positions`` is the longest sequence of the target."""
        config = files.config
        self.config = config
        self._d2t = files.d2t
        self._shape = config.shape
        self._temperatures = torch.tensor(files.calibration.temperatures)
        self._embedding, head = _target_rows(files, target)
        self._fc = _linear(files, ["fc.weight"])
        self._hidden_norm, self._norm = (
            _vector(files, f"{n}.weight") for n in ("hidden_norm", "norm")
        )
        self._layers = [_Layer(files, config.shape, i) for i in range(config.shape.num_layers)]
        self._lm_head = _from_rows([head])
        self._head: MarkovHead | None = markov_head(config)
        self._bias: Int8Linear | None = None
        if self._head is not None:
            names = self._head.state_dict()
            self._head.load_state_dict({n: files.get(f"markov_head.{n}") for n in names})
            self._head.eval().requires_grad_(False)
            self._bias = _linear(files, ["markov_head.markov_w2.weight"])
        self._confidence: ConfidenceHead | None = None
        if config.confidence:
            self._confidence = ConfidenceHead(config)
            names = self._confidence.state_dict()
            state = {n: files.get(f"confidence_head.{n}") for n in names}
            self._confidence.load_state_dict(state)
            self._confidence.eval().requires_grad_(False)
        # A block reaches past the longest context.
        self._cos, self._sin = tables(config.shape, max_positions + config.block_size)

    @classmethod
    def open(
        cls, folder: Path, target_config: TargetConfig, target: TensorStore, max_positions: int
    ) -> CpuDrafter:
        """Load a checkpoint for a target. Raises ModelFormatError as :func:`open_drafter`."""
        return cls(open_drafter(folder, target_config), target, max_positions)

    @property
    def taps(self) -> tuple[int, ...]:
        return self.config.target_layer_ids

    @property
    def block_size(self) -> int:
        return self.config.block_size

    @property
    def context_shape(self) -> KVShape:
        shape = self._shape
        return KVShape(shape.num_layers, shape.num_kv_heads, shape.head_dim)

    def extend(self, context: SequenceKV, features: Array) -> None:
        """Append the context keys and values of the next positions: see the protocol."""
        count = len(features)
        if not count:
            return
        start = context.length
        positions = np.arange(start, start + count, dtype=np.int64)
        hidden = np.empty((count, self._shape.hidden_size), np.float32)
        self._fc(np.ascontiguousarray(features), hidden)
        rms_norm(hidden, self._hidden_norm, self._shape.rms_norm_eps, hidden)
        for index, layer in enumerate(self._layers):
            layer.write_context(
                hidden, positions, self._cos, self._sin, context.keys[index], context.values[index]
            )
        context.length = start + count

    def propose(self, anchors: Sequence[Anchor]) -> list[Proposal]:
        """One block for each anchor: see the protocol.

        The block's own keys and values go where the next committed positions will be written,
        past the context's length: room for ``block_size`` more must be reserved.
        """
        hidden = self._parallel(anchors)
        drafts, survival = self._sequential(hidden, [anchor.token for anchor in anchors])
        return [
            Proposal(tuple(tokens), tuple(chances), SOURCE)
            for tokens, chances in zip(drafts.tolist(), survival.tolist(), strict=True)
        ]

    def _parallel(self, anchors: Sequence[Anchor]) -> Tensor:
        """Normed hidden states [A, g, d] of all blocks."""
        size, shape = self.block_size, self._shape
        rows = size * len(anchors)
        inputs = torch.full((len(anchors), size), self.config.mask_token_id)
        inputs[:, 0] = torch.tensor([anchor.token for anchor in anchors])
        x: Array = self._embedding[inputs.flatten()].float().numpy()
        normed = np.empty((rows, shape.hidden_size), np.float32)
        rms_norm(x, self._layers[0].input_norm, shape.rms_norm_eps, normed)
        for index, layer in enumerate(self._layers):
            mixed = np.empty((rows, shape.num_heads, shape.head_dim), np.float32)
            qkv = layer.project(normed)
            for number, anchor in enumerate(anchors):
                block = slice(number * size, (number + 1) * size)
                start = anchor.context.length
                keys, values = anchor.context.keys[index], anchor.context.values[index]
                q = np.empty((size, shape.num_heads, shape.head_dim), np.float32)
                at = np.arange(start, start + size, dtype=np.int64)
                layer.rotate(qkv[block], at, self._cos, self._sin, q, keys, values)
                # No causal mask: every slot sees the context and the whole block.
                attend(q, keys, values, np.full(size, start + size - 1, np.int64), mixed[block])
            last = index + 1 == len(self._layers)
            following = self._norm if last else self._layers[index + 1].input_norm
            layer.finish(x, mixed.reshape(rows, -1), normed, following)
        return torch.from_numpy(normed).reshape(len(anchors), size, -1)

    def _sequential(self, hidden: Tensor, anchors: Sequence[int]) -> tuple[Tensor, Tensor]:
        """The greedy chain: drafts as target ids int64 [A, g], their survival float32 [A, g]."""
        count, size, width = hidden.shape
        base = torch.empty((count * size, self._lm_head.channels))
        self._lm_head(hidden.reshape(-1, width).numpy(), base.numpy())
        base = base.reshape(count, size, -1)
        state = None if self._head is None else self._head.start(hidden[:, 0])
        token = torch.tensor(anchors)
        drafts, logits = [], []
        for k in range(size):
            previous: Tensor | None = None
            row = base[:, k]
            if self._head is not None and self._bias is not None and state is not None:
                previous = self._head.markov_w1(token)
                latent, state = self._head.step(hidden[:, k], previous, state)
                bias = torch.empty((count, self._bias.channels))
                self._bias(latent.contiguous().numpy(), bias.numpy())
                row = row + bias
            logits.append(self._sure(hidden[:, k], previous))
            token = row.argmax(dim=-1)
            if self._d2t is not None:
                token = self._d2t[token]
            drafts.append(token)
        chances = torch.sigmoid(torch.stack(logits, dim=1) / self._temperatures)
        return torch.stack(drafts, dim=1), chances.cumprod(dim=1)

    def _sure(self, hidden: Tensor, previous: Tensor | None) -> Tensor:
        if self._confidence is None:
            return torch.full((len(hidden),), torch.inf)
        seen = previous if self.config.confidence_with_markov else None
        logit: Tensor = self._confidence(hidden, seen)
        return logit


class _Layer:
    """One draft layer: the target's family, but the context skips the input norm."""

    def __init__(self, files: DrafterFiles, shape: TargetConfig, index: int) -> None:
        prefix = f"layers.{index}."
        attention, mlp = prefix + "self_attn.", prefix + "mlp."
        projections = [f"{attention}{n}_proj" for n in "qkv"]
        biased, normed = shape.attention_bias, shape.family == "qwen3"
        none = np.zeros(0, np.float32)
        self._shape = shape
        self.input_norm = _vector(files, prefix + "input_layernorm.weight")
        self._post_norm = _vector(files, prefix + "post_attention_layernorm.weight")
        self._qkv = _linear(
            files,
            [f"{n}.weight" for n in projections],
            [f"{n}.bias" for n in projections] if biased else (),
        )
        self._kv = _linear(
            files,
            [f"{n}.weight" for n in projections[1:]],
            [f"{n}.bias" for n in projections[1:]] if biased else (),
        )
        bias = [attention + "o_proj.bias"] if biased and shape.family != "qwen2" else ()
        self._output = _linear(files, [attention + "o_proj.weight"], bias)
        self._gate_up = _linear(files, [mlp + "gate_proj.weight", mlp + "up_proj.weight"])
        self._down = _linear(files, [mlp + "down_proj.weight"])
        self._q_norm = _vector(files, attention + "q_norm.weight") if normed else none
        self._k_norm = _vector(files, attention + "k_norm.weight") if normed else none

    def write_context(
        self, hidden: Array, at: NDArray[np.int64], cos: Array, sin: Array, k: Array, v: Array
    ) -> None:
        """Keys and values of context positions: no queries, no input norm."""
        kv = np.empty((len(hidden), self._kv.channels), np.float32)
        self._kv(hidden, kv)
        none = np.empty((len(hidden), 0, self._shape.head_dim), np.float32)
        self.rotate(kv, at, cos, sin, none, k, v)

    def project(self, normed: Array) -> Array:
        qkv = np.empty((len(normed), self._qkv.channels), np.float32)
        self._qkv(normed, qkv)
        return qkv

    def rotate(
        self,
        rows: Array,
        at: NDArray[np.int64],
        cos: Array,
        sin: Array,
        q: Array,
        k: Array,
        v: Array,
    ) -> None:
        eps = self._shape.rms_norm_eps
        rope_append(rows, at, cos, sin, self._q_norm, self._k_norm, eps, q, k, v)

    def finish(self, x: Array, mixed: Array, normed: Array, following: Array) -> None:
        """The rest of the layer: updates the stream ``x``; ``normed`` gets the next norm of it."""
        eps, rows = self._shape.rms_norm_eps, len(x)
        delta = np.empty_like(x)
        self._output(mixed, delta)
        add_rms_norm(x, delta, self._post_norm, eps, normed)
        gate_up = np.empty((rows, self._gate_up.channels), np.float32)
        self._gate_up(normed, gate_up)
        gated = np.empty((rows, self._gate_up.channels // 2), np.float32)
        silu_mul(gate_up, gated)
        self._down(gated, delta)
        add_rms_norm(x, delta, following, eps, normed)


def _linear(files: _Tensors, weights: Sequence[str], biases: Sequence[str] = ()) -> Int8Linear:
    bias = np.concatenate([_vector(files, n) for n in biases]) if biases else None
    return _from_rows([files.get(name) for name in weights], bias)


def _from_rows(parts: Sequence[Tensor], bias: Array | None = None) -> Int8Linear:
    """Quantise matrices that read the same input and stack them in the kernel's layout."""
    quantised = [quantise_weight(part) for part in parts]
    q = torch.cat([weight for weight, _ in quantised])
    q = torch.nn.functional.pad(q, (0, padded(q.shape[1]) - q.shape[1])).contiguous()
    scale = torch.cat([step for _, step in quantised])
    sums = q.sum(dim=1, dtype=torch.int32)
    return Int8Linear(q.numpy(), scale.numpy(), sums.numpy(), bias, _PLANES)


def _vector(files: _Tensors, name: str) -> Array:
    values: Array = files.get(name).float().numpy()
    return values


def _target_rows(files: DrafterFiles, target: TensorStore) -> tuple[Tensor, Tensor]:
    """The embedding [V, d] and the LM head's rows of the draft vocabulary."""
    if files.has_target_copies:
        return files.get(EMBEDDING), files.get(LM_HEAD)
    embedding = target.get("model.embed_tokens.weight")
    head = target.get(LM_HEAD) if LM_HEAD in target else embedding
    return embedding, head.float() if files.d2t is None else head[files.d2t].float()
