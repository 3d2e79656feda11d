"""Is a set of sampling parameters one that can be honoured?"""

from __future__ import annotations

import math

from dspark_backend.errors import RequestError
from dspark_backend.request import AcceptanceRule, SamplingParams

# Below this, logits over temperature leave float32's useful range.
MIN_TEMPERATURE = 1e-4


def validate(params: SamplingParams, vocab_size: int) -> None:
    """Raises RequestError naming the first field of ``params`` that is out of range."""
    temperature = params.temperature
    if temperature != 0.0 and not MIN_TEMPERATURE <= temperature < math.inf:
        raise RequestError(
            f"temperature is {temperature}; use 0 for greedy, else a number from "
            f"{MIN_TEMPERATURE} up"
        )
    if params.top_k < 0:
        raise RequestError(f"top_k is {params.top_k}; use 0 for off, else a positive count")
    for name in ("top_p", "min_p"):
        value = getattr(params, name)
        if not 0.0 <= value <= 1.0:
            raise RequestError(f"{name} is {value}; it is a probability, from 0 to 1")
    if not 0.0 < params.repetition_penalty < math.inf:
        raise RequestError(
            f"repetition_penalty is {params.repetition_penalty}; it divides logits: use 1 for off, "
            "else a positive number"
        )
    for name in ("presence_penalty", "frequency_penalty"):
        value = getattr(params, name)
        if not math.isfinite(value):
            raise RequestError(
                f"{name} is {value}; it is subtracted from logits and must be finite"
            )
    for token, bias in params.logit_bias.items():
        if not 0 <= token < vocab_size:
            raise RequestError(
                f"logit_bias names token {token}; the model's ids go from 0 to {vocab_size - 1}"
            )
        if math.isnan(bias) or bias == math.inf:
            raise RequestError(
                f"logit_bias of token {token} is {bias}; use a finite number, or -inf to forbid it"
            )
    if params.acceptance not in tuple(AcceptanceRule):
        raise RequestError(
            f"acceptance is {params.acceptance!r}; it is one of {', '.join(AcceptanceRule)}"
        )
