"""The device's kernels at work, each beside torch doing the same: what ``bench kernels`` times."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from dspark_backend.kernels.contract import Masks
from dspark_backend.kernels.markov.contract import Blocks, Head
from dspark_backend.kernels.markov.triton import draft
from dspark_backend.kernels.norm.triton import rms_norm
from dspark_backend.kernels.ragged_attention.contract import Batch as AttentionBatch
from dspark_backend.kernels.ragged_attention.contract import Sight
from dspark_backend.kernels.ragged_attention.triton import attend
from dspark_backend.kernels.rope.triton import Places, Rotation, rope_append
from dspark_backend.kernels.swiglu.triton import silu_mul
from dspark_backend.kernels.verify.contract import Batch as VerifyBatch
from dspark_backend.kernels.verify.contract import Rule
from dspark_backend.kernels.verify.triton import verify
from dspark_backend.target.device_linear import DeviceLinear

Run = Callable[[], Tensor]


@dataclass(frozen=True, slots=True)
class Size:
    """A model and a batch: ``requests`` of ``rows`` rows each after ``context`` positions. Beside
    it a drafter's blocks of ``slots`` slots over ``drafts`` draft ids, with a head of ``rank``."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    requests: int
    rows: int
    context: int
    slots: int
    drafts: int
    rank: int
    page: int = 64

    @property
    def all_rows(self) -> int:
        """Rows of a pass."""
        return self.requests * self.rows


@dataclass(frozen=True, slots=True)
class KernelCase:
    """``moved_bytes`` are read and written at least. ``tolerance`` is how far the two results may
    lie apart, None where they are draws of different noise."""

    op: str
    shape: str
    moved_bytes: int
    ours: Run
    torch: Run
    tolerance: float | None


def cases(size: Size, dtype: torch.dtype, device: torch.device) -> Iterator[KernelCase]:
    """One after the other, so that only one case's tensors need to exist at a time."""
    made = _Made(size, dtype, device)
    yield made.norm()
    yield made.rope()
    yield made.swiglu()
    yield made.linear()
    yield made.attention(Sight.CAUSAL)
    yield made.attention(Sight.BLOCK)
    yield made.verify(Rule.GREEDY)
    yield made.verify(Rule.COUPLED)
    yield made.markov()


