"""Where the wall clock of one agent step went."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import BaseModel, ConfigDict, Field

PARTS = (
    "queue_s",
    "prefill_s",
    "decode_s",
    "grammar_s",
    "draft_s",
    "verify_s",
    "tool_s",
    "overhead_s",
)
"""The fields of :class:`StepMetrics` that add up to ``total_s``."""


class StepMetrics(BaseModel):
    """One step's account. All ``*_s`` are seconds of wall clock.

    The parts (queue, prefill, decode, grammar, draft, verify, tool, overhead) add up to
    ``total_s``; ``ttft_s``, from the step's begin to its first new token, is not part of the sum.
    ``tool_s`` is what the step waited for its tools after the model's turn, not what they did
    during it. Models that cannot look inside (a remote one) report prefill as the time to the first
    token, decode as the rest, and requests that failed and the pauses after them as queue.
    ``proposed`` and ``accepted`` count speculated tokens by source.
    """

    model_config = ConfigDict(frozen=True)

    queue_s: float = 0.0
    prefill_s: float = 0.0
    prefill_new_tokens: int = 0
    prefill_cached_tokens: int = 0
    ttft_s: float = 0.0
    decode_s: float = 0.0
    grammar_s: float = 0.0
    draft_s: float = 0.0
    verify_s: float = 0.0
    tool_s: float = 0.0
    overhead_s: float = 0.0
    total_s: float = 0.0
    new_tokens: int = 0
    cycles: int = 0
    proposed: Mapping[str, int] = Field(default_factory=dict)
    accepted: Mapping[str, int] = Field(default_factory=dict)

    @property
    def parts_s(self) -> float:
        """Sum of the parts: within rounding of ``total_s``."""
        return float(sum(getattr(self, name) for name in PARTS))

    @property
    def tok_per_s(self) -> float:
        """New tokens after the first over the seconds the model took for them; 0.0 when undefined.

        The time of the step's tools does not count.
        """
        spent = self.total_s - self.tool_s - self.ttft_s
        return (self.new_tokens - 1) / spent if self.new_tokens > 1 and spent > 0 else 0.0

    def closed(self, *, total_s: float, tool_s: float) -> StepMetrics:
        """The model's account extended to the whole step: tools, and the rest as overhead."""
        named = self.parts_s - self.overhead_s - self.tool_s + tool_s
        return self.model_copy(
            update={
                "tool_s": tool_s,
                "total_s": total_s,
                "overhead_s": max(0.0, total_s - named),
            }
        )
