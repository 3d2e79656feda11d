"""Norm, gate and rotation on the device against their float64 references."""

from __future__ import annotations

import pytest
import torch

from dspark_backend.kernels.norm import reference as norm_reference
from dspark_backend.kernels.norm.triton import rms_norm
from dspark_backend.kernels.rope import reference as rope_reference
from dspark_backend.kernels.rope.triton import Places, Rotation, rope_append
from dspark_backend.kernels.swiglu.reference import silu_mul as silu_mul_reference
from dspark_backend.kernels.swiglu.triton import silu_mul

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # on the CPU under Triton's interpreter
WIDTHS = [1, 7, 60, 64, 577]
CLOSE = {torch.float32: 3e-6, torch.bfloat16: 8e-3}


@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize("width", WIDTHS)
def test_rms_norm(width: int, dtype: torch.dtype) -> None:
    x, weight = torch.randn(3, width) * 10, torch.rand(width)
    before = x.clone()
    out = rms_norm(x.to(DEVICE), weight.to(DEVICE), 1e-5, dtype)
    assert out.dtype is dtype
    assert torch.equal(x, before)
    expected = norm_reference.rms_norm(x, weight, 1e-5)
    torch.testing.assert_close(out.cpu().double(), expected, rtol=CLOSE[dtype], atol=CLOSE[dtype])


@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize("width", WIDTHS)
def test_a_delta_is_added_to_the_residual_first(width: int, dtype: torch.dtype) -> None:
    x, delta, weight = torch.randn(4, width), torch.randn(4, width).to(dtype), torch.rand(width)
    stream = x.clone().to(DEVICE)
    out = rms_norm(stream, weight.to(DEVICE), 1e-6, torch.float32, delta.to(DEVICE))
    total = x + delta.float()
    assert torch.equal(stream.cpu(), total)
    expected = norm_reference.rms_norm(total, weight, 1e-6)
    torch.testing.assert_close(out.cpu().double(), expected, rtol=3e-6, atol=3e-6)


@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize("width", [1, 5, 64, 1023, 1025])
def test_silu_mul(width: int, dtype: torch.dtype) -> None:
    gate_up = (torch.randn(3, 2 * width) * 20).to(dtype)
    gate_up[0, 0] = -200.0  # exp overflows a float32 on the way
    out = silu_mul(gate_up.to(DEVICE))
    assert out.dtype is dtype
    expected = silu_mul_reference(gate_up)
    torch.testing.assert_close(out.cpu().double(), expected, rtol=CLOSE[dtype], atol=1e-6)


def rotated(heads: torch.Tensor, norm: torch.Tensor | None, rotation: Rotation) -> torch.Tensor:
    """The reference over [R, h, hd] at ``AT``."""
    if norm is not None:
        flat = heads.flatten(0, 1)
        heads = norm_reference.rms_norm(flat, norm, rotation.eps).unflatten(0, heads.shape[:2])
    cos, sin = rotation.cos[AT.long()], rotation.sin[AT.long()]
    return rope_reference.rotate(heads, cos, sin)


AT = torch.tensor([0, 5, 3, 9], dtype=torch.int32)
SHAPES = [(4, 2, 16), (6, 3, 20), (2, 1, 2), (0, 2, 24), (9, 3, 64)]


