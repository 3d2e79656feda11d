"""The learning rate: linear warm-up, then half a cosine down to zero."""

from __future__ import annotations

import math


def learning_rate(step: int, steps: int, peak: float, warmup: float) -> float:
    """Of step ``step`` (from 0) out of ``steps``; ``warmup`` is the share that rises."""
    rising = max(1, round(steps * warmup))
    if step < rising:
        return peak * (step + 1) / rising
    done = (step - rising) / max(1, steps - rising)
    return peak * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
