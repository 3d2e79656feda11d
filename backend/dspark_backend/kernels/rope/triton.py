"""Split the fused projection, normalise heads where the family does, rotate, and write the pages of
keys and values: one launch for all requests, one program a row. Oracle: ``reference.py``."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from dspark_backend.kernels.contract import FLOATS, describe, expect
from dspark_backend.kernels.device import device_kernel


@dataclass(frozen=True, slots=True)
class Rotation:
    """``cos``, ``sin`` float32 [positions, hd / 2]; ``q_norm``, ``k_norm`` float32 [hd] with
    ``eps``, None where the family has none."""

    cos: Tensor
    sin: Tensor
    q_norm: Tensor | None
    k_norm: Tensor | None
    eps: float


@dataclass(frozen=True, slots=True)
class Places:
    """Where R rows are: ``positions`` int32 [R], and the pages and slots that those have in the
    tables of their requests, ``pages``, ``slots`` int32 [R]; no two rows share a slot."""

    positions: Tensor
    pages: Tensor
    slots: Tensor


def rope_append(
    qkv: Tensor, places: Places, rotation: Rotation, keys: Tensor, values: Tensor
) -> Tensor:
    """Queries [R, H, hd], rotated; keys and values go to their pages.

    ``qkv`` [R, (H + 2 Hkv) hd] and ``keys``, ``values`` [P, Hkv, S, hd] are of one float dtype;
    H may be 0. Arithmetic is in float32. Raises ValueError for others than these; positions, pages
    and slots lie on the device and are not looked at.
    """
    _, kv_heads, page_size, width = keys.shape
    if qkv.dim() != 2 or qkv.dtype not in FLOATS or qkv.shape[1] % width:
        raise ValueError(f"qkv is [R, (H + 2 Hkv) hd] of a float dtype, not {describe(qkv)}")
    rows, heads = qkv.shape[0], qkv.shape[1] // width - 2 * kv_heads
    expect("qkv", qkv, qkv.device, qkv.dtype, *qkv.shape)
    for name, tensor in (("keys", keys), ("values", values)):
        expect(name, tensor, qkv.device, qkv.dtype, *keys.shape)
    for name in ("positions", "pages", "slots"):
        expect(name, getattr(places, name), qkv.device, torch.int32, rows)
    for name in ("cos", "sin"):
        expect(
            name, getattr(rotation, name), qkv.device, torch.float32, len(rotation.cos), width // 2
        )
    for name in ("q_norm", "k_norm"):
        norm = getattr(rotation, name)
        if norm is not None:
            expect(name, norm, qkv.device, torch.float32, width)
    q = torch.empty(rows, heads, width, dtype=qkv.dtype, device=qkv.device)
    if rows:
        none = rotation.cos
        _rope_append[(rows,)](
            *(qkv, places.positions, places.pages, places.slots, rotation.cos, rotation.sin),
            none if rotation.q_norm is None else rotation.q_norm,
            none if rotation.k_norm is None else rotation.k_norm,
            *(rotation.eps, q, keys, values),
            NORMED=rotation.k_norm is not None,
            HEADS=heads,
            KV_HEADS=kv_heads,
            PAGE=page_size,
            WIDTH=width,
            ALL_HEADS=triton.next_power_of_2(heads + 2 * kv_heads),
            HALF=triton.next_power_of_2(width // 2),
        )
    return q


@device_kernel
def _rope_append(
    qkv: tl.tensor,
    positions: tl.tensor,
    pages: tl.tensor,
    slots: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    q_norm: tl.tensor,
    k_norm: tl.tensor,
    eps: tl.tensor,
    q: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    NORMED: tl.constexpr,  # noqa: N803
    HEADS: tl.constexpr,  # noqa: N803
    KV_HEADS: tl.constexpr,  # noqa: N803
    PAGE: tl.constexpr,  # noqa: N803
    WIDTH: tl.constexpr,  # noqa: N803
    ALL_HEADS: tl.constexpr,  # noqa: N803
    HALF: tl.constexpr,  # noqa: N803
) -> None:
    row = tl.program_id(0).to(tl.int64)
    head, column = tl.arange(0, ALL_HEADS), tl.arange(0, HALF)
    half = WIDTH // 2
    inside = (head < HEADS + 2 * KV_HEADS)[:, None] & (column < half)[None, :]
    at = head[:, None] * WIDTH + column[None, :]
    source = qkv + row * ((HEADS + 2 * KV_HEADS) * WIDTH) + at
    first = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(source + half, mask=inside, other=0.0).to(tl.float32)
    is_query, is_value = (head < HEADS)[:, None], (head >= HEADS + KV_HEADS)[:, None]
    a, b = first, second
    if NORMED:
        square = tl.sum(first * first + second * second, axis=1)
        inverse = (1.0 / tl.sqrt(square / WIDTH + eps))[:, None]
        weight = k_norm + column[None, :] + 0 * head[:, None]
        known = inside & ~is_query
        scale_a = tl.load(weight, mask=known, other=0.0)
        scale_b = tl.load(weight + half, mask=known, other=0.0)
        if HEADS > 0:
            weight = q_norm + column[None, :] + 0 * head[:, None]
            scale_a += tl.load(weight, mask=inside & is_query, other=0.0)
            scale_b += tl.load(weight + half, mask=inside & is_query, other=0.0)
        a, b = first * inverse * scale_a, second * inverse * scale_b
    turn = tl.load(positions + row).to(tl.int64) * half + column
    c = tl.load(cos + turn, mask=column < half, other=0.0)[None, :]
    s = tl.load(sin + turn, mask=column < half, other=0.0)[None, :]
    turned_a = tl.where(is_value, first, a * c - b * s).to(q.dtype.element_ty)
    turned_b = tl.where(is_value, second, b * c + a * s).to(q.dtype.element_ty)
    out = q + row * (HEADS * WIDTH) + at
    tl.store(out, turned_a, mask=inside & is_query)
    tl.store(out + half, turned_b, mask=inside & is_query)
    page, slot = tl.load(pages + row).to(tl.int64), tl.load(slots + row)
    kv_head = (head[:, None] - HEADS) % KV_HEADS
    there = ((page * KV_HEADS + kv_head) * PAGE + slot) * WIDTH + column[None, :]
    is_key = inside & ~is_query & ~is_value
    tl.store(keys + there, turned_a, mask=is_key)
    tl.store(keys + there + half, turned_b, mask=is_key)
    tl.store(values + there, turned_a, mask=inside & is_value)
    tl.store(values + there + half, turned_b, mask=inside & is_value)
