"""Rotation tables: cosines and sines of every position a session may reach."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dspark_backend.checkpoint.config import TargetConfig


def inverse_frequencies(config: TargetConfig) -> torch.Tensor:
    """float32 [head_dim / 2], scaled as the config's ``rope_scaling`` says (linear, llama3)."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.int64).float() / config.head_dim
    inverse = 1.0 / (config.rope_theta**exponents)
    scaling = config.rope_scaling
    if scaling is None:
        return inverse
    if scaling["rope_type"] == "linear":
        return inverse / float(scaling["factor"])
    return _llama3(inverse, scaling)


def _llama3(inverse: torch.Tensor, scaling: Mapping[str, Any]) -> torch.Tensor:
    """Llama 3.1: long wavelengths slowed down, short ones kept, a ramp between."""
    factor = float(scaling["factor"])
    low = float(scaling["low_freq_factor"])
    high = float(scaling["high_freq_factor"])
    original = float(scaling["original_max_position_embeddings"])
    wavelength = 2 * math.pi / inverse
    ramp = ((original / wavelength - low) / (high - low)).clamp(0, 1)
    return (1 - ramp) * inverse / factor + ramp * inverse


def tables(config: TargetConfig, positions: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Cosines and sines, float32 [positions, head_dim / 2] each."""
    angles = torch.outer(torch.arange(positions).float(), inverse_frequencies(config))
    return angles.cos().numpy(), angles.sin().numpy()
