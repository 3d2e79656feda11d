"""The Pareto benchmark: agents are really at it together, write what they write alone, and the
figures follow from what was measured."""

from __future__ import annotations

import io
import json
import struct
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from dspark_backend.bench.contender import Sample
from dspark_backend.bench.crowd import CrowdWorker, Wave
from dspark_backend.bench.crowd_terms import crowd_spec, load_of
from dspark_backend.bench.errors import BenchError
from dspark_backend.bench.lineup import Subject, Terms
from dspark_backend.bench.pareto import ParetoSettings, contestant, run_pareto
from dspark_backend.bench.pareto_report import (
    BEST_FIXED,
    ParetoContender,
    ParetoPoint,
    ParetoReport,
    ParetoWave,
    leads,
    speed_at,
    written,
)
from dspark_backend.bench.pareto_view import leads_table, pareto_table, plot_pareto
from dspark_backend.bench.steps import StepsSettings, run_steps
from dspark_backend.bench.trace import TraceRun, read_trace
from dspark_backend.engine import DEFAULT_KV_BYTES
from dspark_backend.metrics import EngineMetrics
from dspark_backend.speculation.account import CycleAccount
from dspark_backend.speculation.candidate import BudgetError
from dspark_backend.speculation.signals import Signals

Checkpoint = Callable[..., Path]

SCHEMA = {
    "type": "object",
    "properties": {"bright": {"type": "boolean"}},
    "required": ["bright"],
    "additionalProperties": False,
}


def trace_of(name: str) -> dict[str, object]:
    first = {"messages": [{"role": "user", "content": f"{name}: is it dark?"}]}
    second = {"messages": [{"role": "user", "content": "And now? And now? And now?"}]}
    return {
        "name": name,
        "system": "You look at lamps.",
        "steps": [
            first | {"output_schema": SCHEMA, "tool_choice": "none", "max_new_tokens": 32},
            second | {"tool_choice": "none", "max_new_tokens": 12},
        ],
    }


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("trace") / "lamps.jsonl"
    path.write_text("".join(f"{json.dumps(trace_of(name))}\n" for name in ("hall", "stairs")))
    return path


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Checkpoint) -> str:
    return str(tiny_checkpoint("qwen2", max_position_embeddings=2048))


@pytest.fixture(scope="module")
def report(model: str, trace: Path) -> ParetoReport:
    done: list[tuple[int, int]] = []
    settings = ParetoSettings(
        model=model,
        traces=(trace,),
        contenders=("fixed-2", "step_aware", "step_aware:drafts"),
        concurrency=(3, 1, 3),
        rounds=2,
        terms=Terms(speculation=True, precision="bf16", threads=1),
    )
    report = run_pareto(settings, on_wave=lambda at, total: done.append((at, total)))
    assert done == [(number, 16) for number in range(1, 17)]
    return report


def test_the_report_has_a_point_for_every_contender_and_number_of_agents(
    report: ParetoReport,
) -> None:
    document = json.loads(report.model_dump_json())
    assert document["schema_version"] == 2
    assert document["traces"] == ["lamps"]
    assert document["concurrency"] == [1, 3]
    assert list(document["contenders"]) == ["plain", "fixed-2", "step_aware", "step_aware:drafts"]
    for contender in document["contenders"].values():
        assert [point["agents"] for point in contender["points"]] == [1, 3]
        assert contender["peak_rss_bytes"] > 50 << 20
        for point in contender["points"]:
            assert len(point["waves"]) == 2
            assert point["tok_per_s"] > 0 < point["tok_per_s_per_agent"]
            assert point["accepted_length"] >= 1.0


def test_three_agents_take_the_two_runs_twice_so_that_each_counts_alike(
    report: ParetoReport,
) -> None:
    one, three = report.contenders["plain"].points
    assert {wave.new_tokens for wave in three.waves} == {2 * one.waves[0].new_tokens}


def test_every_policy_writes_the_same_tokens(report: ParetoReport) -> None:
    points = [point for each in report.contenders.values() for point in each.points]
    assert all(point.same_tokens for point in points)


def test_cycles_are_foreseen_where_there_is_a_cost_model(report: ParetoReport) -> None:
    assert all(p.prediction_error is None for p in report.contenders["plain"].points)
    assert all(p.prediction_error is not None for p in report.contenders["step_aware"].points)


def test_the_tables_and_the_plot_show_all(report: ParetoReport, tmp_path: Path) -> None:
    text = io.StringIO()
    console = Console(width=120, file=text)
    console.print(pareto_table(report))
    console.print(leads_table(report))
    for word in ("plain", "fixed-2", "step_aware", "3 agents", BEST_FIXED, "same"):
        assert word in text.getvalue()
    assert "step_aware over fixed-2" in text.getvalue()
    assert "step_aware:drafts over plain" in text.getvalue()
    assert "OTHER" not in text.getvalue()
    plot_pareto(report, tmp_path / "p.png")
    assert struct.unpack(">II", (tmp_path / "p.png").read_bytes()[16:24]) == (640, 480)