class _Made:
    def __init__(self, size: Size, dtype: torch.dtype, device: torch.device) -> None:
        self.size, self.dtype, self.device = size, dtype, device
        self.close = 1e-4 if dtype is torch.float32 else 6e-2
        self._noise = torch.Generator(device).manual_seed(0)

    def random(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        noise = torch.randn(shape, generator=self._noise, device=self.device)
        return noise.to(dtype or self.dtype)

    def ints(self, *values: int) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self.device)

    def norm(self) -> KernelCase:
        rows, width = self.size.all_rows, self.size.hidden
        x, weight = self.random(rows, width, dtype=torch.float32), self.random(width).float()
        delta = torch.zeros(rows, width, dtype=self.dtype, device=self.device)

        def plain() -> Tensor:
            x.add_(delta)
            return functional.rms_norm(x, (width,), weight, 1e-6).to(self.dtype)

        moved = rows * width * (4 + 4 + 2 * self.dtype.itemsize)
        ours = lambda: rms_norm(x, weight, 1e-6, self.dtype, delta)  # noqa: E731
        return KernelCase("norm", f"[{rows}, {width}]", moved, ours, plain, self.close)

    def rope(self) -> KernelCase:
        s = self.size
        rows, all_heads = s.all_rows, s.heads + 2 * s.kv_heads
        qkv = self.random(rows, all_heads * s.head_dim)
        angles = self.random(rows + 1, s.head_dim // 2, dtype=torch.float32)
        rotation = Rotation(angles.cos(), angles.sin(), None, None, 1e-6)
        at = torch.arange(rows, device=self.device)
        places = Places(at.int(), (at // s.page).int(), (at % s.page).int())
        pages = self.random(2, -(-rows // s.page), s.kv_heads, s.page, s.head_dim)
        keys, values = pages

        def plain() -> Tensor:
            heads = qkv.view(rows, all_heads, s.head_dim)
            first, second = heads[:, : s.heads + s.kv_heads].float().chunk(2, dim=-1)
            cos, sin = rotation.cos[at][:, None], rotation.sin[at][:, None]
            turned = [first * cos - second * sin, second * cos + first * sin]
            out = torch.cat(turned, dim=-1).to(self.dtype)
            keys[at // s.page, :, at % s.page] = out[:, s.heads :]
            values[at // s.page, :, at % s.page] = heads[:, s.heads + s.kv_heads :]
            return out[:, : s.heads]

        moved = 2 * qkv.nbytes
        ours = lambda: rope_append(qkv, places, rotation, keys, values)  # noqa: E731
        shape = f"[{rows}, {all_heads}, {s.head_dim}]"
        return KernelCase("rope and pages", shape, moved, ours, plain, self.close)

    def swiglu(self) -> KernelCase:
        rows, width = self.size.all_rows, self.size.intermediate
        gate_up = self.random(rows, 2 * width)

        def plain() -> Tensor:
            gate, up = gate_up.chunk(2, dim=1)
            return functional.silu(gate) * up

        moved = rows * width * 3 * self.dtype.itemsize
        ours = lambda: silu_mul(gate_up)  # noqa: E731
        return KernelCase("swiglu", f"[{rows}, {width}]", moved, ours, plain, self.close)

    def linear(self) -> KernelCase:
        rows, width, out = self.size.all_rows, self.size.hidden, self.size.intermediate
        x, weight = self.random(rows, width), self.random(out, width) / width**0.5
        fixed = DeviceLinear(weight, None)
        moved = weight.nbytes + x.nbytes + rows * out * self.dtype.itemsize
        plain = lambda: functional.linear(x, weight)  # noqa: E731
        shape = f"[{rows}, {width}] x [{width}, {out}]"
        return KernelCase("linear", shape, moved, lambda: fixed(x), plain, self.close)

    def attention(self, sight: Sight) -> KernelCase:
        s = self.size
        new = s.rows if sight is Sight.CAUSAL else s.slots
        total = s.context + new
        each = -(-total // s.page)
        count = s.requests * each
        keys, values = self.random(2, count, s.kv_heads, s.page, s.head_dim)
        table = torch.arange(count, dtype=torch.int32, device=self.device).view(s.requests, each)
        batch = AttentionBatch(
            q=self.random(s.requests * new, s.heads, s.head_dim),
            offsets=self.ints(*range(0, s.requests * new + 1, new)),
            starts=self.ints(*[s.context] * s.requests),
            keys=keys,
            values=values,
            table=table,
            longest=new,
            sight=sight,
        )

        def contiguous(pages: Tensor) -> Tensor:
            own = pages.view(s.requests, each, s.kv_heads, s.page, s.head_dim)
            return own.transpose(1, 2).flatten(2, 3)[:, :, :total].contiguous()

        k, v = contiguous(keys), contiguous(values)
        q = batch.q.view(s.requests, new, s.heads, s.head_dim).transpose(1, 2).contiguous()
        seen = torch.arange(total, device=self.device)
        row = torch.arange(new, device=self.device)[:, None] + s.context
        mask = seen <= row if sight is Sight.CAUSAL else torch.ones_like(seen <= row)

        def plain() -> Tensor:
            mixed = functional.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)
            return mixed.transpose(1, 2).flatten(0, 1)

        moved = k.nbytes + v.nbytes + 2 * batch.q.nbytes
        shape = f"{s.requests} x {new} rows, {s.heads}/{s.kv_heads} heads, {total} positions"
        name = f"attention, {sight.name.lower()}"
        return KernelCase(name, shape, moved, lambda: attend(batch), plain, self.close)

    def verify(self, rule: Rule) -> KernelCase:
        s = self.size
        logits = self.random(s.all_rows, s.vocab)
        words = torch.full(
            (s.all_rows, -(-s.vocab // 32)), -1, dtype=torch.int32, device=self.device
        )
        row = torch.arange(s.all_rows, dtype=torch.int32, device=self.device)
        drafts = logits.float().argmax(dim=1).int()
        requests = torch.arange(s.requests, device=self.device)
        batch = VerifyBatch(
            logits=logits,
            offsets=self.ints(*range(0, s.all_rows + 1, s.rows)),
            drafts=drafts,
            rules=self.ints(*[int(rule)] * s.requests),
            temperatures=torch.ones(s.requests, device=self.device),
            seeds=requests,
            positions=requests,
            longest=s.rows,
            masks=Masks(words, row),
        )
        ids = torch.arange(s.vocab, device=self.device)
        legal = (words[:, ids >> 5] >> (ids & 31) & 1).bool()

        def plain() -> Tensor:
            scores = logits.float().masked_fill(~legal, -torch.inf)
            if rule is Rule.COUPLED:
                scores = scores - torch.rand_like(scores).log().neg().log()
            choice = scores.argmax(dim=1).view(s.requests, s.rows)
            stands = (choice == drafts.view(s.requests, s.rows))[:, :-1]
            accepted = stands.int().cumprod(dim=1).sum(dim=1)
            return torch.stack([accepted, choice.gather(1, accepted[:, None])[:, 0]])

        def ours() -> Tensor:
            verdict = verify(batch)
            return torch.stack([verdict.accepted, verdict.tokens])

        shape = f"{s.requests} x {s.rows} rows, V = {s.vocab}"
        tolerance = 0.0 if rule is Rule.GREEDY else None
        moved = logits.nbytes + words.nbytes
        return KernelCase(f"verify, {rule.name.lower()}", shape, moved, ours, plain, tolerance)

    def markov(self) -> KernelCase:
        s = self.size
        base = self.random(s.requests, s.slots, s.drafts)
        head = Head(
            self.random(s.vocab, s.rank),
            self.random(s.drafts, s.rank) / s.rank**0.5,
            torch.arange(s.drafts, dtype=torch.int32, device=self.device),
        )
        anchors = torch.arange(s.requests, dtype=torch.int32, device=self.device)

        def plain() -> Tensor:
            token, tokens = anchors, []
            for k in range(s.slots):
                bias = functional.linear(head.w1[token.long()], head.w2)
                token = (base[:, k].float() + bias.float()).argmax(dim=1).int()
                tokens.append(token)
            return torch.stack(tokens, dim=1)

        moved = base.nbytes + s.slots * head.w2.nbytes
        blocks = Blocks(base, anchors, head)
        shape = f"{s.requests} x {s.slots} slots, D = {s.drafts}, r = {s.rank}"
        # In bfloat16, torch rounds the bias before it is added: a near tie may fall otherwise.
        tolerance = 0.0 if self.dtype is torch.float32 else None
        return KernelCase("markov", shape, moved, lambda: draft(blocks), plain, tolerance)
