"""The JSON that ``bench steps`` writes, and how its totals come about."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Final, Literal, Self

from pydantic import BaseModel, ConfigDict

from dspark_backend.bench.contender import Sample
from dspark_backend.bench.host import HostFacts
from dspark_backend.bench.stats import median, percentile, ratio
from dspark_backend.metrics import EngineMetrics
from dspark_backend.request import StepKind
from dspark_backend.speculation.account import CycleAccount

SCHEMA_VERSION: Final = 1


class StepMetrics(BaseModel):
    """The account of one step in the fields of the SDK's ``StepMetrics``; a replayed tool takes
    no time, so ``tool_s`` is 0. A peer's parts are unknown and stay 0 beside ``total_s``."""

    model_config = ConfigDict(frozen=True)

    queue_s: float
    prefill_s: float
    prefill_new_tokens: int
    prefill_cached_tokens: int
    ttft_s: float
    decode_s: float
    grammar_s: float
    draft_s: float
    verify_s: float
    tool_s: float = 0.0
    overhead_s: float
    total_s: float
    new_tokens: int
    cycles: int
    proposed: dict[str, int]
    accepted: dict[str, int]
    tok_per_s: float

    @classmethod
    def of(cls, metrics: EngineMetrics) -> Self:
        """The engine's account as it goes into a report."""
        return cls(**asdict(metrics), tok_per_s=metrics.tok_per_s)


class StepOutput(BaseModel):
    """What a step's text parsed to; ``object`` counts where ``has_object`` says so."""

    model_config = ConfigDict(frozen=True)

    text: str
    tool_calls: tuple[dict[str, Any], ...] = ()
    object: Any = None
    has_object: bool = False


class Step(BaseModel):
    """One replayed step. ``step_s`` is wall clock from handing the tokens over to the last token;
    ``cached_share`` is the part of the history that was not computed again, null in a first step;
    ``problem`` says why an output is not ``valid``; ``cycles`` are accounts where they were asked
    for."""

    model_config = ConfigDict(frozen=True)

    kind: StepKind
    step_s: float
    metrics: StepMetrics
    history_tokens: int
    cached_share: float | None
    output: StepOutput
    valid: bool
    problem: str | None = None
    token_ids: tuple[int, ...]
    cycles: tuple[CycleAccount, ...] = ()

    @classmethod
    def of(
        cls,
        *,
        kind: StepKind,
        sample: Sample,
        output: StepOutput,
        problem: str | None,
        history_tokens: int,
    ) -> Self:
        """A step from what a contender wrote and what the reader made of it."""
        cached = min(sample.metrics.prefill_cached_tokens, history_tokens)
        return cls(
            kind=kind,
            step_s=sample.total_s,
            metrics=StepMetrics.of(sample.metrics),
            history_tokens=history_tokens,
            cached_share=ratio(cached, history_tokens),
            output=output,
            valid=problem is None,
            problem=problem,
            token_ids=sample.token_ids,
            cycles=sample.cycles,
        )


class StepsRun(BaseModel):
    """One recorded run, replayed."""

    model_config = ConfigDict(frozen=True)

    name: str
    steps: tuple[Step, ...]


class Spread(BaseModel):
    """Seconds of a set of steps: their sum, median and nearest-rank 95th percentile; ``prefill_s``
    is the part of the sum in which prompts were computed (with the first token, and a span forced
    from the start), null for a peer, of which that is not known."""

    model_config = ConfigDict(frozen=True)

    count: int
    sum: float
    median: float
    p95: float
    prefill_s: float | None

    def over(self, ours: Spread) -> float | None:
        """These seconds over ``ours``."""
        return ratio(self.sum, ours.sum)

    def decoding_over(self, ours: Spread) -> float | None:
        """The same without prefills; None where either part is unknown."""
        if self.prefill_s is None or ours.prefill_s is None:
            return None
        return ratio(self.sum - self.prefill_s, ours.sum - ours.prefill_s)


class StepSeconds(Spread):
    """The spread over all steps, and apart by kind."""

    by_kind: dict[StepKind, Spread]


class StepsTotals(BaseModel):
    """One contender over all runs. ``cached_share`` is the smallest of all steps after a first."""

    model_config = ConfigDict(frozen=True)

    step_s: StepSeconds
    new_tokens: int
    valid_share: float
    cached_share: float | None
    peak_rss_bytes: int


class StepsPeer(BaseModel):
    """A peer's figures; ``speedup`` is the peer's summed step time over ours, ``decoding`` the same
    without the prefills of either, which no way to decode makes shorter."""

    model_config = ConfigDict(frozen=True)

    precision: str
    totals: StepsTotals
    speedup: float | None
    speedup_by_kind: dict[StepKind, float | None]
    decoding: float | None
    decoding_by_kind: dict[StepKind, float | None]
    runs: tuple[StepsRun, ...]


class StepsReport(BaseModel):
    """The JSON that ``bench steps`` writes."""

    model_config = ConfigDict(frozen=True)

    schema_version: Literal[1] = SCHEMA_VERSION
    host: HostFacts
    model: str
    precision: str
    speculation: Literal["on", "off"]
    threads: int
    load_s: float
    runs: tuple[StepsRun, ...]
    totals: StepsTotals
    peers: dict[str, StepsPeer]


def totals_of(runs: Sequence[StepsRun], peak_rss_bytes: int) -> StepsTotals:
    """One contender's totals over ``runs`` (at least one step)."""
    steps = [step for run in runs for step in run.steps]
    kinds = sorted({step.kind for step in steps})
    shares = [step.cached_share for step in steps if step.cached_share is not None]
    return StepsTotals(
        step_s=StepSeconds(
            **_spread(steps).model_dump(),
            by_kind={kind: _spread([s for s in steps if s.kind is kind]) for kind in kinds},
        ),
        new_tokens=sum(len(step.token_ids) for step in steps),
        valid_share=sum(step.valid for step in steps) / len(steps),
        cached_share=min(shares, default=None),
        peak_rss_bytes=peak_rss_bytes,
    )


def _spread(steps: Sequence[Step]) -> Spread:
    seconds = [step.step_s for step in steps]
    known = all(step.metrics.prefill_s > 0.0 for step in steps)  # our engine's always are
    return Spread(
        count=len(seconds),
        sum=sum(seconds),
        median=median(seconds) or 0.0,
        p95=percentile(seconds, 0.95) or 0.0,
        prefill_s=sum(step.metrics.prefill_s for step in steps) if known else None,
    )