@pytest.fixture(scope="module")
def crowd(model: str, trace: Path) -> Iterator[CrowdWorker]:
    base = crowd_spec(Subject.of(model), Terms(threads=1), read_trace(trace), 4)
    with CrowdWorker("plain", contestant("plain", base, None)) as worker:
        yield worker


def test_every_agent_has_memory_for_the_longest_run(
    model: str, trace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject, traces = Subject.of(model), read_trace(trace)
    assert crowd_spec(subject, Terms(), traces, 1).kv_bytes == DEFAULT_KV_BYTES
    monkeypatch.setattr("dspark_backend.bench.crowd_terms.DEFAULT_KV_BYTES", 0)
    granted = crowd_spec(subject, Terms(), traces, 8)
    assert granted.kv_bytes is not None
    position = 2 * 2 * 2 * 16 * 4  # keys and values of two layers, two heads of 16 floats
    assert granted.kv_bytes >= 8 * granted.max_context * position


@pytest.mark.parametrize("agents", [1, 4])
def test_as_many_agents_as_asked_for_share_the_passes(
    crowd: CrowdWorker, trace: Path, agents: int
) -> None:
    # Many runs: on a busy machine an agent may be through with one before another has begun.
    wave = crowd.wave(load_of(read_trace(trace), 24), agents)
    assert len(wave.runs) == 24
    shared = [cycle.requests for run in wave.runs for sample in run for cycle in sample.cycles]
    assert max(shared) == agents
    spent = sum(sample.total_s for run in wave.runs for sample in run)
    assert spent <= agents * wave.wall_s


def test_a_crowd_writes_what_each_run_writes_alone(
    crowd: CrowdWorker, model: str, trace: Path
) -> None:
    alone = run_steps(StepsSettings(model=model, trace=trace, terms=Terms(threads=1)))
    expected = tuple(tuple(step.token_ids for step in run.steps) for run in alone.runs)
    assert written(crowd.wave(read_trace(trace), 2)) == expected


def test_a_run_that_fails_is_named_by_what_it_died_of(crowd: CrowdWorker, trace: Path) -> None:
    longer = read_trace(trace)[0].model_dump()
    longer["steps"][1]["max_new_tokens"] = 5000
    with pytest.raises(BenchError, match=r"plain: the step needs .* max_context"):
        crowd.wave([TraceRun.model_validate(longer)], 1)
    assert len(crowd.wave(read_trace(trace), 2).runs) == 2


# -- figures that follow -------------------------------------------------------------------


def cycle(predicted_s: float | None, verify_s: float) -> CycleAccount:
    return CycleAccount(
        position=0,
        tokens=(),
        sources=(),
        survival=(),
        verified=0,
        reason="",
        accepted=0,
        written=1,
        rows=2,
        requests=2,
        draft_s=0.25,
        verify_s=verify_s,
        predicted_s=predicted_s,
    )


def sample(ids: tuple[int, ...], seconds: float, *cycles: CycleAccount) -> Sample:
    return Sample(ids, "", 0.0, seconds, EngineMetrics(cycles=2), cycles)


def test_a_point_follows_from_its_waves() -> None:
    shared = cycle(1.0, 0.75)
    wave = Wave(
        wall_s=2.0,
        runs=(
            (sample((1, 2, 3), 1.0, shared, cycle(0.5, 0.75)),),
            (sample((4,), 0.5, shared), sample((5, 6), 0.5, cycle(1.2, 0.75))),
        ),
    )
    point = ParetoPoint.of(2, [wave], wave)
    assert point.tok_per_s == 3.0  # six tokens in two seconds
    assert point.tok_per_s_per_agent == 3.0  # both: three tokens in a second of steps
    assert point.accepted_length == 1.0  # six tokens in six cycles
    assert point.passes == 3  # the one that two steps shared counts once
    assert point.prediction_error == pytest.approx(0.2)  # of 0, 0.5 and 0.2
    assert point.same_tokens


def test_one_other_token_shows() -> None:
    waves = [Wave(1.0, ((sample((1, last), 1.0),),)) for last in (2, 2, 3)]
    assert ParetoPoint.of(1, waves[:2], waves[0]).same_tokens
    assert not ParetoPoint.of(1, waves, waves[0]).same_tokens


def test_speed_at_a_throughput_lies_on_the_measured_line() -> None:
    curve = [(10.0, 10.0), (16.0, 8.0), (20.0, 5.0)]
    assert speed_at(curve, 5.0) == 10.0  # one agent gets more than that together
    assert speed_at(curve, 10.0) == 10.0
    assert speed_at(curve, 13.0) == 9.0
    assert speed_at(curve, 18.0) == 6.5
    assert speed_at(curve, 20.0) == 5.0
    assert speed_at(curve, 20.1) is None


def test_speed_at_a_throughput_that_falls_under_load_takes_the_faster_way() -> None:
    curve = [(10.0, 10.0), (20.0, 5.0), (12.0, 1.0)]
    assert speed_at(curve, 12.0) == 9.0
    assert speed_at(curve, 20.0) == 5.0


def contender(*speeds: tuple[float, ...]) -> ParetoContender:
    """A point for every tuple, which holds the aggregate of every wave."""
    points = []
    for place, waves in enumerate(speeds):
        agents = 4**place
        middle = sorted(waves)[len(waves) // 2]
        points.append(
            ParetoPoint(
                agents=agents,
                tok_per_s=middle,
                tok_per_s_per_agent=middle / agents,
                accepted_length=1.0,
                prediction_error=None,
                passes=1,
                same_tokens=True,
                waves=tuple(
                    ParetoWave(
                        wall_s=1.0,
                        new_tokens=1,
                        tok_per_s=wave,
                        tok_per_s_per_agent=wave / agents,
                    )
                    for wave in waves
                ),
            )
        )
    return ParetoContender(points=tuple(points), peak_rss_bytes=1)


def test_leads_are_medians_of_ratios_and_know_the_best_fixed_length() -> None:
    contenders = {
        "plain": contender((10.0, 20.0, 10.0), (20.0, 20.0, 20.0)),
        "fixed-2": contender((20.0, 40.0, 20.0), (25.0, 25.0, 25.0)),
        "fixed": contender((25.0, 50.0, 25.0), (10.0, 10.0, 10.0)),
        "step_aware": contender((30.0, 60.0, 30.0), (50.0, 50.0, 50.0)),
    }
    found = {(lead.over, lead.agents): lead for lead in leads("step_aware", contenders)}
    # the machine ran at double speed in the second round: no one's advantage
    assert found["plain", 1].speedup == 3.0
    assert found["fixed", 1].speedup == pytest.approx(1.2)
    assert found[BEST_FIXED, 1].speedup == pytest.approx(1.2)  # "fixed" is the best alone,
    assert found[BEST_FIXED, 4].speedup == 2.0  # "fixed-2" among four
    # four agents of plain get 20 together and 5 each; alone, ours gets 30 already
    assert found["plain", 4].at_throughput == 6.0
    assert {lead.ours for lead in found.values()} == {"step_aware"}
    assert leads("step_aware", {"plain": contenders["plain"]}) == ()


def test_drafts_alone_are_held_against_drafts_alone() -> None:
    names = ["plain", "fixed", "step_aware", "fixed-2:drafts", "step_aware:drafts", "mtp"]
    speeds = [10.0, 30.0, 60.0, 15.0, 20.0, 12.0]
    contenders = {n: contender((speed,)) for n, speed in zip(names, speeds, strict=True)}
    alone = {lead.over: lead.speedup for lead in leads("step_aware:drafts", contenders)}
    assert alone == {
        "plain": 2.0,
        "fixed-2:drafts": pytest.approx(4 / 3),
        "mtp": pytest.approx(5 / 3),
        BEST_FIXED: pytest.approx(4 / 3),
    }
    whole = {lead.over: lead.speedup for lead in leads("step_aware", contenders)}
    assert whole == {
        "plain": 6.0,
        "fixed": 2.0,
        "fixed-2:drafts": 4.0,
        "step_aware:drafts": 3.0,
        "mtp": 5.0,
        BEST_FIXED: 2.0,
    }


def test_contenders_differ_in_their_policy_alone_unless_they_have_drafts_alone(
    model: str, trace: Path
) -> None:
    base = crowd_spec(Subject.of(model), Terms(speculation=True), read_trace(trace), 1)
    ours = contestant("step_aware", base, None)
    other = contestant("prefix_throughput", base, None)
    assert replace(other, policy="step_aware") == ours
    assert ours.signals is None
    alone = contestant("step_aware:drafts", base, None)
    assert replace(alone, signals=None) == ours
    assert alone.signals == Signals(copies=False, splice=False)
    theirs = contestant("prefix_throughput:drafts", base, None)
    assert replace(theirs, signals=None) == other
    assert theirs.signals == Signals.drafts_alone()
    mtp = contestant("mtp", base, trace.parent)
    assert (mtp.policy, mtp.drafter, mtp.signals) == ("fixed", trace.parent, theirs.signals)


def test_settings_that_cannot_work_are_refused(tmp_path: Path) -> None:
    def settings(**changed: object) -> ParetoSettings:
        given: dict[str, object] = {"model": "m", "traces": (tmp_path,)}
        return ParetoSettings(**(given | changed))  # type: ignore[arg-type]

    for concurrency in ((), (0,), (1, 65)):
        with pytest.raises(BenchError, match="number of agents must be from 1 to 64"):
            settings(concurrency=concurrency)
    with pytest.raises(BenchError, match="rounds must be at least 1"):
        settings(rounds=0)
    with pytest.raises(BenchError, match="at least one trace"):
        settings(traces=())
    for name in ("wishful", "wishful:drafts"):
        with pytest.raises(BudgetError, match="no policy 'wishful'"):
            settings(contenders=(name,))
    assert settings(contenders=("fixed-2", "plain")).names == ("plain", "fixed-2")
    assert settings(contenders=(), mtp=tmp_path).names == ("plain", "mtp")
