"""Where the wall clock of one step went, as the engine saw it."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class EngineMetrics:
    """One step's account. All ``*_s`` are seconds of wall clock; the parts add up to ``total_s``.

    ``decode_s`` is time in the target's forward while decoding, ``verify_s`` is sampling and
    acceptance, ``overhead_s`` is everything the other parts do not name (scheduling, commit,
    events, and the share of an iteration that other sessions in the batch used up).
    ``ttft_s`` counts from submission to the first new token and is not part of the sum.
    """

    queue_s: float = 0.0
    prefill_s: float = 0.0
    prefill_new_tokens: int = 0
    prefill_cached_tokens: int = 0
    ttft_s: float = 0.0
    decode_s: float = 0.0
    grammar_s: float = 0.0
    draft_s: float = 0.0
    verify_s: float = 0.0
    overhead_s: float = 0.0
    total_s: float = 0.0
    new_tokens: int = 0
    cycles: int = 0
    proposed: dict[str, int] = field(default_factory=dict)
    accepted: dict[str, int] = field(default_factory=dict)

    @property
    def tok_per_s(self) -> float:
        """New tokens over the seconds after the first token was out; 0.0 when undefined."""
        spent = self.total_s - self.ttft_s
        return (self.new_tokens - 1) / spent if self.new_tokens > 1 and spent > 0 else 0.0