@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads", "width"), SHAPES)
def test_rope_append(
    heads: int, kv_heads: int, width: int, normed: bool, dtype: torch.dtype
) -> None:
    angles = torch.rand(12, width // 2) * 6
    norms = torch.rand(2, width) + 0.5 if normed else [None, None]
    rotation = Rotation(angles.cos(), angles.sin(), norms[0], norms[1], 1e-6)
    qkv = (torch.randn(4, (heads + 2 * kv_heads) * width) * 3).to(dtype)
    pages = torch.tensor([2, 0, 2, 1], dtype=torch.int32)
    slots = torch.tensor([4, 0, 1, 3], dtype=torch.int32)
    keys, values = torch.full((2, 3, kv_heads, 5, width), 7.0).to(dtype).to(DEVICE)
    moved = Rotation(
        *(rotation.cos.to(DEVICE), rotation.sin.to(DEVICE)),
        *(None if norm is None else norm.to(DEVICE) for norm in norms),
        rotation.eps,
    )
    places = Places(AT.to(DEVICE), pages.to(DEVICE), slots.to(DEVICE))
    q = rope_append(qkv.to(DEVICE), places, moved, keys, values)
    split = qkv.unflatten(1, (-1, width))
    expected = rotated(split[:, :heads], norms[0], rotation)
    close = {"rtol": CLOSE[dtype], "atol": CLOSE[dtype] * 10}
    torch.testing.assert_close(q.cpu().double(), expected, **close)
    keys_then, values_then = torch.full((2, 3, kv_heads, 5, width), 7.0, dtype=torch.float64)
    keys_then[pages.long(), :, slots.long()] = rotated(
        split[:, heads : heads + kv_heads], norms[1], rotation
    )
    values_then[pages.long(), :, slots.long()] = split[:, heads + kv_heads :].double()
    torch.testing.assert_close(keys.cpu().double(), keys_then, **close)
    assert torch.equal(values.cpu().double(), values_then)


@pytest.mark.parametrize("normed", [False, True])
def test_a_rows_bits_are_its_own(normed: bool) -> None:
    """Of norm, gate and rotation: whatever shares the call."""
    x, weight = torch.randn(9, 100), torch.rand(100)
    alone = [rms_norm(row[None].to(DEVICE), weight.to(DEVICE), 1e-6, torch.float32) for row in x]
    assert torch.equal(
        torch.cat(alone), rms_norm(x.to(DEVICE), weight.to(DEVICE), 1e-6, torch.float32)
    )
    gates = [silu_mul(row[None].to(DEVICE)) for row in x]
    assert torch.equal(torch.cat(gates), silu_mul(x.to(DEVICE)))
    angles = torch.rand(9, 5, device=DEVICE) * 6
    norm = torch.rand(10, device=DEVICE) if normed else None
    rotation = Rotation(angles.cos(), angles.sin(), norm, norm, 1e-6)
    row_of = torch.arange(9, dtype=torch.int32, device=DEVICE)

    def turned(rows: torch.Tensor) -> torch.Tensor:
        keys, values = torch.zeros(2, 1, 2, 9, 10, device=DEVICE)
        zero = torch.zeros_like(rows)
        q = rope_append(
            x[rows.long().cpu()].to(DEVICE), Places(rows, zero, rows), rotation, keys, values
        )
        return torch.cat([q, keys[0, :, rows.long()].transpose(0, 1)], dim=1)

    assert torch.equal(torch.cat([turned(row[None]) for row in row_of]), turned(row_of))


def test_what_breaks_a_contract_is_refused() -> None:
    x, weight = torch.zeros(2, 4), torch.ones(4)
    with pytest.raises(ValueError, match=r"x is torch\.float32 \[2, 4\]"):
        rms_norm(x.bfloat16(), weight, 1e-6, torch.float32)
    with pytest.raises(ValueError, match="weight is"):
        rms_norm(x, torch.ones(5), 1e-6, torch.float32)
    with pytest.raises(ValueError, match="delta is"):
        rms_norm(x, weight, 1e-6, torch.float32, x.long())
    with pytest.raises(ValueError, match="gate_up is"):
        silu_mul(x.T)
    pages = torch.zeros(3, 1, 2, 4)
    rotation = Rotation(torch.zeros(5, 2), torch.zeros(5, 2), None, None, 1e-6)
    row = torch.zeros(2, dtype=torch.int32)
    with pytest.raises(ValueError, match="qkv is"):
        rope_append(torch.zeros(2, 13), Places(row, row, row), rotation, pages, pages)
    with pytest.raises(ValueError, match=r"slots is torch\.int32 \[2\]"):
        rope_append(torch.zeros(2, 12), Places(row, row, row.long()), rotation, pages, pages)
    with pytest.raises(ValueError, match=r"keys is torch\.float32"):
        rope_append(torch.zeros(2, 12), Places(row, row, row), rotation, pages.double(), pages)
