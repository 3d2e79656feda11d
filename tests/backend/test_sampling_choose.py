"""One token out of a row: the fast search finds exactly what the definition says."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dspark_backend.errors import BackendError
from dspark_backend.sampling.candidates import Candidates
from dspark_backend.sampling.choose import coupled_choice, greedy_choice, sample
from dspark_backend.sampling.noise import Noise, Stream, coupled_noise


def by_definition(logits, seed, position):
    scores = torch.from_numpy(logits).double() + coupled_noise(seed, position, len(logits))
    return int(scores.argmax())


def chosen(logits, seed, position, ids=None):
    return coupled_choice(Candidates(logits, ids), Noise(seed, Stream.TARGET, position))


SHAPES = {
    "constant": lambda rng, n: np.zeros(n),
    "flat": lambda rng, n: rng.normal(0.0, 0.3, n),
    "bell": lambda rng, n: rng.normal(0.0, 3.0, n),
    "peaked": lambda rng, n: np.append(rng.normal(0.0, 2.0, n - 1), 15.0),
    "certain": lambda rng, n: np.append(rng.normal(0.0, 2.0, n - 1), 500.0),
    "common first": lambda rng, n: -2.0 * np.log(np.arange(1, n + 1)),
    "common last": lambda rng, n: -2.0 * np.log(np.arange(n, 0, -1)),
    "mostly forbidden": lambda rng, n: np.where(rng.random(n) < 0.99, -np.inf, rng.normal(0, 1, n)),
    "huge": lambda rng, n: rng.normal(0.0, 1e7, n),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("length", [1, 700, 1025, 12_000, 60_000])
def test_the_race_finds_the_argmax_of_the_definition(shape, length):
    for position in range(12):
        logits = SHAPES[shape](np.random.default_rng(position), length).astype(np.float32)
        if np.isneginf(logits).all():
            logits[0] = 0.0
        assert chosen(logits, 1, position) == by_definition(logits, 1, position)


@settings(deadline=None, max_examples=150)
@given(
    st.lists(st.floats(-60, 20, width=32) | st.just(-np.inf), min_size=1, max_size=12),
    st.integers(1, 600),
    st.integers(0, 2**40),
)
def test_the_race_finds_it_on_any_row(values, repeats, position):
    logits = np.tile(np.array([0.0, *values], dtype=np.float32), repeats)
    assert chosen(logits, 9, position) == by_definition(logits, 9, position)


@pytest.mark.parametrize("size", [3, 900, 5000])
def test_a_subset_chooses_as_the_row_with_everything_else_forbidden(size):
    rng = np.random.default_rng(size)
    full = np.full(20_000, -np.inf, dtype=np.float32)
    ids = np.sort(rng.choice(len(full), size, replace=False)).astype(np.uint32)
    full[ids] = rng.normal(0, 2, size)
    for position in range(10):
        assert chosen(full[ids], 4, position, ids) == chosen(full, 4, position)


@pytest.mark.parametrize("length", [50, 5000])
def test_greedy_ties_go_to_the_lowest_id(length):
    logits = np.zeros(length, dtype=np.float32)
    logits[[7, 30, 41]] = 2.0
    assert greedy_choice(Candidates(logits)) == 7
    assert greedy_choice(Candidates(logits[7:], np.arange(7, length, dtype=np.uint32))) == 7


@pytest.mark.parametrize("choose", [greedy_choice, lambda c: chosen(c.logits, 0, 0, c.ids)])
@pytest.mark.parametrize(
    ("value", "message"),
    [(np.nan, "token 3 is nan"), (np.inf, "token 3 is inf"), (-np.inf, "every token")],
)
def test_a_row_without_a_usable_maximum_is_an_error(choose, value, message):
    logits = np.full(8, -np.inf, dtype=np.float32)
    logits[3] = value
    with pytest.raises(BackendError, match=message):
        choose(Candidates(logits))


def test_a_draw_from_probabilities_is_the_same_gumbel_argmax():
    logits = np.random.default_rng(0).normal(0, 2, 300).astype(np.float32)
    probabilities = torch.from_numpy(logits).double().softmax(0)
    for position in range(20):
        noise = Noise(8, Stream.TARGET, position)
        assert sample(probabilities, noise) == coupled_choice(Candidates(logits), noise)


def test_a_draw_never_lands_on_an_impossible_token():
    probabilities = torch.tensor([0.0, 1e-12, 0.0], dtype=torch.float64)
    assert {sample(probabilities, Noise(0, Stream.RESIDUAL, p)) for p in range(50)} == {1}
