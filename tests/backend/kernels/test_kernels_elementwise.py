"""Norm, gate, rotation and exponential against their float64 references."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from dspark_backend.kernels.exponential import exp
from dspark_backend.kernels.mass import mass_outside
from dspark_backend.kernels.maximum import largest, largest_magnitude
from dspark_backend.kernels.norm import reference as norm_reference
from dspark_backend.kernels.norm.cpu import add_rms_norm, rms_norm
from dspark_backend.kernels.rope import reference as rope_reference
from dspark_backend.kernels.rope.cpu import rope_append
from dspark_backend.kernels.swiglu.cpu import silu_mul
from dspark_backend.kernels.swiglu.reference import silu_mul as silu_mul_reference

WIDTHS = [1, 7, 60, 64, 577]


@pytest.mark.parametrize("x", [-1e9, -100.0, -87.0, -50.5, -1.0, -1e-8, 0.0, 1e-3, 3.3, 88.0])
def test_exponential(x: float) -> None:
    expected = 0.0 if x < -87.0 else math.exp(np.float32(x))
    assert float(exp(np.float32(x))) == pytest.approx(expected, rel=3e-7)


def test_exponential_of_minus_infinity_is_zero() -> None:
    assert float(exp(np.float32(-np.inf))) == 0.0


@pytest.mark.parametrize("sign", [1.0, -1.0], ids=["positive", "negative"])
@pytest.mark.parametrize("width", WIDTHS)
def test_maxima(width: int, sign: float) -> None:
    for seed in range(8):
        x = np.random.default_rng(seed).standard_normal(width).astype(np.float32)
        x = np.abs(x) * np.float32(sign) if seed % 2 else x
        assert float(largest(x)) == float(x.max())
        assert float(largest_magnitude(x)) == float(np.abs(x).max())


def test_maxima_of_zeros_and_infinities() -> None:
    ends = np.array([-np.inf, -0.0, 0.0], np.float32)
    assert float(largest(ends)) == 0.0
    assert float(largest(ends[:1])) == -np.inf
    assert float(largest_magnitude(ends)) == np.inf
    assert math.isnan(largest(np.array([1.0, np.nan, np.inf], np.float32)))


@pytest.mark.parametrize("width", WIDTHS)
def test_mass_outside(width: int) -> None:
    rng = np.random.default_rng(width)
    logits = (rng.standard_normal((5, width)) * 6).astype(np.float32)
    logits[0, 0] = -np.inf if width > 1 else 0.0
    inside = rng.random(width) < 0.5
    out = np.empty(5, np.float32)
    mass_outside(logits, inside, out)
    p = torch.softmax(torch.from_numpy(logits).double(), dim=-1).numpy()
    np.testing.assert_allclose(out, p[:, ~inside].sum(axis=1), rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("width", WIDTHS)
def test_rms_norm(width: int) -> None:
    x, weight = torch.randn(3, width) * 10, torch.rand(width)
    out = np.empty((3, width), np.float32)
    rms_norm(x.numpy(), weight.numpy(), 1e-5, out)
    expected = norm_reference.rms_norm(x, weight, 1e-5).float()
    torch.testing.assert_close(torch.from_numpy(out), expected, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("width", WIDTHS)
def test_add_rms_norm_updates_the_residual(width: int) -> None:
    x, delta, weight = torch.randn(4, width), torch.randn(4, width), torch.rand(width)
    total = x + delta
    out = np.empty((4, width), np.float32)
    stream = x.clone().numpy()
    add_rms_norm(stream, delta.numpy(), weight.numpy(), 1e-6, out)
    np.testing.assert_array_equal(stream, total.numpy())
    expected = norm_reference.rms_norm(total, weight, 1e-6).float()
    torch.testing.assert_close(torch.from_numpy(out), expected, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("width", [1, 5, 64, 1023, 1025])
def test_silu_mul(width: int) -> None:
    gate_up = torch.randn(3, 2 * width) * 20
    gate_up[0, 0] = -200.0  # exp overflows a float32 on the way
    out = np.empty((3, width), np.float32)
    silu_mul(gate_up.numpy(), out)
    expected = silu_mul_reference(gate_up).float()
    torch.testing.assert_close(torch.from_numpy(out), expected, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("head_norm", [False, True], ids=["plain", "qk-norm"])
@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(4, 2, 8), (3, 1, 6), (2, 2, 64)])
def test_rope_append(heads: int, kv_heads: int, width: int, head_norm: bool) -> None:
    rows, capacity = 5, 16
    qkv = torch.randn(rows, (heads + 2 * kv_heads) * width)
    positions = torch.tensor([3, 4, 5, 9, 0])
    angles = torch.rand(capacity, width // 2) * 6
    cos, sin = angles.cos(), angles.sin()
    weights = [torch.rand(width) if head_norm else torch.zeros(0) for _ in range(2)]
    q = np.empty((rows, heads, width), np.float32)
    keys = np.full((kv_heads, capacity, width), np.nan, np.float32)
    values = keys.copy()
    rope_append(
        qkv.numpy(), positions.numpy(), cos.numpy(), sin.numpy(),
        weights[0].numpy(), weights[1].numpy(), 1e-6, q, keys, values,
    )  # fmt: skip

    query, key, value = qkv.split([heads * width, kv_heads * width, kv_heads * width], dim=1)
    query, key = query.reshape(rows, heads, width), key.reshape(rows, kv_heads, width)
    if head_norm:
        query = norm_reference.rms_norm(query, weights[0], 1e-6).float()
        key = norm_reference.rms_norm(key, weights[1], 1e-6).float()
    at = (cos[positions], sin[positions])
    close = {"rtol": 1e-5, "atol": 1e-5}
    rotated = rope_reference.rotate(query, *at).float()
    torch.testing.assert_close(torch.from_numpy(q), rotated, **close)
    written = torch.from_numpy(keys[:, positions]).transpose(0, 1)
    torch.testing.assert_close(written, rope_reference.rotate(key, *at).float(), **close)
    np.testing.assert_array_equal(
        values[:, positions].transpose(1, 0, 2).reshape(rows, -1), value.numpy()
    )
    untouched = [p for p in range(capacity) if p not in positions.tolist()]
    assert np.isnan(keys[:, untouched]).all()
