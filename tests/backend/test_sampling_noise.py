"""Keyed noise: the same everywhere, different wherever its key differs, and uniform."""

import itertools

import numpy as np
import pytest
import torch

from dspark_backend.sampling.noise import Noise, Stream, acceptance_uniform, coupled_noise

ROW = np.arange(50_000, dtype=np.uint32)


def test_draws_are_pinned_so_that_seeds_replay_on_other_machines_and_versions():
    draws = Noise(seed=7, stream=Stream.TARGET, position=11).uniform(ROW[:4])
    assert [int(w * 2**53) for w in draws] == [
        4983043445202175,
        2961009677712827,
        7038498046298433,
        1638216296538547,
    ]


def test_a_part_of_a_row_equals_the_row():
    noise = Noise(3, Stream.TARGET, 5)
    part = np.array([49_999, 0, 17, 4_096], dtype=np.uint32)
    np.testing.assert_array_equal(noise.gumbel(part), noise.gumbel(ROW)[part])


def test_coupled_noise_is_the_target_streams_gumbel_row():
    expected = Noise(3, Stream.TARGET, 5).gumbel(ROW[:1000])
    assert torch.equal(coupled_noise(3, 5, 1000), torch.from_numpy(expected))


def test_uniforms_lie_strictly_inside_the_unit_interval_and_above_their_floor():
    noise = Noise(0, Stream.TARGET, 0)
    uniform, floor = noise.uniform(ROW), noise.floor(ROW)
    assert uniform.min() > 0.0
    assert uniform.max() < 1.0
    assert np.all(floor <= uniform * (1 + 1e-6))
    assert np.all(uniform - floor <= 2.0**-32 + 1e-6 * uniform)


def test_the_transforms_are_monotone_forms_of_one_draw():
    noise = Noise(1, Stream.DRAFT, 2)
    uniform, exponential, gumbel = (
        f(ROW) for f in (noise.uniform, noise.exponential, noise.gumbel)
    )
    np.testing.assert_allclose(exponential, -np.log1p(-uniform))
    np.testing.assert_allclose(gumbel, -np.log(exponential))
    assert np.all(exponential >= uniform)


def test_every_part_of_the_key_matters():
    keys = itertools.product((0, 1, 2, 3, -1, 2**63), Stream, (0, 1, 2, 2**31), (0, 1, 2))
    rows = [Noise(*key).uniform(ROW[:64]) for key in keys]
    everything = np.concatenate(rows)
    assert len(np.unique(everything)) == len(everything)


@pytest.mark.parametrize("seed", [-1, 2**64 - 1, 10**30])
def test_any_integer_is_a_seed(seed):
    assert 0.0 < acceptance_uniform(seed, 0) < 1.0


def _pairs():
    base = Noise(1, Stream.TARGET, 100)
    yield "next position", base, Noise(1, Stream.TARGET, 101)
    yield "next seed", base, Noise(2, Stream.TARGET, 100)
    yield "other stream", base, Noise(1, Stream.ACCEPT, 100)
    yield "next slot", base, Noise(1, Stream.TARGET, 100, 1)
    yield "seed and position swapped", base, Noise(100, Stream.TARGET, 1)


@pytest.mark.parametrize(("one", "other"), [pytest.param(a, b, id=name) for name, a, b in _pairs()])
@pytest.mark.parametrize("shift", [0, 1, 32])
def test_neighbouring_keys_are_uncorrelated(one, other, shift):
    x, y = one.uniform(ROW), np.roll(other.uniform(ROW), shift)
    assert abs(np.corrcoef(x, y)[0, 1]) < 4.5 / np.sqrt(len(ROW))


@pytest.mark.parametrize("lag", [1, 2, 3, 32, 1024])
def test_neighbouring_tokens_are_uncorrelated(lag):
    x = Noise(1, Stream.TARGET, 9).uniform(ROW)
    assert abs(np.corrcoef(x[lag:], x[:-lag])[0, 1]) < 4.5 / np.sqrt(len(ROW))


def test_positions_are_uncorrelated_for_one_token():
    token = np.array([4242], dtype=np.uint32)
    x = np.array([Noise(1, Stream.TARGET, p).uniform(token)[0] for p in range(5000)])
    assert abs(np.corrcoef(x[1:], x[:-1])[0, 1]) < 4.5 / np.sqrt(len(x))
    assert abs(x.mean() - 0.5) < 4.5 * np.sqrt(1 / 12 / len(x))


def test_gumbel_draws_follow_the_gumbel_distribution():
    """Kolmogorov-Smirnov at a significance of about 1e-5."""
    draws = np.sort(np.concatenate([Noise(5, Stream.TARGET, p).gumbel(ROW) for p in range(4)]))
    cdf = np.exp(-np.exp(-draws))
    steps = np.arange(len(draws) + 1) / len(draws)
    distance = max(np.max(steps[1:] - cdf), np.max(cdf - steps[:-1]))
    assert distance < 2.47 / np.sqrt(len(draws))


@pytest.mark.parametrize("bit", [0, 1, 19, 20, 21, 51])
def test_every_bit_of_a_draw_is_fair(bit):
    bits = (Noise(6, Stream.TARGET, 1).uniform(ROW) * 2.0**52).astype(np.uint64) >> np.uint64(bit)
    ones = int((bits & np.uint64(1)).sum())
    assert abs(ones - len(ROW) / 2) < 4.5 * np.sqrt(len(ROW)) / 2
