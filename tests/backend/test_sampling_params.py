"""Parameters that cannot be honoured are refused before anything runs."""

import dataclasses
import math

import pytest

from dspark_backend.errors import RequestError
from dspark_backend.request import SamplingParams
from dspark_backend.sampling import Sampler

REFUSED = [
    ("temperature", -0.1),
    ("temperature", 1e-6),
    ("temperature", math.nan),
    ("temperature", math.inf),
    ("top_k", -1),
    ("top_p", -0.1),
    ("top_p", 1.1),
    ("top_p", math.nan),
    ("min_p", -0.1),
    ("min_p", 1.5),
    ("repetition_penalty", 0.0),
    ("repetition_penalty", -1.0),
    ("repetition_penalty", math.nan),
    ("repetition_penalty", math.inf),
    ("presence_penalty", math.inf),
    ("frequency_penalty", math.nan),
    ("logit_bias", {100: 1.0}),
    ("logit_bias", {-1: 1.0}),
    ("logit_bias", {3: math.nan}),
    ("logit_bias", {3: math.inf}),
]


@pytest.mark.parametrize(("field", "value"), REFUSED)
def test_a_value_out_of_range_is_refused_by_name(field, value):
    params = dataclasses.replace(SamplingParams(), **{field: value})
    with pytest.raises(RequestError, match=field):
        Sampler(params, log=[1, 2], vocab_size=100)


ACCEPTED = [
    ("temperature", 1e-4),
    ("top_p", 0.0),
    ("min_p", 1.0),
    ("top_k", 10**9),
    ("repetition_penalty", 0.5),
    ("presence_penalty", -2.0),
    ("logit_bias", {0: -math.inf, 99: 100.0}),
    ("seed", -(2**70)),
]


@pytest.mark.parametrize(("field", "value"), ACCEPTED)
def test_the_edges_of_the_ranges_are_allowed(field, value):
    params = dataclasses.replace(SamplingParams(), **{field: value})
    assert Sampler(params, log=[1, 2], vocab_size=100).position == 2
