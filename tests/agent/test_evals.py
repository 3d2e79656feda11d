"""Evaluation: what is run and scored, what failing counts, and two reports side by side."""

from __future__ import annotations

import itertools
from pathlib import Path

import anyio
import pytest

from dspark_agent import Agent, TestModel, UserError
from dspark_agent.evals import (
    Attempt,
    Case,
    CaseReport,
    Dataset,
    EvaluationReport,
    Latency,
    ScoreChange,
)

pytestmark = pytest.mark.anyio


def exact(attempt: Attempt[str, str]) -> bool:
    return attempt.output == attempt.case.expected_output


async def brevity(attempt: Attempt[str, str]) -> float:
    return 1 / len(attempt.output)


CASES = [Case("one", "a", "A"), Case("two", "b", "B"), Case("three", "cc", "Cc")]
DATA = Dataset(CASES, scorers=[exact, brevity], name="letters")


async def upper(text: str) -> str:
    return text.upper()


async def test_a_report_has_every_case_in_order_with_its_scores() -> None:
    seen: list[str] = []
    report = await DATA.evaluate(upper, on_case=lambda case: seen.append(case.name))

    assert (report.dataset, report.name) == ("letters", "upper")
    assert [case.name for case in report.cases] == ["one", "two", "three"]
    assert sorted(seen) == ["one", "three", "two"]
    assert [case.scores for case in report.cases] == [
        {"exact": 1.0, "brevity": 1.0},
        {"exact": 1.0, "brevity": 1.0},
        {"exact": 0.0, "brevity": 0.5},
    ]
    assert report.mean("exact") == pytest.approx(2 / 3)
    assert [case.output for case in report.cases] == ["A", "B", "CC"]
    assert not report.errors


async def test_a_case_that_fails_is_reported_and_counts_nothing() -> None:
    async def picky(text: str) -> str:
        if text == "b":
            raise ValueError("no b, please")
        if text == "cc":
            await anyio.sleep(60)
        return text.upper()

    report = await DATA.evaluate(picky, timeout=0.05)
    assert [case.error for case in report.cases] == [
        None,
        "ValueError: no b, please",
        "TimeoutError",
    ]
    assert report.mean("exact") == pytest.approx(1 / 3)
    assert 0.05 <= report.cases[2].latency.seconds < 30


async def test_no_more_attempts_go_on_than_were_allowed() -> None:
    running, most = 0, 0

    async def watched(text: str) -> str:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await anyio.sleep(0.005)
        running -= 1
        return text

    report = await DATA.evaluate(watched, max_concurrency=2, repeat=3)
    assert most == 2
    assert [(case.name, case.repeat) for case in report.cases] == list(
        itertools.product(["one", "two", "three"], range(3))
    )


async def test_latency_is_that_of_all_agents_inside() -> None:
    helper = Agent(TestModel(custom_output_text="yes it is"), name="helper")

    async def ask() -> str:
        """Ask."""
        return (await helper.run("help")).output

    agent = Agent(TestModel(custom_output_text="so be it now"), tools=[ask])

    async def task(text: str) -> str:
        return (await agent.run(text)).output

    report = await DATA.evaluate(task, max_concurrency=3)
    for case in report.cases:
        assert case.latency.steps == 3  # the call, the helper's answer, the answer
        assert case.latency.new_tokens == 2 + 3 + 4  # as the test model counts them
        assert 0 < case.latency.model_s < case.latency.seconds


@pytest.mark.parametrize(
    ("scorer", "complaint"),
    [
        (lambda attempt: "good", "gave 'good': give a finite number"),
        (lambda attempt: float("nan"), "gave nan"),
        (lambda attempt: 1 / 0, "failed: ZeroDivisionError"),
    ],
)
async def test_a_broken_scorer_ends_the_evaluation(scorer: object, complaint: str) -> None:
    data: Dataset[str, str] = Dataset(CASES, scorers=[scorer])  # type: ignore[list-item]
    with pytest.raises(UserError, match=complaint) as raised:
        await data.evaluate(upper)
    assert "scorer '<lambda>' on case '" in str(raised.value)


