"""SwiGLU's gate (Shazeer 2020) in float64: the oracle of ``cpu.py``."""

from __future__ import annotations

from torch import Tensor


def silu_mul(gate_up: Tensor) -> Tensor:
    """``gate_up`` [R, 2f] -> ``silu(gate) * up`` [R, f] as float64."""
    gate, up = gate_up.double().chunk(2, dim=-1)
    return gate * gate.sigmoid() * up
