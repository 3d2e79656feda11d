"""``bench decode``: how fast a model answers prompts, ours beside its peers, prompt by prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal

from pydantic import BaseModel, ConfigDict

from dspark_backend.bench.contender import Sample, Turn
from dspark_backend.bench.errors import BenchError
from dspark_backend.bench.host import HostFacts, host_facts
from dspark_backend.bench.lineup import Lineup, Subject, Terms
from dspark_backend.bench.prompt import read_prompts
from dspark_backend.bench.stats import median, ratio
from dspark_backend.bench.worker import Worker
from dspark_backend.catalog import ProgressSink

SCHEMA_VERSION: Final = 1


class DecodeRun(BaseModel):
    """One prompt. ``tok_per_s`` counts the tokens after the first over ``decode_s`` and is null
    for an answer of one token; ``accepted_length`` is new tokens a target pass."""

    model_config = ConfigDict(frozen=True)

    prompt_tokens: int
    new_tokens: int
    ttft_s: float
    decode_s: float
    tok_per_s: float | None
    cycles: int
    accepted_length: float | None
    token_ids: tuple[int, ...]


class DecodeTotals(BaseModel):
    """Medians over the prompts, and the contender's own peak of resident memory."""

    model_config = ConfigDict(frozen=True)

    tok_per_s: float | None
    ttft_s: float | None
    accepted_length: float | None
    peak_rss_bytes: int


class DecodePeer(BaseModel):
    """A peer's figures; ``ratio_tok_per_s`` is our median over the peer's."""

    model_config = ConfigDict(frozen=True)

    precision: str
    totals: DecodeTotals
    ratio_tok_per_s: float | None
    runs: tuple[DecodeRun, ...]


class DecodeReport(BaseModel):
    """The JSON that ``bench decode`` writes."""

    model_config = ConfigDict(frozen=True)

    schema_version: Literal[1] = SCHEMA_VERSION
    host: HostFacts
    model: str
    precision: str
    speculation: Literal["on", "off"]
    threads: int
    max_new_tokens: int
    temperature: float
    seed: int
    load_s: float
    runs: tuple[DecodeRun, ...]
    totals: DecodeTotals
    peers: dict[str, DecodePeer]


@dataclass(frozen=True, slots=True)
class DecodeSettings:
    """What to run. ``prompts`` is a JSON-lines file, see :mod:`dspark_backend.bench.prompt`."""

    model: str
    prompts: Path
    max_new_tokens: int
    limit: int | None = None
    temperature: float = 0.0
    seed: int = 0
    terms: Terms = field(default_factory=Terms)

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise BenchError(f"max-new-tokens must be at least 1, not {self.max_new_tokens}")
        if self.temperature < 0.0:
            raise BenchError(f"temperature must not be negative, not {self.temperature}")


OnSample = Callable[[int, int], None]
"""Called as ``(samples taken, samples to take)``, those of all contenders counted."""


def run_decode(
    settings: DecodeSettings,
    *,
    progress: ProgressSink | None = None,
    on_sample: OnSample | None = None,
) -> DecodeReport:
    """Answers every prompt with every contender, interleaved, and reports.

    Raises:
        BenchError: a malformed prompt file, or a contender that cannot take part.
        BackendError: the model cannot be found, fetched or read.
    """
    rows = read_prompts(settings.prompts, settings.limit)
    subject = Subject.of(settings.model, progress)
    prompts = [tuple(subject.dialect.render_start(row.chat(), list(row.tools))) for row in rows]
    context = max(map(len, prompts)) + settings.max_new_tokens
    with Lineup(subject, settings.terms, context) as lineup:
        samples = _answer(lineup, prompts, settings, on_sample)
        runs = {
            worker.name: tuple(
                _run(len(prompt), sample)
                for prompt, sample in zip(prompts, samples[worker.name], strict=True)
            )
            for worker in lineup.all
        }
        totals = {worker.name: _totals(worker, runs[worker.name]) for worker in lineup.all}
        ours = lineup.ours
        return DecodeReport(
            host=host_facts(settings.terms.device),
            model=settings.model,
            precision=ours.loaded.precision,
            speculation=settings.terms.switch,
            threads=lineup.threads,
            max_new_tokens=settings.max_new_tokens,
            temperature=settings.temperature,
            seed=settings.seed,
            load_s=ours.loaded.load_s,
            runs=runs[ours.name],
            totals=totals[ours.name],
            peers={
                name: DecodePeer(
                    precision=peer.loaded.precision,
                    totals=totals[name],
                    ratio_tok_per_s=ratio(totals[ours.name].tok_per_s, totals[name].tok_per_s),
                    runs=runs[name],
                )
                for name, peer in lineup.peers.items()
            },
        )


def _answer(
    lineup: Lineup,
    prompts: Sequence[tuple[int, ...]],
    settings: DecodeSettings,
    on_sample: OnSample | None,
) -> dict[str, list[Sample]]:
    samples: dict[str, list[Sample]] = {worker.name: [] for worker in lineup.all}
    for index, prompt in enumerate(prompts):
        turn = Turn(
            tokens=prompt,
            max_new_tokens=settings.max_new_tokens,
            temperature=settings.temperature,
            seed=settings.seed,
        )
        for worker in lineup.order(index):
            worker.start()
            sample = worker.turn(turn)
            samples[worker.name].append(sample)
            if on_sample is not None:
                taken = sum(map(len, samples.values()))
                on_sample(taken, len(prompts) * len(samples))
    return samples


def _run(prompt_tokens: int, sample: Sample) -> DecodeRun:
    cycles = sample.metrics.cycles
    return DecodeRun(
        prompt_tokens=prompt_tokens,
        new_tokens=len(sample.token_ids),
        ttft_s=sample.ttft_s,
        decode_s=sample.decode_s,
        tok_per_s=sample.tok_per_s,
        cycles=cycles,
        accepted_length=ratio(len(sample.token_ids), cycles),
        token_ids=sample.token_ids,
    )


def _totals(worker: Worker, runs: Sequence[DecodeRun]) -> DecodeTotals:
    return DecodeTotals(
        tok_per_s=median(run.tok_per_s for run in runs),
        ttft_s=median(run.ttft_s for run in runs),
        accepted_length=median(run.accepted_length for run in runs),
        peak_rss_bytes=worker.peak_rss_bytes(),
    )
