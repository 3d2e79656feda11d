"""Many agents at once on one engine, in a process of its own: a wave of recorded runs.

``agents`` runs are under way at any time; who ends one takes the next that nobody has, so all
agents have work until the last runs begin.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final

from dspark_backend.bench.contender import ContenderSpec, Sample, Turn
from dspark_backend.bench.dspark import DSparkContender, write
from dspark_backend.bench.steps import given_tokens, turn_spec
from dspark_backend.bench.trace import TraceRun
from dspark_backend.bench.worker import Worker

CROWD: Final = "dspark_backend.bench.crowd:CrowdContender"


@dataclass(frozen=True, slots=True)
class Wave:
    """What a wave took and wrote. ``wall_s`` is from its start to the last token of all;
    ``runs[i]`` holds the samples of every step of the ``i``-th run."""

    wall_s: float
    runs: tuple[tuple[Sample, ...], ...]


class CrowdContender(DSparkContender):
    """An engine with as many sessions as there are agents."""

    def wave(self, traces: Sequence[TraceRun], agents: int) -> Wave:
        """Replays ``traces``, ``agents`` of them at a time, and accounts for every cycle.

        The grammars of all steps are compiled before the clock starts: compiled once, they are
        cached, and the contender that goes first is not to pay for it.
        """
        for trace in traces:
            for step in trace.steps:
                spec = turn_spec(trace, step)
                if spec is not None:
                    self._engine.compile(spec)
        with ThreadPoolExecutor(agents, thread_name_prefix="agent") as pool:
            began = time.perf_counter()
            runs = tuple(pool.map(self._replay, traces))
            wall_s = time.perf_counter() - began
        return Wave(wall_s, runs)

    def _replay(self, trace: TraceRun) -> tuple[Sample, ...]:
        ends = self._engine.tokenizer.eos_token_ids
        samples: list[Sample] = []
        with self._engine.open_session() as session:
            closed = True
            for index, step in enumerate(trace.steps):
                tokens = given_tokens(self._engine.dialect, trace, index, closed=closed)
                turn = Turn(tokens, step.max_new_tokens, turn_spec(trace, step), explain=True)
                sample = write(self._engine, session, turn)
                samples.append(sample)
                closed = bool(sample.token_ids) and sample.token_ids[-1] in ends
        return tuple(samples)


class CrowdWorker(Worker):
    """A :class:`CrowdContender` over there."""

    def __init__(self, name: str, spec: ContenderSpec) -> None:
        super().__init__(name, CROWD, spec)

    def wave(self, traces: Sequence[TraceRun], agents: int) -> Wave:
        """See :meth:`CrowdContender.wave`. Raises BenchError as :meth:`Worker.turn` does."""
        wave: Wave = self._call("wave", tuple(traces), agents)
        return wave