def test_a_data_set_that_cannot_work_is_refused() -> None:
    with pytest.raises(UserError, match="'empty' has no cases"):
        Dataset([], name="empty")
    with pytest.raises(UserError, match="two are called 'one'"):
        Dataset([CASES[0], CASES[0]])
    with pytest.raises(UserError, match="two are called 'exact'"):
        Dataset(CASES, scorers=[exact, exact])


async def test_settings_that_cannot_work_are_refused() -> None:
    with pytest.raises(UserError, match="at least 1"):
        await DATA.evaluate(upper, max_concurrency=0)


async def test_a_report_is_read_as_it_was_written(tmp_path: Path) -> None:
    report = await DATA.evaluate(upper)
    report.write(tmp_path / "report.json")
    assert EvaluationReport.read(tmp_path / "report.json") == report
    (tmp_path / "report.json").write_text('{"dataset": "x"}')
    with pytest.raises(UserError, match=r"report\.json is not an evaluation report: name"):
        EvaluationReport.read(tmp_path / "report.json")
    with pytest.raises(UserError, match="has no score 'fluency'; it has: exact, brevity"):
        report.mean("fluency")


def made(name: str, *cases: tuple[str, float | None, float]) -> EvaluationReport:
    """A report of (case, score or None where it failed, seconds)."""
    return EvaluationReport.model_validate(
        {
            "dataset": "made",
            "name": name,
            "started_at": "2026-01-01T00:00:00Z",
            "max_concurrency": 1,
            "cases": [
                CaseReport(
                    name=case,
                    scores={} if score is None else {"good": score},
                    error="Oops" if score is None else None,
                    latency=Latency(seconds=seconds),
                )
                for case, score, seconds in cases
            ],
        }
    )


def test_two_reports_are_compared_case_by_case() -> None:
    before = made("old", ("a", 0, 1.0), ("b", 1, 2.0), ("c", 0, 4.0), ("gone", 1, 9.0))
    after = made("new", ("a", 1, 0.5), ("b", None, 2.0), ("c", 1, 1.0), ("added", 1, 9.0))
    comparison = after.compare(before)

    assert comparison.cases == ("a", "b", "c")
    assert comparison.missing == ("gone", "added")
    (score,) = comparison.scores
    assert (score.before, score.after) == (pytest.approx(1 / 3), pytest.approx(2 / 3))
    assert (score.better, score.worse) == (2, 1)
    seconds = comparison.latencies[0]
    assert (seconds.name, seconds.before, seconds.after) == ("seconds", 2.0, 1.0)
    assert seconds.ratio == 0.5  # of 0.5, 1 and 0.25
    table = comparison.table()
    assert "2 / 1" in table
    assert "0.50x" in table
    assert "in one report only: gone, added" in table
    assert "| a " in table


def test_repeated_attempts_count_as_their_mean() -> None:
    before = made("old", ("a", 0, 1.0), ("a", 1, 3.0))
    after = made("new", ("a", 1, 1.0))
    (score,) = after.compare(before).scores
    assert (score.before, score.after, score.better) == (0.5, 1.0, 1)
    assert after.compare(before).latencies[0].ratio == 0.5


def test_reports_without_a_common_case_cannot_be_compared() -> None:
    with pytest.raises(UserError, match="no case in common"):
        made("new", ("a", 1, 1.0)).compare(made("old", ("b", 1, 1.0)))


@pytest.mark.parametrize("better", range(6))
@pytest.mark.parametrize("worse", range(6))
def test_the_sign_test_counts_splits_as_lopsided(better: int, worse: int) -> None:
    n = better + worse
    flips = list(itertools.product((0, 1), repeat=n))
    as_lopsided = [f for f in flips if abs(2 * sum(f) - n) >= abs(better - worse)]
    expected = len(as_lopsided) / len(flips)
    assert ScoreChange("x", 0, 0, better, worse).p_value == pytest.approx(expected)


def test_the_table_of_a_report_names_failures_and_means() -> None:
    text = made("new", ("a|b", 1, 0.5), ("c", None, 2.0)).table()
    lines = text.splitlines()
    assert lines[0].startswith("| made: new")
    assert "a\\|b" in lines[2]
    assert "Oops" in lines[3]
    assert lines[4].split("|")[2].strip() == "0.500"
    assert len({len(line) for line in lines}) == 1
