"""Choosing tokens: logits processors, keyed noise, verification rules, stop strings."""

from dspark_backend.sampling.sampler import Sampler
from dspark_backend.sampling.stop import StopStrings
from dspark_backend.sampling.verify import Acceptance

__all__ = ["Acceptance", "Sampler", "StopStrings"]
