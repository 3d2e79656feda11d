"""What the benchmarks of many agents agree on: how many, with how much memory, on what load."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from dspark_backend.bench.contender import ContenderSpec
from dspark_backend.bench.errors import BenchError
from dspark_backend.bench.lineup import Subject, Terms, contender_spec
from dspark_backend.bench.steps import room
from dspark_backend.bench.trace import TraceRun
from dspark_backend.engine import DEFAULT_KV_BYTES
from dspark_backend.kv.budget import KVShape
from dspark_backend.scheduler import Limits

# A drafter's context takes a few layers beside the target's own.
_KV_MARGIN = 1.25

OnWave = Callable[[int, int], None]
"""Called as ``(waves done, waves to do)``."""


def check_crowd(concurrency: Sequence[int], rounds: int, traces: Sequence[Path]) -> None:
    """Raises BenchError for a number of agents that no engine runs at once, or nothing to do."""
    most = Limits().running
    if not concurrency or not all(1 <= agents <= most for agents in concurrency):
        raise BenchError(
            f"the number of agents must be from 1 to {most}, not "
            f"{', '.join(map(str, concurrency)) or 'left out'}"
        )
    if rounds < 1:
        raise BenchError(f"rounds must be at least 1, not {rounds}")
    if not traces:
        raise BenchError("name at least one trace to replay")


def crowd_spec(
    subject: Subject, terms: Terms, traces: Sequence[TraceRun], agents: int
) -> ContenderSpec:
    """What a contender loads so that ``agents`` replay ``traces`` at once and none has to queue.

    Raises BenchError when a run has no room in the model.
    """
    spec = contender_spec(subject, terms, max(room(subject, trace) for trace in traces))
    config = subject.files.config
    position = KVShape(config.num_layers, config.num_kv_heads, config.head_dim).bytes_per_token
    granted = round(_KV_MARGIN * agents * spec.max_context * position)
    return replace(spec, kv_bytes=max(DEFAULT_KV_BYTES, granted))


def load_of(traces: Sequence[TraceRun], agents: int) -> list[TraceRun]:
    """All of ``traces`` as often as it takes for every agent to have one, so that each of them
    counts alike at every number of agents."""
    return [*traces] * -(-agents // len(traces))
