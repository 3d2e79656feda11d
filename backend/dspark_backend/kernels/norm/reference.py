"""RMS normalisation (Zhang and Sennrich 2019) in float64: the oracle of ``cpu.py``."""

from __future__ import annotations

from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``x`` [R, d], ``weight`` [d]: ``x / sqrt(mean(x^2) + eps) * weight`` as float64 [R, d]."""
    wide = x.double()
    return wide / (wide.square().mean(dim=-1, keepdim=True) + eps).sqrt() * weight.double()
