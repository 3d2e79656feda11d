"""The int8 linear layer against exact integers, and its independence of rows and threads."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from dspark_backend.kernels import jit
from dspark_backend.kernels.linear import amx, cpu, vnni
from dspark_backend.kernels.linear.panels import pack, unpack
from dspark_backend.kernels.linear.reference import linear_int8, quantise_rows, quantise_weight

SHAPES = [(1, 64, 32), (2, 1, 1), (3, 100, 70), (6, 128, 33), (7, 65, 31), (13, 192, 96)]


class Layer:
    """A random layer in the kernel's layout, with the reference's view of it."""

    def __init__(self, depth: int, channels: int, planes: int, bias: bool, seed: int = 0) -> None:
        rng = torch.Generator().manual_seed(seed)
        self.planes = planes
        self.weight, self.scale = quantise_weight(torch.randn(channels, depth, generator=rng))
        self.bias = torch.randn(channels, generator=rng) if bias else None
        self._panels = pack(self.weight).numpy()

    def kernel(self, x: torch.Tensor) -> NDArray[np.float32]:
        out = np.full((x.shape[0], self.weight.shape[0]), np.nan, np.float32)
        bias = np.zeros(0, np.float32) if self.bias is None else self.bias.numpy()
        sums = self.weight.sum(dim=1, dtype=torch.int32).numpy()
        cpu.linear_int8(x.numpy(), self._panels, self.scale.numpy(), sums, bias, self.planes, out)
        return out

    def reference(self, x: torch.Tensor) -> torch.Tensor:
        return linear_int8(x, self.weight, self.scale, self.bias, self.planes)


def activations(rows: int, depth: int, seed: int = 1) -> torch.Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(rows, depth, generator=rng) * torch.rand(rows, 1, generator=rng) * 8


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("planes", [1, 2], ids=["8bit", "16bit"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_kernel_is_the_exact_integer_product(
    shape: tuple[int, int, int], planes: int, bias: bool
) -> None:
    rows, depth, channels = shape
    layer = Layer(depth, channels, planes, bias)
    x = activations(rows, depth)
    torch.testing.assert_close(torch.from_numpy(layer.kernel(x)), layer.reference(x))


@pytest.mark.parametrize("planes", [1, 2], ids=["8bit", "16bit"])
def test_largest_sums_do_not_overflow(planes: int) -> None:
    depth = 8960
    weight = torch.full((4, depth), 127, dtype=torch.int8)
    scale = torch.ones(4)
    x = torch.full((2, depth), 3.0)
    x[1] = -3.0
    out = np.empty((2, 4), np.float32)
    sums = weight.sum(dim=1, dtype=torch.int32).numpy()
    empty = np.zeros(0, np.float32)
    cpu.linear_int8(x.numpy(), pack(weight).numpy(), scale.numpy(), sums, empty, planes, out)
    np.testing.assert_allclose(out[0], 3.0 * 127 * depth, rtol=1e-6)
    np.testing.assert_array_equal(out[1], -out[0])


@pytest.mark.parametrize("planes", [1, 2], ids=["8bit", "16bit"])
def test_a_row_has_the_same_bits_in_any_company(planes: int) -> None:
    layer = Layer(200, 75, planes, bias=True)
    x = activations(16, 200)
    together = layer.kernel(x)
    for rows in (1, 2, 3, 5, 8):
        for first in range(0, 16, rows):
            part = layer.kernel(x[first : first + rows])
            np.testing.assert_array_equal(part, together[first : first + rows])


def test_threads_do_not_change_bits() -> None:
    layer = Layer(320, 257, 2, bias=False)
    x = activations(5, 320)
    with jit.threads(1):
        alone = layer.kernel(x)
    with jit.threads(jit.default_threads()):
        shared = layer.kernel(x)
    np.testing.assert_array_equal(alone, shared)


def test_a_row_of_zeros_gives_the_bias() -> None:
    layer = Layer(64, 5, 1, bias=True)
    assert layer.bias is not None
    np.testing.assert_array_equal(layer.kernel(torch.zeros(1, 64))[0], layer.bias.numpy())


def test_more_bits_are_closer_to_the_real_product() -> None:
    x = activations(4, 512)
    x[:, 7] *= 50  # an outlier channel, as real activations have them
    layer = Layer(512, 64, 1, bias=False)
    exact = x.double() @ (layer.weight.double() * layer.scale[:, None].double()).T
    errors = []
    for planes in (1, 2):
        layer.planes = planes
        errors.append(float((torch.from_numpy(layer.kernel(x)).double() - exact).abs().mean()))
    assert errors[1] < errors[0] / 100


@pytest.mark.parametrize("planes", [1, 2], ids=["8bit", "16bit"])
def test_quantised_rows_are_within_half_a_step(planes: int) -> None:
    x = activations(6, 333)
    q, scale = quantise_rows(x, planes)
    assert float(((q * scale[:, None]) - x).abs().div(scale[:, None]).max()) <= 0.51


@pytest.mark.parametrize("rows", [*range(1, 14), 23, 24, 29, 37])
def test_both_dot_products_agree(rows: int) -> None:
    if not vnni.available():
        pytest.skip("this processor has no AVX-512 VNNI: only the plain loop runs here")
    rng = np.random.default_rng(0)
    q = rng.integers(0, 256, (rows, 128)).astype(np.uint8)
    w = rng.integers(-127, 128, (80, 128)).astype(np.int8)
    panels = pack(torch.from_numpy(w)).numpy()
    simd, plain = np.zeros((rows, 32), np.int32), np.zeros((rows, 32), np.int32)
    for index in range(3):
        cpu._dot_panel_simd(q, panels, index, simd)
        cpu._dot_panel_plain(q, panels, index, plain)
        np.testing.assert_array_equal(simd, plain)
        exact = q.astype(np.int64) @ w[32 * index : 32 * index + 32].astype(np.int64).T
        np.testing.assert_array_equal(plain[:, : exact.shape[1]], exact)


@pytest.mark.parametrize("planes", [1, 2], ids=["8bit", "16bit"])
@pytest.mark.parametrize("rows", [1, 2, 8, 9, 15, 16, 17, 31, 32, 33, 48, 65, 70])
def test_tiles_have_the_bits_of_panels(
    rows: int, planes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not amx.permitted():
        pytest.skip("no tile registers here (AMX int8): only panels run")
    layer = Layer(330, 161, planes, bias=True)
    x = activations(rows, 330)
    monkeypatch.setattr(cpu, "TILED_FROM", 1)
    tiled = layer.kernel(x)
    monkeypatch.setattr(amx, "permitted", lambda: False)
    np.testing.assert_array_equal(tiled, layer.kernel(x))


@pytest.mark.parametrize("shape", [(1, 1), (32, 64), (33, 65), (70, 200)], ids=str)
def test_packing_loses_nothing(shape: tuple[int, int]) -> None:
    weight = torch.randint(-127, 128, shape, generator=torch.Generator().manual_seed(0))
    weight = weight.to(torch.int8)
    assert torch.equal(unpack(pack(weight), *shape), weight)
    assert int(pack(weight).sum()) == int(weight.sum())  # what is added is zeros
