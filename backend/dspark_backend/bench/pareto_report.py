"""The JSON that ``bench pareto`` writes, and what follows from its points."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Final, Literal, Self

from pydantic import BaseModel, ConfigDict

from dspark_backend.bench.crowd import Wave
from dspark_backend.bench.host import HostFacts
from dspark_backend.bench.stats import median, ratio
from dspark_backend.speculation.account import CycleAccount

SCHEMA_VERSION: Final = 2
PLAIN: Final = "plain"
MTP: Final = "mtp"
ALONE: Final = ":drafts"
"""Ends the name of a contender that verifies its drafter's blocks and nothing else."""
BEST_FIXED: Final = "best fixed"

Curve = Sequence[tuple[float, float]]
"""Tokens a second of all and of each agent, a point for every number of agents, ascending."""


class ParetoWave(BaseModel):
    """One wave. ``tok_per_s`` counts all new tokens over ``wall_s``; ``tok_per_s_per_agent`` is the
    median over the runs of their new tokens over the seconds of their steps, prefill included."""

    model_config = ConfigDict(frozen=True)

    wall_s: float
    new_tokens: int
    tok_per_s: float
    tok_per_s_per_agent: float

    @classmethod
    def of(cls, wave: Wave) -> Self:
        """The figures of a wave."""
        speeds = [
            ratio(sum(len(s.token_ids) for s in run), sum(s.total_s for s in run))
            for run in wave.runs
        ]
        written = sum(len(s.token_ids) for run in wave.runs for s in run)
        return cls(
            wall_s=wave.wall_s,
            new_tokens=written,
            tok_per_s=written / wave.wall_s,
            tok_per_s_per_agent=median(speeds) or 0.0,
        )


class ParetoPoint(BaseModel):
    """One contender with ``agents`` at once; seconds and speeds are medians over the waves.

    ``accepted_length`` is new tokens an agent and pass (those that the grammar forces included);
    ``prediction_error`` the median over the passes of |predicted / measured - 1| of a cycle's
    seconds, null where no cost model foresaw them; ``same_tokens`` says whether every step of every
    wave wrote the token ids that plain decoding wrote.
    """

    model_config = ConfigDict(frozen=True)

    agents: int
    tok_per_s: float
    tok_per_s_per_agent: float
    accepted_length: float | None
    prediction_error: float | None
    passes: int
    same_tokens: bool
    waves: tuple[ParetoWave, ...]

    @classmethod
    def of(cls, agents: int, waves: Sequence[Wave], plain: Wave) -> Self:
        """The point of these waves (at least one); ``plain`` is what they should have written."""
        samples = [sample for wave in waves for run in wave.runs for sample in run]
        passes = [each for wave in waves for each in _passes(wave)]
        figures = tuple(map(ParetoWave.of, waves))
        return cls(
            agents=agents,
            tok_per_s=median(each.tok_per_s for each in figures) or 0.0,
            tok_per_s_per_agent=median(each.tok_per_s_per_agent for each in figures) or 0.0,
            accepted_length=ratio(
                sum(len(sample.token_ids) for sample in samples),
                sum(sample.metrics.cycles for sample in samples),
            ),
            prediction_error=median(map(_error, passes)),
            passes=len(passes),
            same_tokens=all(written(wave) == written(plain) for wave in waves),
            waves=figures,
        )


class ParetoContender(BaseModel):
    """One contender at every number of agents."""

    model_config = ConfigDict(frozen=True)

    points: tuple[ParetoPoint, ...]
    peak_rss_bytes: int

    @property
    def curve(self) -> list[tuple[float, float]]:
        """Its :data:`Curve`."""
        return [(point.tok_per_s, point.tok_per_s_per_agent) for point in self.points]


class Lead(BaseModel):
    """How far ``ours`` is ahead of another with ``agents`` at once: ``speedup`` is the median over
    the rounds of the ratio of aggregate speeds. ``at_throughput`` is the speed that an agent gets
    from ours where all together get what the other's point gets, over the speed an agent gets
    there; null past the throughput that was measured."""

    model_config = ConfigDict(frozen=True)

    ours: str
    over: str
    agents: int
    speedup: float | None
    at_throughput: float | None


class ParetoReport(BaseModel):
    """The JSON that ``bench pareto`` writes."""

    model_config = ConfigDict(frozen=True)

    schema_version: Literal[2] = SCHEMA_VERSION
    host: HostFacts
    model: str
    precision: str
    threads: int
    traces: tuple[str, ...]
    concurrency: tuple[int, ...]
    rounds: int
    contenders: dict[str, ParetoContender]
    leads: tuple[Lead, ...]


def leads(ours: str, contenders: Mapping[str, ParetoContender]) -> tuple[Lead, ...]:
    """``ours`` against every other contender and the best fixed length with the same proposers,
    point by point; nothing where ``ours`` took no part. Drafts alone are held against drafts alone
    and plain decoding."""
    if ours not in contenders:
        return ()
    alone = ours.endswith(ALONE)
    others = {
        name: each.points
        for name, each in contenders.items()
        if name != ours and (not alone or name.endswith(ALONE) or name in (PLAIN, MTP))
    }
    fixed = [
        points
        for name, points in others.items()
        if name.startswith("fixed") and name.endswith(ALONE) == alone
    ]
    if fixed:
        others[BEST_FIXED] = tuple(
            max(points, key=lambda point: point.tok_per_s) for points in zip(*fixed, strict=True)
        )
    mine = contenders[ours]
    return tuple(
        Lead(
            ours=ours,
            over=name,
            agents=point.agents,
            speedup=median(
                ratio(a.tok_per_s, b.tok_per_s)
                for a, b in zip(here.waves, point.waves, strict=True)
            ),
            at_throughput=ratio(speed_at(mine.curve, point.tok_per_s), point.tok_per_s_per_agent),
        )
        for name, points in others.items()
        for here, point in zip(mine.points, points, strict=True)
    )


def speed_at(curve: Curve, tok_per_s: float) -> float | None:
    """The most an agent gets where all together get at least ``tok_per_s``, between two measured
    numbers of agents by the straight line through their points; None where no load gets there."""
    speeds = [each for all_of_them, each in curve if all_of_them >= tok_per_s]
    for (low, low_each), (high, high_each) in pairwise(curve):
        if (low < tok_per_s) != (high < tok_per_s):
            share = (tok_per_s - low) / (high - low)
            speeds.append(low_each + share * (high_each - low_each))
    return max(speeds, default=None)


def written(wave: Wave) -> tuple[tuple[tuple[int, ...], ...], ...]:
    """The token ids of every step of every run."""
    return tuple(tuple(sample.token_ids for sample in run) for run in wave.runs)


def _passes(wave: Wave) -> Iterable[CycleAccount]:
    """Every pass of the target once: those who share one account for it in the same seconds."""
    return {
        (cycle.verify_s, cycle.draft_s, cycle.predicted_s): cycle
        for run in wave.runs
        for sample in run
        for cycle in sample.cycles
    }.values()


def _error(cycle: CycleAccount) -> float | None:
    error = ratio(cycle.predicted_s, cycle.verify_s + cycle.draft_s)
    return None if error is None else abs(error - 1.0)
