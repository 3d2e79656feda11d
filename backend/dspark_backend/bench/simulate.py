"""``bench simulate``: policies compared on paper, for machines and loads that are not at hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from pydantic import BaseModel, ConfigDict

from dspark_backend.bench.curve import read_curve
from dspark_backend.bench.cycle_records import StepRecord, read_records, synthetic
from dspark_backend.bench.errors import BenchError
from dspark_backend.bench.replay import Contender, Tally, replay
from dspark_backend.speculation.policies import named

SCHEMA_VERSION: Final = 1
MOST_AGENTS: Final = 512
AGENTS: Final = (1, 16, 128, 512)
POLICIES: Final = (
    "plain",
    "fixed-1",
    "fixed",
    "threshold",
    "prefix_throughput",
    "stale_capacity",
    "step_aware_sampled",
    "step_aware",
)
"""Compared where nobody says otherwise."""

_SYNTHETIC_STEPS = 64
_SYNTHETIC_TOKENS = 96


class SimulatedPolicy(BaseModel):
    """One policy at one number of agents. ``tok_per_s`` is the sum over all agents;
    ``speedup`` is over plain decoding by as many. ``accepted_length`` counts the tokens an agent
    gets out of a pass, ``verified`` the drafts it verifies in it, of which ``held_share`` were
    accepted; ``drafted_share`` is how often the drafter was called."""

    model_config = ConfigDict(frozen=True)

    policy: str
    agents: int
    tok_per_s: float
    tok_per_s_per_agent: float
    speedup: float
    accepted_length: float
    verified: float
    held_share: float | None
    drafted_share: float
    cycle_s: float


class SimulateReport(BaseModel):
    """The JSON that ``bench simulate`` writes. Nothing in it was measured here."""

    model_config = ConfigDict(frozen=True)

    schema_version: Literal[1] = SCHEMA_VERSION
    curve: str
    assumption: str
    records: str
    steps: int
    tokens_per_agent: int
    results: tuple[SimulatedPolicy, ...]


@dataclass(frozen=True, slots=True)
class SimulateSettings:
    """What to replay. ``records`` None makes steps up from ``seed``; ``curve`` is a file or the
    name of one that ships. Raises BenchError for agents out of range."""

    curve: str
    records: Path | None = None
    agents: Sequence[int] = AGENTS
    policies: Sequence[str] = POLICIES
    tokens_per_agent: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        for count in self.agents:
            if not 1 <= count <= MOST_AGENTS:
                raise BenchError(f"agents must be 1 to {MOST_AGENTS}, not {count}")


OnReplay = Callable[[int, int], None]
"""Called as ``(replays done, replays to do)``."""


def run_simulate(
    settings: SimulateSettings, *, on_replay: OnReplay | None = None
) -> SimulateReport:
    """Replays every policy at every number of agents; the same settings give the same report.

    Raises:
        BenchError: the records or the curve cannot be read.
        BudgetError: there is no such policy.
    """
    curve, cost = read_curve(settings.curve)
    name, steps = _steps(settings)
    block = max(len(cycle.survival) - cycle.free for step in steps for cycle in step.cycles)
    contenders = {policy: contender(policy, block) for policy in settings.policies}
    done, total = 0, len(settings.agents) * len(contenders)
    results = []
    for agents in settings.agents:
        base = replay(steps, contender("plain", block), cost, agents, settings.tokens_per_agent)
        for policy in contenders:
            # A policy with a history starts without one each time.
            tally = replay(steps, contender(policy, block), cost, agents, settings.tokens_per_agent)
            results.append(_result(policy, agents, tally, base))
            done += 1
            if on_replay is not None:
                on_replay(done, total)
    return SimulateReport(
        curve=curve,
        assumption=cost.assumption,
        records=name,
        steps=len(steps),
        tokens_per_agent=settings.tokens_per_agent,
        results=tuple(results),
    )


def contender(policy: str, block_size: int) -> Contender:
    """A policy as it would be run: plain decoding has no drafter, ours parks it where it does not
    pay, all others call it every time. Raises BudgetError where there is no such policy."""
    return Contender(
        named(policy, max(1, block_size)),
        drafts=policy not in ("plain", "fixed-0"),
        parks=policy.startswith("step_aware"),
    )


def _steps(settings: SimulateSettings) -> tuple[str, list[StepRecord]]:
    if settings.records is not None:
        return settings.records.name, read_records(settings.records)
    return (
        f"synthetic, seed {settings.seed}",
        synthetic(settings.seed, _SYNTHETIC_STEPS, _SYNTHETIC_TOKENS),
    )


def _result(policy: str, agents: int, tally: Tally, base: Tally) -> SimulatedPolicy:
    tok_per_s = tally.tokens / tally.seconds
    return SimulatedPolicy(
        policy=policy,
        agents=agents,
        tok_per_s=tok_per_s,
        tok_per_s_per_agent=tok_per_s / agents,
        speedup=tok_per_s / (base.tokens / base.seconds),
        accepted_length=tally.tokens / tally.request_cycles,
        verified=tally.verified / tally.request_cycles,
        held_share=tally.held / tally.verified if tally.verified else None,
        drafted_share=tally.drafted / tally.request_cycles,
        cycle_s=tally.seconds / tally.cycles,
    )
