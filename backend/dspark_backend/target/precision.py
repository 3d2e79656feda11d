"""The precisions a target runs in, and how a model's default is chosen."""

from __future__ import annotations

from enum import StrEnum

from dspark_backend.errors import RequestError


class Precision(StrEnum):
    """``bf16`` is the reference; ``fp32`` computes in float32 throughout. ``int8`` has int8 weights
    per output channel; its activations are 8-bit per row (``int8``) or 16-bit per row
    (``int8x16``), both with exact integer sums."""

    BF16 = "bf16"
    FP32 = "fp32"
    INT8 = "int8"
    INT8X16 = "int8x16"

    @classmethod
    def parse(cls, name: str) -> Precision:
        """Raises RequestError naming the precisions there are."""
        try:
            return cls(name)
        except ValueError:
            raise RequestError(
                f"precision {name!r} is not known; choose one of {', '.join(cls)}"
            ) from None


# Measured with `dspark-agent bench quality`: 8-bit activations cost these models less than 1 % of
# perplexity. SmolLM2's outlier activations cost it 4 %, so it is not among them.
_EIGHT_BIT_ACTIVATIONS = frozenset({"qwen2.5-coder-0.5b", "qwen2.5-coder-1.5b"})


def default_precision(model: str) -> Precision:
    """What a model runs in on a CPU when nobody says otherwise; the careful choice if unknown."""
    return Precision.INT8 if model in _EIGHT_BIT_ACTIVATIONS else Precision.INT8X16
