"""Top-k, top-p and min-p against transformers' warpers and against their definitions."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from dspark_backend.sampling.truncation import min_p_cutoff, top_k_cutoff, top_p_cutoff

SHAPES = {
    "flat": lambda rng, n: rng.normal(0.0, 0.3, n),
    "peaked": lambda rng, n: np.append(rng.normal(0.0, 2.0, n - 1), 25.0),
    "long tail": lambda rng, n: -6.0 * np.log(np.arange(1, n + 1)) + rng.normal(0, 0.1, n),
    "ascending": lambda rng, n: np.sort(rng.normal(0.0, 3.0, n)),
    "half forbidden": lambda rng, n: np.where(
        rng.random(n) < 0.5, -np.inf, rng.normal(0.0, 2.0, n)
    ),
}


def kept(logits, cutoff):
    return set(np.flatnonzero(logits >= np.float32(cutoff)).tolist())


def survivors(warper, logits):
    """What a transformers warper leaves of a row that has no -inf, or had it there before."""
    return set(
        torch.isfinite(warper(None, torch.from_numpy(logits)[None])[0]).nonzero()[:, 0].tolist()
    )


ROWS = [
    pytest.param(
        shape(np.random.default_rng(length), length).astype(np.float32), id=f"{name}-{length}"
    )
    for name, shape in SHAPES.items()
    for length in (5, 1024, 1025, 20_000)
]


@pytest.mark.parametrize("logits", ROWS)
@pytest.mark.parametrize("k", [1, 2, 50, 1500])
def test_top_k_agrees_with_transformers(logits, k):
    finite = set(np.flatnonzero(np.isfinite(logits)).tolist())
    assert kept(logits, top_k_cutoff(logits, k)) & finite == survivors(TopKLogitsWarper(k), logits)


@pytest.mark.parametrize("logits", ROWS)
@pytest.mark.parametrize("p", [0.05, 0.5, 0.9, 0.95, 0.999])
def test_top_p_agrees_with_transformers(logits, p):
    ours, theirs = kept(logits, top_p_cutoff(logits, p)), survivors(TopPLogitsWarper(p), logits)
    mass = torch.from_numpy(logits).double().softmax(0)
    # Theirs sums float32 from the unlikely end: on long rows the boundary is off by its rounding.
    assert float(mass[sorted(ours ^ theirs)].sum()) < 1e-5


@pytest.mark.parametrize("logits", ROWS)
@pytest.mark.parametrize("p", [1e-6, 0.05, 0.5, 0.9, 0.95, 0.999])
def test_top_p_keeps_the_fewest_tokens_that_reach_the_mass(logits, p):
    order = np.argsort(-logits, kind="stable")
    mass = np.cumsum(torch.from_numpy(logits[order]).double().softmax(0).numpy())
    count = len(kept(logits, top_p_cutoff(logits, p)))
    assert mass[count - 1] >= p - 1e-6
    assert count == 1 or mass[count - 2] < p + 1e-6


@pytest.mark.parametrize("logits", ROWS)
@pytest.mark.parametrize("min_p", [0.001, 0.05, 0.3, 1.0])
def test_min_p_agrees_with_transformers(logits, min_p):
    assert kept(logits, min_p_cutoff(logits, min_p)) == survivors(MinPLogitsWarper(min_p), logits)


@settings(deadline=None, max_examples=200)
@given(
    st.lists(st.integers(-6, 6), min_size=1, max_size=40),
    st.integers(1, 45),
    st.floats(0.0, 1.0),
    st.integers(1, 80),
)
def test_ties_live_or_die_together(values, k, p, repeats):
    """Integer logits tie everywhere; repeated, they also exercise the search in long rows."""
    logits = np.tile(np.array(values, dtype=np.float32), repeats)
    ordered = np.sort(logits)[::-1]
    assert top_k_cutoff(logits, k) == ordered[min(k, len(ordered)) - 1]

    mass = np.exp(ordered.astype(np.float64) - ordered[0]).cumsum()
    cutoff = top_p_cutoff(logits, p)
    above = mass[ordered > cutoff]
    reached = mass[ordered >= cutoff]
    assert len(reached) > 0
    assert reached[-1] >= p * mass[-1] * (1 - 1e-6)
    assert len(above) == 0 or above[-1] <= p * mass[-1] * (1 + 1e-6)


@pytest.mark.parametrize("length", [3, 5000])
def test_a_row_of_equals_is_kept_whole(length):
    logits = np.full(length, 1.5, dtype=np.float32)
    for cutoff in (top_k_cutoff(logits, 2), top_p_cutoff(logits, 0.5), min_p_cutoff(logits, 1.0)):
        assert len(kept(logits, cutoff)) == length


@pytest.mark.parametrize("length", [3, 5000])
def test_the_extremes_keep_the_peak_and_everything(length):
    logits = np.random.default_rng(0).normal(size=length).astype(np.float32)
    assert kept(logits, top_p_cutoff(logits, 0.0)) == {int(logits.argmax())}
    assert kept(logits, top_k_cutoff(logits, 1)) == {int(logits.argmax())}
    assert len(kept(logits, top_p_cutoff(logits, math.nextafter(1.0, 0.0)))) >= length - 1
    assert len(kept(logits, top_k_cutoff(logits, length + 7))) == length
