"""The ablation: each signal is really off, tokens are held against plain decoding's, and what a
signal is worth is a ratio of seconds within a round."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from dspark_backend.bench.ablation import (
    SIGNALS,
    AblationSettings,
    check_same,
    contestants,
    run_ablation,
)
from dspark_backend.bench.ablation_report import AblationReport, ablation_table, contenders_of
from dspark_backend.bench.contender import ContenderSpec, Sample
from dspark_backend.bench.crowd import Wave
from dspark_backend.bench.errors import BenchError
from dspark_backend.bench.lineup import Terms
from dspark_backend.bench.trace import TraceRun
from dspark_backend.metrics import EngineMetrics
from dspark_backend.request import StepKind
from dspark_backend.speculation.signals import Signals

Checkpoint = Callable[..., Path]

SCHEMA = {
    "type": "object",
    "properties": {"bright": {"type": "boolean"}},
    "required": ["bright"],
    "additionalProperties": False,
}
RUN = {
    "name": "hall",
    "steps": [
        {
            "messages": [{"role": "user", "content": "Is it dark? Is it dark? Is it dark?"}],
            "tool_choice": "none",
            "output_schema": SCHEMA,
            "max_new_tokens": 32,
        },
        {
            "messages": [{"role": "user", "content": "And now? And now? And now?"}],
            "tool_choice": "none",
            "max_new_tokens": 24,
        },
    ],
}
TRACE = TraceRun.model_validate(RUN)


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Checkpoint) -> str:
    return str(tiny_checkpoint("qwen2", max_position_embeddings=2048))


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("trace") / "lamps.jsonl"
    path.write_text("".join(json.dumps(RUN | {"name": name}) + "\n" for name in ("a", "b")))
    return path


@pytest.fixture(scope="module")
def report(model: str, trace: Path) -> AblationReport:
    done: list[tuple[int, int]] = []
    settings = AblationSettings(
        model=model,
        traces=(trace,),
        signals=("copies",),
        rounds=2,
        # whatever it costs: a tiny model's passes are all alike, and no policy would copy
        terms=Terms(speculation=True, policy="fixed-4", threads=1),
    )
    report = run_ablation(settings, on_wave=lambda at, total: done.append((at, total)))
    assert done == [(number, 12) for number in range(1, 13)]
    return report


def test_a_signal_that_is_off_proposes_nothing(report: AblationReport) -> None:
    assert list(report.contenders) == ["plain", "all", "without copies"]
    assert sum(report.contenders["all"].proposed.values()) > 0
    assert "copy" not in report.contenders["without copies"].proposed
    assert len({each.new_tokens for each in report.contenders.values()}) == 1


def test_seconds_are_of_a_round_and_all_is_worth_itself(report: AblationReport) -> None:
    for each in report.contenders.values():
        assert len(each.step_s_by_round) == 2
        assert each.step_s == pytest.approx(sum(each.step_s_by_round) / 2)
        assert each.worth_by_kind.keys() == {StepKind.TEXT, StepKind.TYPED_RESULT}
    whole = report.contenders["all"]
    assert whole.worth == 1.0
    assert set(whole.worth_by_kind.values()) == {1.0}


def test_the_table_has_a_row_for_each_contender(report: AblationReport) -> None:
    text = io.StringIO()
    Console(width=120, file=text).print(ablation_table(report))
    for word in ("plain", "without copies", "1.00x", "typed_result", "1 agent,"):
        assert word in text.getvalue()


def test_every_signal_goes_off_once_and_alone() -> None:
    base = ContenderSpec("m", Path(), None, "hermes", (0,), None, 1, 256, speculation=True)
    found = contestants(base, SIGNALS)
    assert found["plain"].speculation is False
    assert found["all"].signals is None
    for name in SIGNALS:
        signals = found[f"without {name}"].signals
        assert signals is not None
        off = [each for each in SIGNALS if not getattr(signals, each)]
        assert off == [name]
    assert len(found) == 2 + len(SIGNALS)
    assert all(getattr(Signals(), name) for name in SIGNALS)


def sample(seconds: float, ids: tuple[int, ...] = (1, 2), **proposed: int) -> Sample:
    metrics = EngineMetrics(cycles=1, proposed=proposed)
    return Sample(ids, "", 0.0, seconds, metrics)


def test_worth_is_the_median_of_ratios_within_a_round() -> None:
    def replay(typed: float, text: float) -> list[tuple[TraceRun, tuple[Sample, ...]]]:
        return [(TRACE, (sample(typed), sample(text, copy=2)))]

    rounds = [
        {"off": replay(2.0, 4.0), "all": replay(1.0, 1.0), "plain": replay(1.0, 3.0)},
        {"off": replay(20.0, 40.0), "all": replay(10.0, 10.0), "plain": replay(10.0, 30.0)},
        {"off": replay(1.0, 1.0), "all": replay(1.0, 1.0), "plain": replay(9.0, 9.0)},
    ]
    found = contenders_of(rounds, "plain", "all")
    assert list(found) == ["plain", "all", "off"]
    assert found["off"].worth == 3.0
    assert found["off"].worth_by_kind == {StepKind.TEXT: 4.0, StepKind.TYPED_RESULT: 2.0}
    assert found["off"].step_s == 6.0
    assert found["off"].new_tokens == 4
    assert found["off"].accepted_length == 2.0
    assert found["off"].proposed == {"copy": 6}
    assert found["plain"].worth == 2.0


def test_other_tokens_end_the_run_with_where_they_were_written() -> None:
    right = Wave(1.0, ((sample(1.0), sample(1.0)),))
    wrong = Wave(1.0, ((sample(1.0), sample(1.0, (1, 3))),))
    check_same("all", [TRACE], right, right)
    with pytest.raises(BenchError, match="without copies: run 'hall', step 2 wrote other tokens"):
        check_same("without copies", [TRACE], wrong, right)


def test_settings_that_cannot_work_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match="agents must be from 1 to 64"):
        AblationSettings("m", (tmp_path,), agents=65)
    with pytest.raises(BenchError, match="rounds must be at least 1"):
        AblationSettings("m", (tmp_path,), rounds=0)
    with pytest.raises(BenchError, match="at least one trace"):
        AblationSettings("m", ())
    with pytest.raises(BenchError, match="no signal 'luck': copies, splice"):
        AblationSettings("m", (tmp_path,), signals=("luck",))
